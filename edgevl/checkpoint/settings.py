"""Typed reading of a checkpoint's JSON settings: every wrong value is one sentence with file, key, value and rule.

Knows the JSON, not the model. Called by `llama`, `nemotron_vl`, `quantization`.
"""

from __future__ import annotations

import math
from typing import Any

from edgevl.errors import CheckpointError

_MISSING: Any = object()


class Settings:
    """A JSON object with a name for messages, such as "config.json: llm_config"."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def fail(self, key: str, rule: str) -> CheckpointError:
        value = repr(self.data[key])[:120] if key in self.data else "missing"
        return CheckpointError(f"{self.where}.{key} is {value}; {rule}")

    def whole(self, key: str, default: int = _MISSING) -> int:
        """A whole number above zero."""
        value = self._get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self.fail(key, "a whole number above zero is needed")
        return value

    def number(self, key: str, default: float = _MISSING) -> float:
        """A finite number above zero."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.fail(key, "a number above zero is needed")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.fail(key, "true or false is needed")
        return value

    def child(self, key: str) -> Settings:
        """A nested object; missing or null counts as wrong."""
        value = self.data.get(key)
        if not isinstance(value, dict):
            raise self.fail(key, "a JSON object is needed")
        return Settings(value, f"{self.where}.{key}")

    def expect(self, key: str, expected: Any, default: Any = _MISSING) -> None:
        """Refuse any value but `expected`; `default` is what an absent key means."""
        if self._get(key, default) != expected:
            raise self.fail(key, f"only {expected!r} is supported")

    def expect_empty(self, *keys: str) -> None:
        """Refuse a feature that would change the maths: the keys must be absent, null, false, or empty."""
        for key in keys:
            if self.data.get(key):
                raise self.fail(key, "this feature is not supported, so it must be empty")

    def _get(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        if value is None:
            if default is _MISSING:
                raise self.fail(key, "it must be given")
            return default
        return value
