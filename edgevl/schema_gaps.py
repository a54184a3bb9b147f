"""What llguidance leaves open of a JSON schema, closed before it sees it: formats held to by half, bounds not held to.

Knows schemas as Python objects, and no tokens. Called by `edgevl.schema`.
"""

from __future__ import annotations

from typing import Any

_YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"  # all but 0000, which most programs cannot read
_LEAP = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DATE = f"({_YEAR}-((0[13-9]|1[0-2])-[0-9]{{2}}|02-([01][0-9]|2[0-8]))|{_LEAP}-02-29)"
_TIME = "[0-9]{2}:[0-9]{2}:[0-5][^z]+$"  # no leap seconds and no small z, for the same reason
_FORMATS: dict[str, dict[str, Any]] = {  # what a format asks beyond what llguidance makes of it
    "date": {"pattern": f"^{_DATE}$"},
    "date-time": {"pattern": f"^{_DATE}T{_TIME}"},
    "time": {"pattern": f"^{_TIME}"},
    "hostname": {"maxLength": 253},
}
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")  # hold schemas by name
_DATA = ("const", "enum", "default", "examples")  # hold no schemas


def completed(schema: Any) -> Any:
    """The schema, with what `_FORMATS` adds wherever a format is asked for; `ValueError` for bounds not held to."""
    if isinstance(schema, list):
        return [completed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    _check_bounds(schema)
    whole = dict(schema)
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            whole[key] = {name: completed(item) for name, item in value.items()}
        elif key not in _DATA:
            whole[key] = completed(value)
    more = _FORMATS.get(str(whole.get("format")))
    if more is not None and isinstance(others := whole.get("allOf", []), list):
        whole["allOf"] = [*others, more]
    return whole


def _check_bounds(schema: dict[str, Any]) -> None:
    """llguidance lets 0 pass for `exclusiveMinimum` 0 where the maximum is below 1; the same at every whole bound."""
    lows, highs = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
    for name, others, way in (("exclusiveMinimum", highs, 1), ("exclusiveMaximum", lows, -1)):
        bound = schema.get(name)
        for other in others:
            end = schema.get(other)
            if not isinstance(bound, int | float) or not isinstance(end, int | float):
                continue
            if bound % 1 == 0 and 0 < way * (end - bound) < 1:
                raise ValueError(f"{name} {bound} so near to {other} {end}")
