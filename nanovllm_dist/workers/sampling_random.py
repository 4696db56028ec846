"""Counter-based random numbers: one uniform for each (seed, position), as exact integers on the host.

The stream of a seed is SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014),
entered at `position`; the seed is mixed once first, so that neighbouring seeds start far apart. Nothing is kept
between calls, so a draw does not depend on device, batch, rank count or on what was drawn before.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_TO_53_BITS = np.uint64(11)


def splitmix64(state: NDArray[np.uint64], index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Output number `index` (0 is the first) of the SplitMix64 generators started at `state`. Both uint64 [R]."""
    bits = state + (index + np.uint64(1)) * _GAMMA
    bits = (bits ^ (bits >> _SHIFT_1)) * _MIX_1
    bits = (bits ^ (bits >> _SHIFT_2)) * _MIX_2
    mixed: NDArray[np.uint64] = bits ^ (bits >> _SHIFT_3)
    return mixed


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Multiples of 2**-53 in [0, 1), one for each pair of `seeds` uint64 [R] and `positions` int64 [R] >= 0."""
    start = splitmix64(seeds, np.zeros_like(seeds))
    bits = splitmix64(start, positions.astype(np.uint64))
    return (bits >> _TO_53_BITS).astype(np.float64) * 2.0**-53
