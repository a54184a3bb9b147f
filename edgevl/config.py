"""What a model is, in numbers: frozen, checked on construction, the same for every stage.

Knows nothing of files, tensors or devices. `edgevl.checkpoint` makes a `ModelConfig` from a checkpoint,
`deploy` writes it into the bundle's manifest, `edgevl.models` reads it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from edgevl.errors import UsageError

_T = TypeVar("_T")


def from_json(kind: type[_T], data: dict[str, Any], where: str) -> _T:
    """Build the frozen dataclass `kind` from a JSON object; unknown and missing keys raise `UsageError`."""
    if not isinstance(data, dict):
        raise UsageError(f"{where} must be a JSON object, not {type(data).__name__}")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise UsageError(f"{where} has the unknown key {unknown[0]!r}; this version knows {', '.join(sorted(known))}")
    hints = get_type_hints(kind)
    values = {name: _value(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(f"{where} is incomplete: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """One field: nested dataclasses, tuples from lists, dicts of either, plain values of exactly the hinted type."""
    options = [a for a in get_args(hint) if a is not NoneType] if get_origin(hint) in (Union, UnionType) else [hint]
    if value is None:
        if len(options) == len(get_args(hint)) or options == [hint]:
            raise UsageError(f"{where} is null; it needs a value")
        return None
    wanted = options[0]
    if is_dataclass(wanted):
        return from_json(wanted, value, where)  # type: ignore[arg-type]
    origin = get_origin(wanted)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(get_args(wanted)[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {str(key): _value(get_args(wanted)[1], item, f"{where}.{key}") for key, item in value.items()}
    if wanted is float and type(value) in (int, float):
        return float(value)
    if type(value) is not wanted:
        raise UsageError(f"{where} is {str(value)[:60]!r}; it must be of type {getattr(wanted, '__name__', origin)}")
    return value


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise UsageError(f"{type(config).__name__}.{name} is {value!r}; it must be a whole number above zero")


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's frequency scaling (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int  # tokens


@dataclass(frozen=True)
class TextConfig:
    """The language model: a Llama decoder."""

    hidden_size: int  # C
    intermediate_size: int  # F
    layers: int
    heads: int  # H
    kv_heads: int  # G
    head_dim: int  # D
    vocab_size: int  # V, rows of the embedding and the head, padding included
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int  # tokens, in and out together
    tied_embeddings: bool
    qkv_bias: bool

    def __post_init__(self) -> None:
        _positive(
            self,
            "hidden_size",
            "intermediate_size",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "vocab_size",
            "max_positions",
        )
        if self.heads % self.kv_heads:
            raise UsageError(f"{self.heads} query heads cannot share {self.kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise UsageError(f"head_dim is {self.head_dim}; rotary embedding needs an even number")

    @property
    def qkv_size(self) -> int:
        """Rows of the fused q, k, v projection: (H + 2G)·D."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class VisionConfig:
    """The RADIO vision tower and its pixel shuffle."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    patch_size: int  # pixels
    tile_size: int  # pixels, a tile is square
    prefix_tokens: int  # class tokens and registers, dropped from the output
    position_grid: int  # side of the stored position table, in patches
    norm_mean: tuple[float, float, float]
    norm_std: tuple[float, float, float]
    norm_eps: float = 1e-6
    align_corners: bool = False  # how the position table is resized to the tile's grid

    def __post_init__(self) -> None:
        _positive(
            self,
            "hidden_size",
            "intermediate_size",
            "layers",
            "heads",
            "patch_size",
            "tile_size",
            "prefix_tokens",
            "position_grid",
        )
        if self.hidden_size % self.heads:
            raise UsageError(f"a vision width of {self.hidden_size} cannot be split into {self.heads} heads")
        if self.tile_size % (2 * self.patch_size):
            raise UsageError(
                f"a tile of {self.tile_size} pixels does not shuffle: use a multiple of {2 * self.patch_size}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_size // self.patch_size

    @property
    def patches(self) -> int:
        """P: patches of a tile."""
        return self.grid**2

    @property
    def tile_tokens(self) -> int:
        """Tokens that the language model sees for one tile, after the 2x2 pixel shuffle."""
        return self.patches // 4


@dataclass(frozen=True)
class ProjectorConfig:
    """LayerNorm, Linear, GELU, Linear: from 4 shuffled patches to one token embedding."""

    hidden_size: int
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class TilingConfig:
    """How a picture is cut into tiles (facts: the checkpoint's preprocessor_config.json)."""

    max_tiles: int = 12  # without the thumbnail
    thumbnail: bool = True
    rule: str = "hf"  # "hf" doubles the picture before the grid is chosen; "native" does not

    def __post_init__(self) -> None:
        _positive(self, "max_tiles")
        if self.max_tiles > 1000:
            raise UsageError(f"TilingConfig.max_tiles is {self.max_tiles}; no context holds more than 1000")
        if self.rule not in ("hf", "native"):
            raise UsageError(f"the tiling rule {self.rule!r} does not exist; choose hf or native")


@dataclass(frozen=True)
class TokenConfig:
    """The token ids that the runtime itself needs; everything else stays in tokenizer.json."""

    size: int  # real entries; rows of the head from here on are padding and are never sampled
    stop: tuple[int, ...]
    image: int | None = None  # "<image>", placeholder and context token
    image_start: int | None = None  # "<img>"
    image_end: int | None = None  # "</img>"


@dataclass(frozen=True)
class ModelConfig:
    """One model of the family. `vision`, `projector` and `tiling` are all there or all None (text only)."""

    architecture: str  # "Llama_Nemotron_Nano_VL" or "LlamaForCausalLM"
    text: TextConfig
    tokens: TokenConfig
    vision: VisionConfig | None = None
    projector: ProjectorConfig | None = None
    tiling: TilingConfig | None = None

    def __post_init__(self) -> None:
        parts = (self.vision, self.projector, self.tiling)
        if any(p is None for p in parts) and any(p is not None for p in parts):
            raise UsageError("a model has vision, projector and tiling together, or none of them")
        if self.tokens.size > self.text.vocab_size:
            raise UsageError(
                f"the tokenizer has {self.tokens.size} entries but the embedding only {self.text.vocab_size} rows"
            )

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json(ModelConfig, …)` reads back."""
        return asdict(self)
