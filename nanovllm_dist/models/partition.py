"""Which part of each dimension belongs to which rank, for any tensor-parallel degree. Pure arithmetic.

Key/value heads are dealt in contiguous runs with their query groups; when there are fewer of them than ranks,
a head is replicated and its query group is split among the ranks that hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm_dist.errors import ConfigError


def balanced_range(total: int, parts: int, index: int, unit: int = 1) -> tuple[int, int]:
    """The `index`-th of `parts` contiguous runs of `total`, in multiples of `unit` where that leaves none empty.

    Runs differ by at most one unit; the first ones are the longer. Returns (start, end).
    """
    if unit > 1 and (total % unit or total // unit < parts):
        unit = 1
    units = total // unit
    size, extra = divmod(units, parts)
    start = index * size + min(index, extra)
    end = start + size + (1 if index < extra else 0)
    return start * unit, end * unit


@dataclass(frozen=True)
class HeadRange:
    """Heads of one rank: query heads [q_start, q_end) attend to key/value heads [kv_start, kv_end)."""

    q_start: int
    q_end: int
    kv_start: int
    kv_end: int

    @property
    def num_heads(self) -> int:
        """Query heads on this rank."""
        return self.q_end - self.q_start

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads on this rank."""
        return self.kv_end - self.kv_start


def split_heads(num_heads: int, num_kv_heads: int, world_size: int, rank: int) -> HeadRange:
    """The heads of `rank`. Every rank's query heads form equal groups over its key/value heads.

    Raises:
        ConfigError: there are more ranks than a split into at least one query head each allows.
    """
    group = num_heads // num_kv_heads
    if world_size <= num_kv_heads:
        kv_start, kv_end = balanced_range(num_kv_heads, world_size, rank)
        return HeadRange(kv_start * group, kv_end * group, kv_start, kv_end)
    for head in range(num_kv_heads):
        first, last = balanced_range(world_size, num_kv_heads, head)
        if first <= rank < last:
            if last - first > group:
                break
            q_start, q_end = balanced_range(group, last - first, rank - first)
            return HeadRange(head * group + q_start, head * group + q_end, head, head + 1)
    raise ConfigError(
        f"tensor_parallel_size={world_size} is too many for {num_heads} query heads over {num_kv_heads} "
        f"key/value heads: at most {num_heads} ranks"
    )
