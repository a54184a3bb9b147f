"""Durations and sizes as people write them, for options: "90s", "10m", "1d"; "64MB", "2GB". Called by verbs."""

from __future__ import annotations

import re
from collections.abc import Mapping

import click

_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def duration(value: str | float) -> float:
    """ "2s", "500ms", "10m", "12h", "7d" or a number of seconds, in seconds. Raises `click.BadParameter`."""
    return _parse(value, _SECONDS, "a time such as 500ms, 2s, 10m, 12h or 7d")


def size(value: str | float) -> int:
    """ "500kB", "64MB", "2GB" (decimal), "64MiB" or a number of bytes, in bytes. Raises `click.BadParameter`."""
    return int(_parse(value, _BYTES, "a size such as 500kB, 64MB or 2GB"))


def _parse(value: str | float, units: Mapping[str, float], rule: str) -> float:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)", str(value).strip(), re.ASCII)
    if match is None or match[2].lower() not in units:
        raise click.BadParameter(f"{str(value)[:40]!r} is not {rule}")
    return float(match[1]) * units[match[2].lower()]
