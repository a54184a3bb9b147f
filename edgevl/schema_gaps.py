"""What llguidance leaves open of a JSON schema, closed before it sees it: half of a format, some bounds, doubled keys.

A key can be written in many ways ("a" is "\\u0061") and the last of two counts: beside named keys there are no others.
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
_SAME = ("allOf", "anyOf", "oneOf")  # hold schemas of the same value


def completed(document: Any) -> Any:
    """The schema, narrower: with what `_FORMATS` adds, and without keys beside those that are named.

    Raises `ValueError` for what is not held to and cannot be added.
    """
    return _completed(document, document, frozenset())


def _completed(schema: Any, document: Any, beside: frozenset[str]) -> Any:
    """`beside`: keys that other schemas of the same value name."""
    if isinstance(schema, list):
        return [_completed(item, document, frozenset()) for item in schema]
    if not isinstance(schema, dict):
        return schema
    _check_bounds(schema)
    _check_count(schema)
    whole = dict(schema)
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            whole[key] = {name: _completed(item, document, frozenset()) for name, item in value.items()}
        elif key in _SAME and isinstance(value, list):
            whole[key] = [
                _completed(item, document, beside | _names({**schema, key: _others(key, value, i)}, document))
                for i, item in enumerate(value)
            ]
        elif key not in _DATA:
            whole[key] = _completed(value, document, frozenset())
    more = [_FORMATS[name] for name in [str(whole.get("format"))] if name in _FORMATS]
    target = _target(schema, document)
    names = beside | _names({**schema, "$ref": None}, document)
    if names and target is not None:  # written out, as other keys are named here than elsewhere
        del whole["$ref"]
        more.append(_completed(target, document, names))
    if more and isinstance(others := whole.get("allOf", []), list):
        whole["allOf"] = [*others, *more]
    named = whole.get("properties", {})
    if isinstance(named, dict) and (named or whole.get("patternProperties")):
        other = whole.get("additionalProperties", True)
        # keys that only others name: with patterns beside a rule for the rest it is not known which of the two holds
        unknown = "patternProperties" in schema and "additionalProperties" in schema
        added = () if unknown else sorted((beside | _names(schema, document)) - named.keys())
        whole["properties"] = {**named, **dict.fromkeys(added, other)}
        whole["additionalProperties"] = False
    return whole


def _names(schema: Any, document: Any) -> frozenset[str]:
    """The keys that a schema names, itself or in others of the same value."""
    if not isinstance(schema, dict):
        return frozenset()
    named = schema.get("properties")
    asked = schema.get("required")
    parts = [part for key in _SAME if isinstance(schema.get(key), list) for part in schema[key]]
    parts.append(_target(schema, document))
    own = [*(named if isinstance(named, dict) else ()), *(asked if isinstance(asked, list) else ())]
    return frozenset(own).union(*(_names(part, document) for part in parts))


def _others(key: str, schemas: list[Any], place: int) -> list[Any]:
    """Those of the schemas under `key` that hold beside the one at `place`."""
    return [*schemas[:place], *schemas[place + 1 :]] if key == "allOf" else []


def _target(schema: dict[str, Any], document: Any) -> Any:
    """What `$ref` points at within the document, or None."""
    reference = schema.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    for step in reference[2:].split("/"):
        document = document.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(document, dict) else None
    return document


def _check_count(schema: dict[str, Any]) -> None:
    """A key that comes twice is counted twice, and free keys may."""
    least = schema.get("minProperties")
    if isinstance(least, int | float) and least > 1 and ("patternProperties" in schema or not schema.get("properties")):
        raise ValueError(f"minProperties {least} where not all keys are named")


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
