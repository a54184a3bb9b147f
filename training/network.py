"""The trainable tensors and the operations to train them with, around float32 weights, on a CPU or a GPU.

Computes in bfloat16 where the processor has instructions for it, elsewhere in float32.

The model itself is `edgevl.models`, as everywhere; here are its parameters, the heads that only training has, and the
low-rank updates of the language model. Knows nothing of pictures, files or schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.rendered.picture import CELL, CHARACTERS, COLOUR_NAMES, PATCH, THINGS
from edgevl.config import ModelConfig, TextConfig, VisionConfig
from edgevl.demo import IMAGE_TOKENS, eye_shapes
from edgevl.models.decoder import decoder
from edgevl.models.names import text_parts, vision_parts
from edgevl.models.vision import image_embeddings
from edgevl.ops import Linear, Norm, Step
from quantize.part_tensors import CheckpointParts, JoinedTensors
from quantize.torch_ops import NamedLinear, TorchOps, coarse_pays, written_attention
from training.feed import SLOTS
from training.writing import Labels, Window, Writing

# what `Eyes.dense_loss` counts: characters off the patches, off the image tokens; things; colours
MEASURED = ("characters", "written", "things", "colours")
_CELLS = (PATCH // CELL[0]) * (PATCH // CELL[1])  # character cells in a patch
_SPEEDS = 16  # of the waves that tell positions, along each axis
_SHARP = 6.0  # how much a head prefers its offset to that beside it, at first
# rows down and columns to the right that the heads of each block look at first
_OFFSETS = (
    *(((0, -1), (0, 1), (-1, 0), (1, 0)), ((0, -1), (0, 1), (-1, 0), (1, 0)), ((0, -2), (0, 2), (-1, 0), (1, 0))),
    *(((0, -1), (0, 1), (-2, 0), (2, 0)), ((0, -3), (0, 3), (-1, 0), (1, 0)), ((0, -2), (0, 2), (-3, 0), (3, 0))),
)
_ADAPTED = ("qkv", "o", "gate_up", "down")


class Eyes(nn.Module):
    """Tower and projector under their checkpoint names, and the heads that read labels off them."""

    def __init__(self, config: ModelConfig, writing: Writing) -> None:
        super().__init__()
        assert config.vision is not None and config.projector is not None
        self.config, self._writing = config, (writing,)  # in a tuple: its codes are not the tower's to change
        self._names = {}
        for name, shape in eye_shapes(config.text.hidden_size).items():
            if "input_conditioner" in name:
                continue
            self._names[name] = name.replace(".", "/")
            self.register_parameter(self._names[name], nn.Parameter(_initial(name, shape, config.vision, writing.rms)))
        self.character_head = nn.Linear(config.vision.hidden_size, _CELLS * len(CHARACTERS))
        self.thing_head = nn.Linear(config.vision.hidden_size, len(THINGS))
        self.colour_head = nn.Linear(config.vision.hidden_size, len(COLOUR_NAMES))
        self.nothing_head = nn.Parameter(torch.zeros(SLOTS))
        self._parts = JoinedTensors(vision_parts(config), _Named(self))

    def tensors(self) -> dict[str, Tensor]:
        """What ships, by checkpoint name."""
        return {**self._own()}

    def _own(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(own) for name, own in self._names.items()}

    def matrices(self) -> list[nn.Parameter]:
        """The tower's, without positions and the class tokens."""
        own = self._own().items()
        return [p for name, p in own if p.dim() == 2 and name.startswith("vision") and not name.endswith("token")]

    def forward(self, pixels: Tensor, windows: Sequence[Window] | None = None) -> tuple[Tensor, Tensor]:
        """Tiles (n, S, S, 3) uint8 -> image tokens (n·P/4, C) and the tower's patches (n·P, tower width).

        With `windows`, all of one size, `pixels` are those parts of tiles.
        """
        assert self.config.vision is not None and self.config.projector is not None
        vision = self.config.vision
        if windows:
            vision = replace(vision, tile_size=pixels.shape[1])
        ops = TrainingOps(self._parts, windows=windows)
        rows = image_embeddings(ops, vision, self.config.projector, pixels)
        assert ops.patches_seen is not None
        return rows, ops.patches_seen

    def dense_loss(self, rows: Tensor, patches: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Loss of reading the labels off what `forward` gave, and (right, all) of each of `MEASURED`.

        Characters, things and colours are read off the patches; image tokens must be what `Writing` wants.
        """
        normed = functional.layer_norm(patches, (patches.shape[1],))
        cells = _by_place(labels.characters, labels.things.shape[1])
        loss, right = _reading(_head(normed, self.character_head), cells)
        counts = [right, (cells > 0).sum()]
        apart, right, written = self._writing[0].loss(rows, labels, self.nothing_head)
        loss = loss + apart
        counts += [right, written]
        things, colours = labels.things.reshape(-1).long(), labels.colours.reshape(-1).long()
        for wanted, head in ((things, self.thing_head), (colours, self.colour_head)):
            guess = _head(normed, head).float()
            losses = functional.cross_entropy(guess, wanted, reduction="none")
            some = wanted > 0
            loss = loss + 0.5 * (_mean(losses, some) + _mean(losses, ~some))
            counts += [((guess.argmax(dim=1) == wanted) & some).sum(), some.sum()]
        return loss, torch.stack(counts).detach()


class Reader(nn.Module):
    """The frozen language model with trainable low-rank updates, under the model's own part names."""

    def __init__(self, config: ModelConfig, weights: CheckpointParts, rank: int, device: str) -> None:
        super().__init__()
        self.config = config
        table = weights("embed")[0][: config.tokens.size - len(IMAGE_TOKENS)].float()
        mean, spread = table.mean(dim=0), (table - table.mean(dim=0)).square().mean().sqrt()
        rows = mean + 0.05 * spread * torch.randn(len(IMAGE_TOKENS), len(mean))
        self.image_token_rows = nn.Parameter(rows)
        self._frozen: dict[str, Tensor] = {}
        for part in text_parts(config):
            self._frozen[part.name] = weights(part.name)[0].to(working_dtype(device)).to(device)
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

    def forward(self, step: Step[Tensor], mask: Tensor, updated: bool = True) -> Tensor:
        """Logits (L, V) of a regular batch; `mask` (B, 1, S, S) is added to the attention scores.

        The tied head knows the image tokens' rows too; unless `updated` it is the untouched model.
        """
        weights, updates = self._frozen, {}
        if updated:
            first = self.config.tokens.size - len(self.image_token_rows)
            head = weights["embed"].clone()
            head[first : self.config.tokens.size] = self.image_token_rows.detach().to(head.dtype)
            weights, updates = {**weights, "head": head}, self.updates()
        ops = TrainingOps(lambda name: (weights[name], None), updates, mask)
        return decoder(ops, self.config.text, step)


def working_dtype(device: str) -> torch.dtype:
    """Of activations and frozen weights."""
    return torch.bfloat16 if coarse_pays(device) else torch.float32


class TrainingOps(TorchOps):
    """`TorchOps` with low-rank updates and with an attention mask in the place of plain causality."""

    def __init__(
        self,
        weights: object,
        updates: dict[str, tuple[Tensor, Tensor]] | None = None,
        mask: Tensor | None = None,
        windows: Sequence[Window] | None = None,
    ) -> None:
        super().__init__(weights, 1 if mask is None else mask.shape[-1])  # type: ignore[arg-type]
        self._updates, self._mask, self._windows = updates or {}, mask, windows
        self.patches_seen: Tensor | None = None  # (n·P, width), the tower's output without its prefix

    def pixel_shuffle(self, x: Tensor, grid: int, prefix: int) -> Tensor:
        tiles = x.reshape(-1, prefix + grid * grid, x.shape[1])
        self.patches_seen = tiles[:, prefix:].reshape(-1, x.shape[1])
        return super().pixel_shuffle(x, grid, prefix)

    def vision_tokens(self, x: Tensor, positions: Tensor, prefix: Tensor) -> Tensor:
        if self._windows is None:
            return super().vision_tokens(x, positions, prefix)
        grid = round(len(positions) ** 0.5)
        square = positions.reshape(grid, grid, -1).to(x.dtype)
        parts = [w.of(square, grid // 2) for w in self._windows]
        tiles = x.reshape(len(parts), -1, x.shape[1]) + torch.stack([part.flatten(0, 1) for part in parts])
        front = prefix.to(x.dtype).expand(len(parts), -1, -1)
        return torch.cat([front, tiles], dim=1).reshape(-1, x.shape[1])

    def patches(self, pixels: Tensor, patch_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return super().patches(pixels, patch_size, mean, std).to(working_dtype(pixels.device.type))

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
    loss = _mean(losses, written) + 2.0 * _mean(losses, ~written)
    return loss, ((logits.argmax(dim=1) == cells) & written).sum()


def _mean(losses: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the chosen ones; 0 of none."""
    return losses[chosen].sum() / chosen.sum().clamp(min=1)


def _initial(name: str, shape: tuple[int, ...], config: VisionConfig, embedding_rms: float) -> Tensor:
    """Random, but the tower begins as a convolution: each head looks at one neighbour of every patch.

    Positions have numbers of their own in the residual stream, which nothing else writes to at first; queries and keys
    compare them, the query's moved by the head's offset.
    """
    last = name.rsplit(".", 1)[-1]
    if last == "pos_embed":
        return _waves(round(shape[-2] ** 0.5), shape[-1]).reshape(shape)
    if len(shape) == 1:
        norm = ".norm" in name or name.startswith("mlp1.0.")
        return torch.ones(shape) if norm and last == "weight" else torch.zeros(shape)
    values = torch.randn(shape) * (0.02 if last == "token" else shape[-1] ** -0.5)
    if name.endswith(("attn.proj.weight", "fc2.weight")):
        values *= 0.3
    if name.endswith(("attn.proj.weight", "fc2.weight", "embedder.weight")):
        values[: 4 * _SPEEDS] = 0
    if name.endswith("attn.qkv.weight"):
        block, size = int(name.split(".blocks.")[1].split(".")[0]), shape[1] // config.heads
        for head in range(config.heads):
            query, key = _glance(_OFFSETS[block % len(_OFFSETS)][head % 4], size, shape[1])
            for i, part in enumerate((query, key)):
                begin = i * shape[1] + head * size
                values[begin : begin + size] = part + 0.1 * values[begin : begin + size]
    if name == "mlp1.3.weight":
        values *= 1.7 * embedding_rms
    return values


def _waves(grid: int, width: int) -> Tensor:
    """(grid², width): sines and cosines of row, then of column; nothing in the other numbers."""
    angles = torch.arange(grid)[:, None] * _speeds()
    wave = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
    rows, columns = wave.repeat_interleave(grid, 0), wave.repeat(grid, 1)
    return torch.cat([rows, columns, torch.zeros(grid * grid, width - 4 * _SPEEDS)], dim=1)


def _glance(offset: tuple[int, int], size: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows (size, width) for query and key of a head that looks `offset` rows down and columns to the right."""
    chosen = torch.linspace(0, _SPEEDS - 1, size // 4).round().long()
    query, key = torch.zeros(2, size, width)
    row = 0
    for axis, steps in enumerate(offset):
        for number in chosen.tolist():
            turn, at = float(_speeds()[number]) * steps, 2 * (axis * _SPEEDS + number)
            query[row, at], query[row, at + 1] = math.cos(turn), math.sin(turn)
            query[row + 1, at], query[row + 1, at + 1] = -math.sin(turn), math.cos(turn)
            key[row, at] = key[row + 1, at + 1] = 1.0
            row += 2
    # one step away, scores fall by _SHARP
    size_ = (_SHARP / float((1 - torch.cos(_speeds()[chosen])).sum())) ** 0.5 * size**0.25
    return query * size_, key * size_


def _speeds() -> Tensor:
    return 1.6 * (0.06 / 1.6) ** (torch.arange(_SPEEDS) / (_SPEEDS - 1))
