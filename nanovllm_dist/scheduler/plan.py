"""What one call of the scheduler decides, and what one committed step gave. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from nanovllm_dist.scheduler.request import Request
from nanovllm_dist.wire import messages


class Row(NamedTuple):
    """One request's part of a step: `num_tokens` of it; `samples` if its last known token is among them."""

    request: Request
    slot: int
    num_tokens: int
    samples: bool
    incarnation: int


@dataclass
class StepPlan:
    """An ordered step: rows of one token first. `admitted` enter with their whole state, `grow_slots` get blocks.

    While the step is made, its longer rows wait in `chunks`.
    """

    step: int
    rows: list[Row] = field(default_factory=list)
    chunks: list[Row] = field(default_factory=list)
    admitted: list[messages.NewRow] = field(default_factory=list)
    grow_slots: list[int] = field(default_factory=list)
    grow_blocks: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens run by this step."""
        return sum(row.num_tokens for row in self.rows)

    def to_message(self, epoch: int) -> messages.Step:
        """The plan as it goes to every worker."""
        return messages.Step(
            epoch=epoch,
            step=self.step,
            slots=messages.pack_ints([row.slot for row in self.rows]),
            counts=messages.pack_ints([row.num_tokens for row in self.rows]),
            grow_slots=messages.pack_ints(self.grow_slots),
            grow_blocks=messages.pack_ints(self.grow_blocks),
            new_rows=self.admitted,
        )


@dataclass
class Committed:
    """New tokens of a step, in its order, and the requests that they ended."""

    tokens: list[tuple[Request, int]] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)


@dataclass
class SchedulerStats:
    """Counters since start."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=dict)
