"""The trainable tensors and the operations to train them with: bfloat16 around float32 weights, on a CPU or a GPU.

The model itself is `edgevl.models`, as everywhere; here are its parameters, the heads that only training has, and the
low-rank updates of the language model. Knows nothing of pictures, files or schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.rendered.picture import CELL, CHARACTERS, COLOUR_NAMES, PATCH, THINGS
from edgevl.config import ModelConfig, TextConfig
from edgevl.demo import IMAGE_TOKENS, eye_shapes
from edgevl.models.decoder import decoder
from edgevl.models.names import text_parts, vision_parts
from edgevl.models.vision import image_embeddings
from edgevl.ops import Linear, Norm, Step
from quantize.part_tensors import CheckpointParts, JoinedTensors
from quantize.torch_ops import NamedLinear, TorchOps, written_attention

# what `Eyes.dense_loss` counts: characters off the patches, off the image tokens; words; things; colours
MEASURED = ("characters", "ordered", "words", "things", "colours")
_SMALL = torch.bfloat16
_CELLS = (PATCH // CELL[0]) * (PATCH // CELL[1])  # character cells in a patch
_NEGATIVES = 3072  # other words of the vocabulary that a written one is told from
_SHARPNESS = 2.0  # of that choice
_UNWRITTEN = 0.1  # weight of places where nothing is written
_ADAPTED = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class Labels:
    """What lies where in n pictures."""

    characters: Tensor  # (n, 32, 64) index in CHARACTERS
    things: Tensor  # (n, 16, 16) index in THINGS
    colours: Tensor  # (n, 16, 16) index in COLOUR_NAMES
    word_places: Tensor  # (m,) image tokens, counted through all pictures
    words: Tensor  # (m,) a token of the vocabulary that belongs there
    written: Tensor  # (m,) whether it is written there, or names the thing or colour that is shown


class Eyes(nn.Module):
    """Tower, projector and image token rows under their checkpoint names, and the heads that read labels off them."""

    def __init__(self, config: ModelConfig, table: Tensor) -> None:
        """`table` (V, C): the language model's embeddings without padding."""
        super().__init__()
        assert config.vision is not None and config.projector is not None
        mean, embedding_rms = table.mean(dim=0), float(table.square().mean().sqrt())
        self.config, self._rms = config, embedding_rms
        self._mean = nn.Buffer(mean, persistent=False)
        self._table = nn.Buffer((table - mean).to(_SMALL), persistent=False)
        self._names = {}
        for name, shape in eye_shapes(config.text.hidden_size).items():
            if "input_conditioner" in name:
                continue
            self._names[name] = name.replace(".", "/")
            self.register_parameter(self._names[name], nn.Parameter(_initial(name, shape, embedding_rms)))
        rows = mean + 0.05 * embedding_rms * torch.randn(len(IMAGE_TOKENS), len(mean))
        self.image_token_rows = nn.Parameter(rows)
        self.character_head = nn.Linear(config.vision.hidden_size, _CELLS * len(CHARACTERS))
        self.order_head = nn.Linear(config.text.hidden_size, 4 * _CELLS * len(CHARACTERS))
        self.thing_head = nn.Linear(config.vision.hidden_size, len(THINGS))
        self.colour_head = nn.Linear(config.vision.hidden_size, len(COLOUR_NAMES))
        self._parts = JoinedTensors(vision_parts(config), _Named(self))

    def tensors(self) -> dict[str, Tensor]:
        """What ships, by checkpoint name."""
        return {**self._own()}

    def _own(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(own) for name, own in self._names.items()}

    def matrices(self) -> list[nn.Parameter]:
        """The tower's and the projector's, without positions and the class tokens."""
        return [p for name, p in self._own().items() if p.dim() == 2 and not name.endswith("token")]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles (n, S, S, 3) uint8 -> image tokens (n·P/4, C) and the tower's patches (n·P, tower width), both bf16."""
        assert self.config.vision is not None and self.config.projector is not None
        ops = TrainingOps(self._parts)
        rows = image_embeddings(ops, self.config.vision, self.config.projector, pixels)
        assert ops.patches_seen is not None
        return rows, ops.patches_seen

    def dense_loss(self, rows: Tensor, patches: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Loss of reading the labels off what `forward` gave, and (right, all) of each of `MEASURED`.

        Characters, things and colours are read off the patches. Image tokens must lie where the language model's own
        embeddings of the same words lie, so that it can read them from the first step on.
        """
        normed = functional.layer_norm(patches, (patches.shape[1],))
        cells = _by_place(labels.characters, labels.things.shape[1])
        loss, right = _reading(_head(normed, self.character_head), cells)
        counts = [right, (cells > 0).sum()]
        # where in its image token a character stands must survive the projector: digits are told apart by nothing else
        cells = _by_place(labels.characters, labels.things.shape[1] // 2)
        again, right = _reading(_head(functional.layer_norm(rows, (rows.shape[1],)), self.order_head), cells)
        loss = loss + 0.5 * again
        counts += [right, (cells > 0).sum()]
        loss = loss + self._word_loss(rows, labels, counts)
        for map_, head, size in (
            (labels.things, self.thing_head, len(THINGS)),
            (labels.colours, self.colour_head, len(COLOUR_NAMES)),
        ):
            wanted = map_.reshape(-1).long()
            guess = _head(normed, head).reshape(-1, size).float()
            loss = loss + 0.5 * functional.cross_entropy(guess, wanted)
            some = wanted > 0
            counts += [((guess.argmax(dim=1) == wanted) & some).sum(), some.sum()]
        return loss, torch.stack(counts).detach()

    def _word_loss(self, rows: Tensor, labels: Labels, counts: list[Tensor]) -> Tensor:
        """How far the image tokens are from the words that they stand for.

        Each must be nearer to its words' embeddings than to others of the vocabulary, written words counting most;
        where nothing is written it must point where the sum of its words points.
        """
        places, words, written = labels.word_places, labels.words, labels.written
        apart = rows - self._mean.to(rows.dtype)
        chosen = torch.cat([words, torch.randint(len(self._table), (_NEGATIVES,), device=words.device)])
        chosen = chosen.unique()  # type: ignore[no-untyped-call]
        wanted = torch.searchsorted(chosen, words.contiguous())
        guess = ((apart * _SHARPNESS)[places] @ self._table[chosen].t()).float()
        weights = torch.where(written, 1.0, _UNWRITTEN)
        loss = (functional.cross_entropy(guess, wanted, reduction="none") * weights).sum() / weights.sum()
        counts += [((guess.argmax(dim=1) == wanted) & written).sum(), written.sum()]

        ideal = torch.zeros(rows.shape, device=rows.device).index_add(0, places, self._table[words].float())
        empty = torch.ones(len(rows), device=rows.device).index_fill(0, places[written], 0.0)
        across = (1 - functional.cosine_similarity(apart.float(), ideal, dim=1)) * empty
        # about as long as word embeddings, so that the language model is not startled
        length = (apart.float().square().mean(dim=1).sqrt() / self._rms).log().square()
        return loss + across.mean() + 0.1 * length.mean()


class Reader(nn.Module):
    """The frozen language model in bf16 with trainable low-rank updates, under the model's own part names."""

    def __init__(self, config: ModelConfig, weights: CheckpointParts, rank: int, device: str) -> None:
        super().__init__()
        self.config = config
        self._frozen: dict[str, Tensor] = {}
        for part in text_parts(config):
            self._frozen[part.name] = weights(part.name)[0].to(_SMALL).to(device)
        self._frozen["head"] = self._frozen["embed"]
        for part in text_parts(config):
            if part.name.rsplit(".", 1)[-1] in _ADAPTED:
                n, k = part.shape
                own = part.name.replace(".", "/")
                self.register_parameter(f"{own}/a", nn.Parameter(torch.randn(rank, k) * k**-0.5))
                self.register_parameter(f"{own}/b", nn.Parameter(torch.zeros(n, rank)))

    def updates(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Part name -> (a (rank, K), b (N, rank)); the part's weight becomes W + b·a."""
        names = [name[:-2] for name, _ in self.named_parameters() if name.endswith("/a")]
        return {n.replace("/", "."): (self.get_parameter(f"{n}/a"), self.get_parameter(f"{n}/b")) for n in names}

    def forward(self, step: Step[Tensor], mask: Tensor, special: Tensor | None = None) -> Tensor:
        """Logits (L, V) bf16 of a regular batch; `mask` (B, 1, S, S) is added to the attention scores.

        `special` (9, C): the image tokens' rows, which the tied head knows too; without them nothing is updated.
        """
        weights, updates = self._frozen, {}
        if special is not None:
            first = self.config.tokens.size - len(special)
            head = weights["embed"].clone()
            head[first : self.config.tokens.size] = special.detach().to(head.dtype)
            weights, updates = {**weights, "head": head}, self.updates()
        ops = TrainingOps(lambda name: (weights[name], None), updates, mask)
        return decoder(ops, self.config.text, step)


class TrainingOps(TorchOps):
    """`TorchOps` in bf16, with low-rank updates and with an attention mask in the place of plain causality."""

    def __init__(
        self, weights: object, updates: dict[str, tuple[Tensor, Tensor]] | None = None, mask: Tensor | None = None
    ) -> None:
        super().__init__(weights, 1 if mask is None else mask.shape[-1])  # type: ignore[arg-type]
        self._updates, self._mask = updates or {}, mask
        self.patches_seen: Tensor | None = None  # (n·P, width), the tower's output without its prefix

    def pixel_shuffle(self, x: Tensor, grid: int, prefix: int) -> Tensor:
        tiles = x.reshape(-1, prefix + grid * grid, x.shape[1])
        self.patches_seen = tiles[:, prefix:].reshape(-1, x.shape[1])
        return super().pixel_shuffle(x, grid, prefix)

    def patches(self, pixels: Tensor, patch_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return super().patches(pixels, patch_size, mean, std).to(_SMALL)

    def embed(self, tokens: Tensor, table: Tensor, images: Tensor | None) -> Tensor:
        tokens = tokens.reshape(-1).long()
        x = table[tokens.clamp(min=0)]
        if images is None:
            return x
        return torch.where((tokens < 0)[:, None], images[(-1 - tokens).clamp(min=0)].to(x.dtype), x)

    def rms_norm(self, x: Tensor, norm: Norm[Tensor], eps: float) -> Tensor:
        return _fused(_rms_norm)(x, norm.weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return _fused(_silu_mul)(gate_up)

    def linear(
        self, x: Tensor, layer: Linear[Tensor], activation: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if not isinstance(layer, NamedLinear) or layer.name not in self._updates:
            return super().linear(x, layer, activation, residual)
        weight = layer.weight.to(x.dtype).t()
        y = x @ weight if residual is None else torch.addmm(residual, x, weight)
        a, b = self._updates[layer.name]
        return torch.addmm(y, functional.linear(x, a.to(x.dtype)), b.to(x.dtype).t())

    def attention(self, q: Tensor, step: Step[Tensor], layer: int, config: TextConfig) -> Tensor:
        keys, values = self._cache[layer]
        query = self._by_sequence(q.reshape(-1, config.heads, config.head_dim))
        return written_attention(query, keys, values, self._mask).transpose(1, 2).reshape(q.shape)

    def full_attention(self, qkv: Tensor, heads: int, tokens: int) -> Tensor:
        width = qkv.shape[1] // 3
        q, k, v = qkv.reshape(-1, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        return written_attention(q, k, v, None).transpose(1, 2).reshape(-1, width)


class _Named(dict[str, Tensor]):
    """Checkpoint names -> the module's parameters as the model's ops want them."""

    def __init__(self, eyes: Eyes) -> None:
        super().__init__()
        self._eyes = eyes

    def __getitem__(self, name: str) -> Tensor:
        values = self._eyes.get_parameter(name.replace(".", "/"))
        return values[0] if name.endswith("pos_embed") else values


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(dim=1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return (functional.silu(gate.float()) * up.float()).to(gate_up.dtype)


@cache
def _fused(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operation as one loop; step by step it is 3 to 8 times slower both ways in bf16 on a CPU."""
    return torch.compile(operation, dynamic=True)


def _head(x: Tensor, head: nn.Linear) -> Tensor:
    return functional.linear(x, head.weight.to(x.dtype), head.bias.to(x.dtype))


def _by_place(characters: Tensor, grid: int) -> Tensor:
    """(n, 32, 64) -> (n·grid²·cells,): row after row of places, and in each row after row of cells."""
    n, high, wide = characters.shape[0], characters.shape[1] // grid, characters.shape[2] // grid
    return characters.reshape(n, grid, high, grid, wide).transpose(2, 3).reshape(-1).long()


def _reading(logits: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and how many written cells are right. Most cells are empty: they count little, so reading is learned."""
    logits = logits.reshape(-1, len(CHARACTERS)).float()
    losses = functional.cross_entropy(logits, cells, reduction="none")
    written = cells > 0
    loss = losses[written].sum() / written.sum().clamp(min=1) + 2.0 * losses[~written].mean()
    return loss, ((logits.argmax(dim=1) == cells) & written).sum()


def _initial(name: str, shape: tuple[int, ...], embedding_rms: float) -> Tensor:
    last = name.rsplit(".", 1)[-1]
    if last == "pos_embed":
        return 0.5 * _waves(round(shape[-2] ** 0.5), shape[-1]).reshape(shape)
    if len(shape) == 1:
        norm = ".norm" in name or name.startswith("mlp1.0.")
        return torch.ones(shape) if norm and last == "weight" else torch.zeros(shape)
    scale = 0.02 if last == "token" else shape[-1] ** -0.5
    if name.endswith(("attn.proj.weight", "fc2.weight")):
        scale *= 0.3
    if name == "mlp1.3.weight":
        scale *= 1.7 * embedding_rms
    return torch.randn(shape) * scale


def _waves(grid: int, width: int) -> Tensor:
    """(grid², width): sines and cosines of row and column, so that neighbours are alike before anything is learned."""
    speeds = 50.0 ** -(torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.reshape(-1, 1) * speeds for place in (row, column)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
