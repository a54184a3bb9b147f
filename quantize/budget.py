"""What a run needs, computed before it starts: bytes of memory and of disk. It fits or it is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from edgevl.checkpoint import Checkpoint
from edgevl.config import TextConfig
from edgevl.errors import UsageError
from quantize.groups import block_table
from quantize.measure import HELD_OUT, LOGITS
from quantize.observe import SAMPLE_TOKENS
from quantize.pages import KEPT
from quantize.partial import Partial
from quantize.reconstruct import STEP_TOKENS
from quantize.self_text import memory_needed
from quantize.settings import QuantizeSettings
from quantize.torch_ops import coarse_pays

_AT_EASE = 160 << 20  # bytes of activations in flight when the user sets no limit; more is no faster
_SMALL_FILES = 20 << 20  # bytes: tokenizer, report, and what lies beside a checkpoint
_LIBRARIES = (64 << 20) + 3 * KEPT // 2  # bytes that torch and the rest take when first used; freed ones, and holes
_LOGIT_COPIES = 6  # f64 rows of logits and what is computed from them
_COPIES = 6  # f32 copies of the widest linear that the search and its temporaries hold at once


def sequences_at_once(config: TextConfig, settings: QuantizeSettings) -> int:
    """How many sequences go through a block together within `max_memory`; at least 1, or `UsageError`."""
    fixed, each = _needs(config, settings)
    at_ease = max(1, min(settings.samples, _AT_EASE // each))
    if settings.max_memory is None:
        return at_ease
    needs = {
        "lower --samples": fixed + each,
        "lower --samples, or choose --effort fast": _reconstructing(config, settings),
        "add --no-measure": _scoring(config, settings),
    }
    way = max(needs, key=lambda way: needs[way])
    if needs[way] > settings.max_memory:
        raise UsageError(
            f"--max-memory {_size(settings.max_memory)} is too little: one block of this model, its search and the "
            f"hidden states of {settings.samples} sequences need {_size(needs[way])}; raise it, or {way}"
        )
    return max(1, min(at_ease, (settings.max_memory - fixed) // each))


def estimate(config: TextConfig, settings: QuantizeSettings) -> int:
    """Bytes that a run holds at most beside the interpreter and mapped files."""
    fixed, each = _needs(config, settings)
    others = _reconstructing(config, settings), _scoring(config, settings)
    return max(fixed + sequences_at_once(config, settings) * each, *others)


def _needs(config: TextConfig, settings: QuantizeSettings) -> tuple[int, int]:
    """Bytes for a block whatever goes through it, and for each sequence in it."""
    c, f, qkv = config.hidden_size, config.intermediate_size, config.qkv_size
    block, search = _block(config) * 4, _COPIES * 2 * f * c * 4
    fixed = _LIBRARIES + _held(config, settings) + 2 * block + search + SAMPLE_TOKENS * (3 * c + f) * 4
    length = max(settings.length, min(512, config.max_positions) if settings.measure else 0)
    return fixed, length * (7 * f + 3 * qkv + 8 * c) * 4


def _block(config: TextConfig) -> int:
    """Weights of a block's linears."""
    c, f = config.hidden_size, config.intermediate_size
    return (config.qkv_size + config.heads * config.head_dim + 3 * f) * c


def _learning(config: TextConfig, settings: QuantizeSettings, tokens: int) -> int:
    """Codes, places, weights and slopes of a block, copies of one linear, and what a step keeps of its tokens."""
    c, f, qkv = config.hidden_size, config.intermediate_size, config.qkv_size
    item = 2 if coarse_pays(settings.device) else 4
    attention = config.heads * settings.length * 2 if item == 2 else 0  # its weights, kept for their slopes
    return _block(config) * (5 + 2 * item) + 7 * f * c * 4 + tokens * ((8 * f + 3 * qkv + 8 * c) * 4 + attention)


def _reconstructing(config: TextConfig, settings: QuantizeSettings) -> int:
    """A block before and after rounding, or while it learns."""
    if not settings.chosen.reconstruct:
        return 0
    step = min(settings.samples * settings.length, max(STEP_TOKENS, settings.length))
    begin = 10 * _block(config) + 4 * config.intermediate_size * config.hidden_size * 4
    return _LIBRARIES + _held(config, settings) + max(begin, _learning(config, settings, step))


def _held(config: TextConfig, settings: QuantizeSettings) -> int:
    """Hidden states of the calibration, once for each path, and of the held-out text, twice."""
    row = config.hidden_size * 4
    judged = 2 * HELD_OUT * min(512, config.max_positions) * row if settings.measure else 0
    return min(settings.paths * settings.samples * settings.length * row, settings.max_activations) + judged


def _scoring(config: TextConfig, settings: QuantizeSettings) -> int:
    """The head in f32 and the logits of some rows of both models, in f64."""
    if not settings.measure:
        return 0
    head = config.vocab_size * config.hidden_size * 4
    return _LIBRARIES + _held(config, settings) + head + _LOGIT_COPIES * LOGITS * config.vocab_size * 8


def check_disk(checkpoint: Checkpoint, out: Path, settings: QuantizeSettings) -> None:
    """Raise `UsageError` when the output and the unfinished run beside it would not fit on the disk."""
    total = sum(checkpoint.spec(name).nbytes for name in checkpoint.names())
    t = checkpoint.config.text
    linears = t.layers * (t.qkv_size + t.heads * t.head_dim + 3 * t.intermediate_size) * t.hidden_size
    down = checkpoint.spec(f"{block_table(checkpoint.config, 0).linears[-1]}.weight")
    item = down.nbytes // (t.hidden_size * t.intermediate_size)
    packed = int(linears * 0.6)  # codes, and scales and zeros of groups of 32 at most
    # before a block, after it, and in hand
    hidden = settings.paths * settings.samples * settings.length * t.hidden_size * 4
    judged = 4 * HELD_OUT * min(512, t.max_positions) * t.hidden_size * 4 if settings.measure else 0
    copies = 2 if hidden <= settings.max_activations else 3
    needed = total - linears * item + 2 * packed + copies * hidden + judged + _SMALL_FILES
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    kept = Partial(out).size() if settings.resume else 0  # of an unfinished run, part of what is needed
    free = shutil.disk_usage(folder).free
    if free + kept < needed:
        raise UsageError(
            f"{folder} has {_size(free)} free, and the run needs up to {_size(needed)}; "
            "free some space or write elsewhere"
        )


def check_writing(checkpoint: Checkpoint, settings: QuantizeSettings) -> None:
    """Raise `UsageError` when the model is too large to write its own calibration text: it writes from memory."""
    needed = memory_needed(checkpoint, settings.samples, settings.length)
    limit = settings.max_memory
    if limit is None and settings.device == "cpu":
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if limit is not None and needed > limit:
        raise UsageError(
            f"--calibration self holds the whole model in memory, {_size(needed)}, and there is {_size(limit)}; "
            "use another set"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
