"""The torch implementation of `edgevl.ops`: eager, f32, on CPU or CUDA, differentiable.

Runs the same model code as every other implementation (`edgevl.models`). Made for calibration and training: a step is
a regular batch of B sequences of S tokens, flattened to T = B·S, so attention is one causal call and no cache outlives
the block. Its linears may compute in bf16. Knows nothing of checkpoints: weights come by the model's own part names
(`quantize.part_tensors`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from edgevl.config import TextConfig
from edgevl.errors import UsageError
from edgevl.ops import Linear, Norm, Step
from edgevl.rope import inverse_frequencies

_WHOLE = 1024  # tokens of a sequence whose attention weights are held as one matrix, where that is faster

PartWeight = tuple[Tensor, Tensor | None]
Observer = Callable[[str, Tensor], None]  # part name, input (rows, K)


@dataclass(frozen=True)
class NamedLinear(Linear[Tensor]):
    """A linear that remembers which part it is, so that an observer can be told."""

    name: str = ""


def batch_step(tokens: Tensor, images: Tensor | None = None) -> Step[Tensor]:
    """The step of a regular batch: tokens (B, S) int, ids below zero pick rows of `images`; logits of all tokens."""
    batch, length = tokens.shape
    device = tokens.device
    return Step(
        tokens=tokens.reshape(-1),
        positions=torch.arange(length, device=device).repeat(batch),
        slots=torch.arange(batch, device=device).repeat_interleave(length),
        images=images,
        logit_rows=torch.arange(batch * length, device=device),
    )


def check_device(device: str) -> None:
    """Raise `UsageError` for a GPU that torch does not see."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda needs a GPU that torch can use, and it sees none; use --device cpu")


def coarse_pays(device: str) -> bool:
    """Whether products of bf16 matrices are faster than of f32 ones, by about four times: the processor knows them."""
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device != "cpu" or any(getattr(torch.cpu, name, bool)() for name in known)


