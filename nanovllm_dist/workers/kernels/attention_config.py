"""How the paged attention kernels cut their work. Results depend on `segment`, `max_segments` and `tile`, so figures
are fixed and never tuned at run time: two runs must cut alike. Which figures are good is said beside the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeConfig:
    """How the work is cut.

    Attributes:
        segment: keys of a segment in rows of at most segment * max_segments keys; a multiple of `tile`.
        max_segments: most segments of a row; longer rows have segments of a multiple of `segment` keys.
        tile: keys loaded at a time. One block-table entry serves a tile if it divides the block size.
        num_warps, num_stages: of the kernel; num_stages - 1 tiles are being loaded while one is worked on.
    """

    segment: int
    max_segments: int
    tile: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PrefillConfig:
    """Lines and keys of a tile, and the kernel's shape; see `DecodeConfig`. `queries` >= heads of a group."""

    queries: int
    tile: int
    num_warps: int
    num_stages: int
