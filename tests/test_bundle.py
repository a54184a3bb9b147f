"""Bundles that are not whole, not ours, or hostile: each refused with one sentence that names what differs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import tiny_llama, tiny_vl
from deploy.build import BuildSettings, build
from edgevl.bundle import Bundle, Manifest
from edgevl.config import ModelConfig, from_json
from edgevl.engine import Engine, make_runner
from edgevl.errors import BundleError, UsageError
from edgevl.prefill import feed


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundle")
    tiny_vl(root / "model")
    build(str(root / "model"), root / "bundle", BuildSettings(context=128))
    return root / "bundle"


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "b")
    return tmp_path / "b"


def reseal(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit the manifest as an attacker would, with a matching seal."""
    data = json.loads((bundle / "manifest.json").read_bytes())
    change(data)
    raw = json.dumps(data).encode()
    (bundle / "manifest.json").write_bytes(raw)
    (bundle / "manifest.sha256").write_text(hashlib.sha256(raw).hexdigest() + "\n")


def refused(bundle: Path, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        make_runner(Bundle.open(bundle), 1, "auto")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_good_bundle_opens_and_every_tensor_is_aligned(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    for name, record in opened.manifest.weights.items():
        stored = opened.weight(name)
        assert stored.shape == tuple(record.shape)
        for array in stored.arrays.values():
            assert array.ctypes.data % 64 == 0, name
            assert not array.flags.writeable


def test_truncated_files_are_refused(bundle: Path) -> None:
    for name in ("weights.safetensors", "tokenizer.json", "chat_template.jinja"):
        whole = (bundle / name).read_bytes()
        (bundle / name).write_bytes(whole[:-1])
        refused(bundle, name, "bytes")
        (bundle / name).write_bytes(whole)
    (bundle / "manifest.json").write_bytes((bundle / "manifest.json").read_bytes()[:-3])
    refused(bundle, "manifest.json", "changed")


@pytest.mark.parametrize(
    "name", ["manifest.json", "manifest.sha256", "weights.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_one_edited_byte_in_any_file_is_refused(bundle: Path, name: str) -> None:
    Engine.open(bundle)  # verified once, so that a stamp exists
    whole = bytearray((bundle / name).read_bytes())
    for place in (0, len(whole) // 2, len(whole) - 1):
        edited = bytearray(whole)
        edited[place] ^= 1
        (bundle / name).write_bytes(edited)
        if name == "manifest.sha256" and edited.strip() == whole.strip():
            continue  # the final newline is no part of the digest
        refused(bundle, name.replace("sha256", "json"))


def test_every_backend_shows_the_golden_answer_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("edgevl.engine.check_golden", lambda runner, *_: asked.append(runner.backend.split()[0]))
    for backend in ("reference", "cpu", "reference", "cpu"):
        Engine.open(bundle, 1, backend)
    assert len(asked) == len(set(asked)) == 2
    os.utime(bundle / "weights.safetensors")
    Engine.open(bundle, 1, "cpu")
    assert len(asked) == 3


def test_verify_finds_damage_that_keeps_size_and_time(bundle: Path) -> None:
    Engine.open(bundle)
    file = bundle / "weights.safetensors"
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    Bundle.open(bundle)  # the promise of FORMAT.md, rule 4
    with pytest.raises(BundleError, match=r"weights\.safetensors is damaged"):
        Bundle.open(bundle, verify=True)


def test_missing_pieces_are_named(bundle: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no such directory")
    (bundle / "tokenizer.json").unlink()
    refused(bundle, "tokenizer.json", "missing")
    (bundle / "manifest.json").unlink()
    refused(bundle, "manifest.json")


def test_another_target_is_refused(bundle: Path) -> None:
    reseal(bundle, lambda m: m["target"].update(name="orin-nano-8gb", backend="cuda", layout="cuda-sm87"))
    refused(bundle, "orin-nano-8gb", "--target host")


def test_another_format_and_unknown_keys_are_refused(bundle: Path) -> None:
    reseal(bundle, lambda m: m.update(format=99))
    refused(bundle, "format 99")
    reseal(bundle, lambda m: m.update(format=1, surprise=1))
    refused(bundle, "surprise")


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "kernels/../../x", "a\\b", "C:x", "", "other/file", "kernels/"]
)
def test_a_path_escape_is_refused(bundle: Path, name: str) -> None:
    reseal(bundle, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    refused(bundle, "outside the bundle")


def test_a_link_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "tokenizer.json").rename(tmp_path / "t.json")
    (bundle / "tokenizer.json").symlink_to(tmp_path / "t.json")
    refused(bundle, "tokenizer.json", "not a plain file")


def rewrite_header(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit the safetensors header and make digests match, as an attacker would."""
    file = bundle / "weights.safetensors"
    raw = file.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    record = {"bytes": file.stat().st_size, "sha256": digest}
    reseal(bundle, lambda m: m["files"].update({"weights.safetensors": record}))


def test_overlapping_tensors_are_refused(bundle: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        header["layers.0.o.values"]["data_offsets"] = header["layers.0.qkv.values"]["data_offsets"]
        header["layers.0.o.values"]["shape"] = header["layers.0.qkv.values"]["shape"]

    rewrite_header(bundle, overlap)
    refused(bundle, "weights.safetensors")


def test_a_tensor_of_the_wrong_dtype_or_shape_is_refused(bundle: Path) -> None:
    rewrite_header(bundle, lambda h: h["layers.0.o.values"].update(dtype="BF16"))
    refused(bundle, "layers.0.o.values")
    reseal(bundle, lambda m: m["weights"]["layers.0.o"].update(shape=[1, 2]))
    refused(bundle, "layers.0.o")
    reseal(bundle, lambda m: m["weights"].pop("norm"))
    refused(bundle, "norm")


def test_nonsense_in_the_manifest_is_one_sentence(bundle: Path) -> None:
    for change in (
        lambda m: m["model"].update(text=3),
        lambda m: m["model"]["text"].update(layers=-1),
        lambda m: m["model"]["text"].update(layers="many"),
        lambda m: m["limits"].update(context=0),
        lambda m: m.update(weights=[]),
        lambda m: m.update(files={"weights.safetensors": 5}),
        lambda m: m.pop("model"),
    ):
        backup = (bundle / "manifest.json").read_bytes()
        reseal(bundle, change)
        refused(bundle)
        reseal(bundle, lambda m, backup=backup: (m.clear(), m.update(json.loads(backup))))


def test_a_backend_that_computes_something_else_is_caught_by_the_golden_prompt(bundle: Path) -> None:
    manifest = Manifest.parse((bundle / "manifest.json").read_bytes())
    assert manifest.golden is not None
    shifted = [p - 3.0 for p in manifest.golden.logprobs]
    reseal(bundle, lambda m: m["golden"].update(logprobs=shifted))
    with pytest.raises(BundleError, match="golden prompt"):
        Engine.open(bundle)


def test_the_model_config_survives_json(built: Path) -> None:
    config = Bundle.open(built).manifest.model
    assert from_json(ModelConfig, json.loads(json.dumps(config.to_json())), "x") == config
    broken = config.to_json() | {"colour": "blue"}
    with pytest.raises(UsageError, match="colour"):
        from_json(ModelConfig, broken, "x")


def test_an_int8_embedding_says_what_f16_says_and_a_tied_int8_head_is_the_same_bytes(tmp_path: Path) -> None:
    model = str(tiny_llama(tmp_path / "m", tied=True))
    found, sizes = [], []
    for name, head, embed in (("f16", "f16", "f16"), ("int8", "int8", "int8"), ("apart", "f16", "int8")):
        build(model, tmp_path / name, BuildSettings(head=head, embed=embed, context=64))
        opened = Bundle.open(tmp_path / name)
        weights = opened.manifest.weights
        assert (weights["embed"].kind, weights["head"].kind) == (embed, head)
        assert (weights["embed"].arrays == weights["head"].arrays) == (head == embed)
        found.append(feed(make_runner(opened, 1, "cpu"), [5, 6, 7, 8, 9], 0, None, 3).copy())
        sizes.append(opened.weight_bytes)
    for logits in found[1:]:
        assert 0 < np.abs(logits - found[0]).max() < 0.05 * np.abs(found[0]).max()
    assert sizes[1] < sizes[0] < sizes[2]