class TorchOps:
    """`Ops` over torch tensors. `length` is S, the tokens of every sequence; `observe` sees each linear's input.

    `coarse`: linears and attention round what they read, their weights and outputs to bf16 (8 bits of precision); all
    else stays as it is.
    """

    def __init__(
        self,
        weights: Callable[[str], PartWeight],
        length: int,
        observe: Observer | None = None,
        coarse: bool = False,
    ) -> None:
        self._weights = weights
        self._length = length
        self._observe = observe
        self._coarse = coarse
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}  # of the block in hand: keys, values (B, G, S, D)
        self._turns: tuple[Tensor, Tensor] | None = None  # cos, sin (T, 1, D/2) of the last step
        self._turns_of: Tensor | None = None

    def linear_weight(self, name: str) -> Linear[Tensor]:
        weight, bias = self._weights(name)
        return NamedLinear(weight, bias, name)

    def norm_weight(self, name: str) -> Norm[Tensor]:
        return Norm(*self._weights(name))

    def table(self, name: str) -> Tensor:
        return self._weights(name)[0]

    def embed(self, tokens: Tensor, table: Tensor, images: Tensor | None) -> Tensor:
        tokens = tokens.reshape(-1).long()
        x = table[tokens.clamp(min=0)].float()
        if images is None:
            return x
        rows = images[(-1 - tokens).clamp(min=0)].to(x.dtype)
        return torch.where((tokens < 0)[:, None], rows, x)

    def rms_norm(self, x: Tensor, norm: Norm[Tensor], eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps) * norm.weight.to(x.dtype)

    def layer_norm(self, x: Tensor, norm: Norm[Tensor], eps: float) -> Tensor:
        assert norm.bias is not None, "layer norm has a bias"
        return functional.layer_norm(x, (x.shape[1],), norm.weight.to(x.dtype), norm.bias.to(x.dtype), eps)

    def linear(
        self, x: Tensor, layer: Linear[Tensor], activation: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if self._observe is not None and isinstance(layer, NamedLinear):
            self._observe(layer.name, x)
        dtype = torch.bfloat16 if self._coarse else x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        y = functional.linear(x.to(dtype), layer.weight.to(dtype), bias).to(x.dtype)
        if activation == "gelu":
            y = functional.gelu(y)
        elif activation is not None:
            raise ValueError(f"unknown activation {activation!r}")
        return y if residual is None else y + residual

    def rope_write(self, qkv: Tensor, step: Step[Tensor], layer: int, config: TextConfig) -> Tensor:
        h, g, d = config.heads, config.kv_heads, config.head_dim
        heads = qkv.reshape(-1, h + 2 * g, d)  # (T, H+2G, D)
        cos, sin = (turn.to(qkv.dtype) for turn in self._rotation(step.positions, config))
        first, second = heads[:, : h + g, : d // 2], heads[:, : h + g, d // 2 :]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2)
        self._cache = {layer: (self._by_sequence(turned[:, h:]), self._by_sequence(heads[:, h + g :]))}
        return turned[:, :h].reshape(-1, h * d)

    def attention(self, q: Tensor, step: Step[Tensor], layer: int, config: TextConfig) -> Tensor:
        keys, values = self._cache[layer]
        share = config.heads // config.kv_heads
        query = self._by_sequence(q.reshape(-1, config.heads, config.head_dim))  # (B, H, S, D)
        if self._coarse and self._length <= _WHOLE:
            return _coarse_attention(query, keys, values).transpose(1, 2).reshape(q.shape).to(q.dtype)
        if share > 1:
            keys, values = keys.repeat_interleave(share, dim=1), values.repeat_interleave(share, dim=1)
        out = functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
        return out.transpose(1, 2).reshape(q.shape)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return functional.silu(gate) * up

    def gather_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        return x[rows.reshape(-1).long()]

    def patches(self, pixels: Tensor, patch_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        n, side = pixels.shape[0], pixels.shape[1]
        grid = side // patch_size
        x = pixels.float() / 255.0
        x = (x - torch.tensor(mean, device=x.device)) / torch.tensor(std, device=x.device)
        x = x.reshape(n, grid, patch_size, grid, patch_size, 3).permute(0, 1, 3, 5, 2, 4)
        return x.reshape(n * grid * grid, 3 * patch_size**2)

    def vision_tokens(self, x: Tensor, positions: Tensor, prefix: Tensor) -> Tensor:
        count, width = positions.shape
        tiles = x.reshape(-1, count, width) + positions.to(x.dtype)
        front = prefix.to(x.dtype).expand(tiles.shape[0], -1, -1)
        return torch.cat([front, tiles], dim=1).reshape(-1, width)

    def full_attention(self, qkv: Tensor, heads: int, tokens: int) -> Tensor:
        width = qkv.shape[1] // 3
        q, k, v = qkv.reshape(-1, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)  # (n, H, tokens, D) each
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, width)

    def pixel_shuffle(self, x: Tensor, grid: int, prefix: int) -> Tensor:
        width, half = x.shape[1], grid // 2
        tiles = x.reshape(-1, prefix + grid * grid, width)[:, prefix:]
        tiles = tiles.reshape(-1, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)
        return tiles.reshape(-1, 4 * width)

    def _by_sequence(self, x: Tensor) -> Tensor:
        """(T, heads, D) -> (B, heads, S, D)."""
        return x.reshape(-1, self._length, x.shape[1], x.shape[2]).transpose(1, 2)

    def _rotation(self, positions: Tensor, config: TextConfig) -> tuple[Tensor, Tensor]:
        """cos and sin (T, 1, D/2) f32, from angles in f64; kept while the same step runs."""
        if self._turns is None or self._turns_of is not positions:
            frequencies = torch.from_numpy(inverse_frequencies(config)).to(positions.device)
            angles = positions.reshape(-1, 1).double() * frequencies
            self._turns = (angles.cos().float()[:, None, :], angles.sin().float()[:, None, :])
            self._turns_of = positions
        return self._turns


def written_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of queries (B, H, S, D) over keys and values (B, G, S, D), its weights written out; `mask` is added.

    In bf16 three times as fast as torch's fused one with its gradients on a CPU, and query heads share keys without
    copies.
    """
    batch, heads, length, size = query.shape
    rows = (query * size**-0.5).reshape(batch, keys.shape[1], -1, size)  # query heads of one KV head together
    scores = (rows @ keys.transpose(2, 3)).reshape(batch, heads, length, -1)
    weights = torch.softmax(scores if mask is None else scores + mask, dim=3)
    return (weights.reshape(*rows.shape[:3], -1) @ values).reshape(query.shape)


def _coarse_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention in bf16."""
    length = query.shape[2]
    later = torch.full((length, length), -torch.inf, dtype=torch.bfloat16, device=query.device).triu(1)
    return written_attention(query.bfloat16(), keys.bfloat16(), values.bfloat16(), later)
