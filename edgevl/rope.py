"""The inverse frequencies of rotary position embedding, Llama-3.1's scaling included.

Knows the formula; knows nothing of positions, layouts or devices. The reference and every backend read it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgevl.config import TextConfig


def inverse_frequencies(config: TextConfig) -> NDArray[np.float64]:
    """(D/2,) f64: radians per position of each rotated pair, theta^(-2d/D).

    With Llama-3.1 scaling, wavelengths longer than original/low_freq_factor are stretched by `factor`, those shorter
    than original/high_freq_factor are kept, and the ones between are blended linearly in original/wavelength.
    Source: Su et al. 2021 (arXiv 2104.09864); Llama 3 herd of models (arXiv 2407.21783) and its rope_type "llama3".
    """
    frequencies: NDArray[np.float64] = config.rope_theta ** (
        -np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    )
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # full turns over the original context
    spread = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / spread, 0.0, 1.0)  # 0: stretched, 1: kept
    blended: NDArray[np.float64] = frequencies * (keep + (1.0 - keep) / scaling.factor)
    return blended
