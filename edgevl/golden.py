"""A prompt whose continuation is known, kept in the bundle: the check against silent garbage.

`deploy.build` makes it once with the finished bundle; the engine repeats it at the first load on a machine. The known
tokens are fed in one step (no generation), so that a near-tie between two tokens cannot fail a good backend: each must
be within `_MARGIN` of the best logit, and its log-probability within `_TOLERANCE` of the recorded one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgevl.bundle import Golden
from edgevl.config import ModelConfig
from edgevl.errors import BundleError
from edgevl.prefill import feed
from edgevl.runner import F32, Runner

_LENGTH = 8  # tokens
_MARGIN = 0.5  # logits
_TOLERANCE = 0.25  # nats


def golden_tile(config: ModelConfig) -> NDArray[np.uint8]:
    """One tile (1, S, S, 3) from integer arithmetic: bars, a ramp and a checkerboard, the same on every machine."""
    assert config.vision is not None
    side = config.vision.tile_size
    y, x = np.mgrid[0:side, 0:side]
    planes = [(x * 255) // side, ((y // 16) % 2) * 200 + 20, (((x // 8) + (y // 8)) % 2) * 255]
    return np.stack(planes, axis=-1).astype(np.uint8)[None]


def make_golden(runner: Runner, config: ModelConfig, text: list[int]) -> Golden:
    """Continue `text` (ids of a plain sentence; a tile goes in front where the model sees) by greedy choice."""
    images = _images(runner, config)
    prompt = [-1 - r for r in range(0 if images is None else len(images))]
    prompt = [*prompt, *text]
    tokens: list[int] = []
    logits = feed(runner, prompt, 0, images, 1)
    while True:
        tokens.append(int(np.argmax(logits[0, : config.tokens.size])))
        if len(tokens) == _LENGTH:
            break
        logits = feed(runner, tokens[-1:], len(prompt) + len(tokens) - 1, None, 1)
    tiles = 0 if images is None else 1
    found = _logprobs(runner, config, prompt, tokens, images)[0]
    return Golden(tuple(prompt), tuple(tokens), tuple(round(float(p), 4) for p in found), tiles)


def check_golden(runner: Runner, config: ModelConfig, golden: Golden) -> None:
    """Raise `BundleError` when this machine does not continue the golden prompt as the builder did."""
    images = _images(runner, config) if golden.tiles else None
    found, gaps = _logprobs(runner, config, list(golden.prompt), list(golden.tokens), images)
    drift = np.abs(found - np.asarray(golden.logprobs))
    if not np.all(np.isfinite(found)) or gaps.max() > _MARGIN or drift.max() > _TOLERANCE:
        worst = int(np.argmax(np.maximum(gaps / _MARGIN, drift / _TOLERANCE)))
        raise BundleError(
            f"the golden prompt came out differently on this machine ({runner.backend}): token {worst} has "
            f"log-probability {found[worst]:.3f}, the builder measured {golden.logprobs[worst]:.3f}; "
            "do not trust this bundle here, build it again or report it"
        )


def _images(runner: Runner, config: ModelConfig) -> F32 | None:
    return None if config.vision is None else runner.vision(golden_tile(config)).copy()


def _logprobs(
    runner: Runner, config: ModelConfig, prompt: list[int], tokens: list[int], images: F32 | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-probability of each of `tokens` after the prompt, and how far its logit is below the best."""
    logits = feed(runner, prompt + tokens[:-1], 0, images, len(tokens))[:, : config.tokens.size].astype(np.float64)
    best = logits.max(axis=1)
    chosen = logits[np.arange(len(tokens)), tokens]
    total = best + np.log(np.exp(logits - best[:, None]).sum(axis=1))
    return chosen - total, best - chosen
