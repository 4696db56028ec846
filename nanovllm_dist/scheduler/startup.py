"""Startup: how far each rank is between its first message and readiness. Pure bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass

# In this order every rank passes through them
PHASES = ("start", "connect", "load", "profile", "warmup", "ready")


@dataclass
class RankState:
    """One rank: its phase, how much of it is done, and the blocks it can hold once measured."""

    phase: str = "start"
    done: int = 0
    total: int = 0
    num_blocks: int = 0
    said_hello: bool = False


class Startup:
    """The ranks of one engine while they start."""

    def __init__(self, world_size: int) -> None:
        self.ranks = [RankState() for _ in range(world_size)]

    def progress(self, rank: int, phase: str, done: int, total: int) -> None:
        """A rank reports; an unknown phase is ignored."""
        if phase in PHASES:
            state = self.ranks[rank]
            state.phase, state.done, state.total = phase, done, total

    def slowest(self) -> RankState:
        """The rank that the others wait for."""
        return min(self.ranks, key=lambda rank: (PHASES.index(rank.phase), rank.done))

    @property
    def all_said_hello(self) -> bool:
        """Whether every rank has connected."""
        return all(rank.said_hello for rank in self.ranks)

    @property
    def num_blocks(self) -> int:
        """The minimum of what all ranks measured; 0 until the last has."""
        return min(rank.num_blocks for rank in self.ranks)

    @property
    def all_ready(self) -> bool:
        """Whether every rank waits for steps."""
        return all(rank.phase == "ready" for rank in self.ranks)
