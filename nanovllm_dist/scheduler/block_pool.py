"""BlockPool: who holds which KV block, and in what order free blocks are reused. Every operation is O(1) a block.

Block 0 is never handed out: padding rows and tokens that must not be written point at it. A free block keeps
its content, and its place in the prefix cache, until it is reused, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

NULL_BLOCK = 0


class BlockPool:
    """Reference counts over `num_blocks` blocks; `on_reuse(block)` is told when a free block's content goes."""

    def __init__(self, num_blocks: int, on_reuse: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self._on_reuse = on_reuse
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Blocks there are, the null block left out."""
        return self.num_blocks - 1

    def is_free(self, block: int) -> bool:
        """Whether nobody holds `block`."""
        return self._refs[block] == 0

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each held once. The caller has checked `num_free`."""
        if count > len(self._free):
            raise AssertionError(f"{count} blocks asked, {len(self._free)} free: the caller must check first")
        blocks = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            self._refs[block] = 1
            self._on_reuse(block)
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks once more, free or not; their content stays."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def release(self, blocks: list[int], keep: Callable[[int], bool]) -> None:
        """Let go of a block table. The end of a chain is reused before its beginning, and blocks for which
        `keep` is false (nothing cached in them) before all others."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if not keep(block):
                    self._free.move_to_end(block, last=False)

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Assert that `tables` are exactly what the counts say. For tests and idle moments."""
        expected = [0] * self.num_blocks
        for table in tables:
            for block in table:
                expected[block] += 1
        assert expected == self._refs, "reference counts differ from the block tables"
        assert expected[NULL_BLOCK] == 0, "the null block was handed out"
        assert set(self._free) == {b for b in range(1, self.num_blocks) if self._refs[b] == 0}, "free list is wrong"
