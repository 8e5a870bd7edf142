"""Noise that nobody can foresee: normal numbers from the system's cryptographic generator.

Each is the half sum of four, so that the gaps between floating-point numbers do not give away what was added (Mironov,
2012; the remedy is that of Holohan and Braghin, "Secure random sampling in differential privacy", 2021).
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

_SUMMANDS = 4
_BITS = 53
"""Of a uniform number; its ends, 0 and 1, are left out."""


def gaussian(shape: tuple[int, ...], entropy: int | None = None) -> NDArray[np.float64]:
    """Return independent numbers of N(0, 1), float64 of this shape.

    Given   entropy: a seed, for tests and benchmarks alone: who knows it can take the noise off; None: the system's
    """
    count = (_SUMMANDS, int(np.prod(shape, dtype=np.int64)))
    if entropy is not None:
        drawn = np.random.default_rng(entropy).standard_normal(count)
    else:
        from scipy.special import ndtri

        whole = np.frombuffer(os.urandom(8 * count[0] * count[1]), dtype=np.uint64) >> np.uint64(64 - _BITS)
        drawn = ndtri((whole + 0.5) / 2.0**_BITS).reshape(count)
    made: NDArray[np.float64] = (drawn.sum(0) / np.sqrt(_SUMMANDS)).reshape(shape)
    return made
