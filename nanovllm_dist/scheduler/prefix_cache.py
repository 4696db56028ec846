"""PrefixCache: which block holds the keys and values of which prefix.

A full block is known by a hash chained over all tokens before it and a salt, so equal hashes mean equal
prefixes (128-bit BLAKE2b; no comparison of tokens is needed). It does not know who holds a block.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

_DIGEST_BYTES = 16


def extend_block_hashes(hashes: list[bytes], tokens: array[int], block_size: int, salt: str) -> None:
    """Append to `hashes` the chain over the full blocks of `tokens` that it does not cover yet."""
    parent = hashes[-1] if hashes else blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()
    for index in range(len(hashes), len(tokens) // block_size):
        content = tokens[index * block_size : (index + 1) * block_size].tobytes()
        parent = blake2b(parent + content, digest_size=_DIGEST_BYTES).digest()
        hashes.append(parent)


class PrefixCache:
    """A one-to-one map between hashes and blocks."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    def match(self, hashes: list[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of the chain."""
        blocks = []
        for value in hashes:
            block = self._block_of.get(value)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def register(self, value: bytes, block: int) -> None:
        """Offer a block whose content is written by a step already planned; an equal one found first stays."""
        if value not in self._block_of and block not in self._hash_of:
            self._block_of[value] = block
            self._hash_of[block] = value

    def holds(self, block: int) -> bool:
        """Whether `block` can still be found."""
        return block in self._hash_of

    def forget(self, block: int) -> None:
        """The block's content is about to be overwritten."""
        value = self._hash_of.pop(block, None)
        if value is not None:
            del self._block_of[value]

    def check_integrity(self) -> None:
        """Assert that both directions agree."""
        assert {block: value for value, block in self._block_of.items()} == self._hash_of
