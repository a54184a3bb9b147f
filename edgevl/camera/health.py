"""How the appliance is: one document for the status file, the same numbers for Prometheus.

Called by `edgevl.camera.appliance` and `edgevl caption`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgevl.errors import MissingExtraError, UsageError

Status = dict[str, Any]

_HEAD = b'{"state":'  # how every status file begins
_COUNTS = ("captions", "unchanged", "events", "stalled_seconds")


def write_status(path: Path, status: Status) -> str | None:
    """Replace the status file by a whole new one; why it could not be written, if so.

    Not waited for on the disk: after a power loss the next start writes another one.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(status, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        return error.strerror or str(error)
    return None


def check_status_file(path: Path, taken: Sequence[Path] = ()) -> None:
    """Raise `UsageError` when no status file can be written there, or something else would be lost.

    `taken` are files that something else is written to.
    """
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path} cannot be written; name a file in a folder of yours for --status")
    if path.resolve() in [other.resolve() for other in taken] or (path.exists() and not _ours(path)):
        raise UsageError(f"{path} is something else already; name another file for --status")


def _ours(path: Path) -> bool:
    """Whether a file is an earlier status, or what a power loss left of one: nothing, or zeros."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(len(_HEAD))
    except OSError:
        return False
    return head == _HEAD or not head.strip(b"\0")


def serve_metrics(port: int, status: Callable[[], Status]) -> Callable[[], None]:
    """Serve Prometheus metrics of `status()` on 127.0.0.1; gives the function that ends it.

    Raises `MissingExtraError`, and `UsageError` for a port that cannot be had.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise MissingExtraError("--metrics", "prometheus-client", "'edgevl[caption]'") from error
    registry = CollectorRegistry()
    registry.register(_Collector(status))
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"port {port} cannot be served on 127.0.0.1 ({error}); choose another for --metrics"
        ) from error

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join(5)

    return end


class _Collector:
    """The status document as metrics, made when they are asked for."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[Any]:
        """Every number of the status."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        status = self._status()
        for name in _COUNTS:
            yield CounterMetricFamily(f"edgevl_{name}", f"Total {name} since the start.", value=status[name])
        for name in ("uptime_seconds", "resident_bytes", "spacing"):
            yield GaugeMetricFamily(f"edgevl_{name}", name.replace("_", " "), value=status[name])
        for name in ("bytes", "sequence", "deleted"):
            yield GaugeMetricFamily(f"edgevl_journal_{name}", f"journal: {name}", value=status["journal"][name])
        if status["watts"] is not None:
            yield GaugeMetricFamily("edgevl_watts", "Power of the board.", value=status["watts"])
        celsius = GaugeMetricFamily("edgevl_celsius", "Temperature by thermal zone.", labels=["zone"])
        for zone, value in status["celsius"].items():
            celsius.add_metric([zone], value)
        yield celsius
        sources = status["sources"]
        for key, kind in (("connected", GaugeMetricFamily), ("frames", CounterMetricFamily)):
            yield _by_source(kind, key, sources)
        for key in ("captions", "losses"):
            yield _by_source(CounterMetricFamily, key, sources)
        yield _by_source(GaugeMetricFamily, "age_seconds", sources)


def _by_source(family: Any, key: str, sources: list[Status]) -> Any:
    metric = family(f"edgevl_source_{re.sub(r'_total$', '', key)}", f"{key} by source", labels=["source"])
    for source in sources:
        if source[key] is not None:
            metric.add_metric([source["name"]], float(source[key]))
    return metric
