"""A stand-in for the workers, as strict as they are: it runs plans over an imaginary cache and checks every read.

Each block remembers which (prefix, token) was written at each offset; a row may only read what its own prefix
wrote. The "model" samples a token from the whole prefix, so any wrong block shows as a wrong token.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from hashlib import blake2b

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.scheduler.plan import Committed, StepPlan
from nanovllm_dist.scheduler.request import Request
from nanovllm_dist.scheduler.scheduler import Scheduler
from nanovllm_dist.wire.messages import Step, decode_to_worker, encode, unpack_ints

VOCAB = 50
EOS = 7


def next_token(prefix: list[int], salt: str = "") -> int:
    """The imaginary model: a token that depends on every token before it."""
    digest = blake2b(array("i", prefix).tobytes() + salt.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB


def expected_output(prompt: list[int], params: SamplingParams, limit: int) -> list[int]:
    """What a request must give, whatever it is batched with."""
    tokens = list(prompt)
    total = min(limit, len(prompt) + (params.max_tokens or limit))
    while len(tokens) < total:
        tokens.append(next_token(tokens))
        if (tokens[-1] == EOS and not params.ignore_eos) or tokens[-1] in params.stop_token_ids:
            break
    return tokens[len(prompt) :]


def make_config(**options: object) -> EngineConfig:
    """A resolved config for the scheduler, small by default."""
    values: dict[str, object] = {
        "model": "simulated",
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_model_len": 64,
        "max_steps_in_flight": 1,
    }
    return EngineConfig(**(values | options))  # type: ignore[arg-type]


def make_scheduler(num_blocks: int = 40, **options: object) -> Scheduler:
    """A scheduler over `num_blocks` blocks (the null block included)."""
    return Scheduler(make_config(**options), num_blocks, VOCAB, [EOS])


@dataclass
class WorkerRow:
    """What a worker keeps of one slot."""

    tokens: list[int]
    num_computed: int
    num_cached: int
    blocks: list[int]


@dataclass
class SimulatedWorker:
    """Applies steps as they come over the wire and returns the sampled tokens."""

    block_size: int
    budget: int
    content: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)  # (block, offset) -> its prefix
    rows: dict[int, WorkerRow] = field(default_factory=dict)

    def run(self, frame: bytes) -> list[int]:
        """Run one encoded step; AssertionError where a real cache would be read or written wrongly."""
        step = decode_to_worker(frame)
        assert isinstance(step, Step)
        for new in step.new_rows:
            self.rows[new.slot] = WorkerRow(
                unpack_ints(new.tokens), new.num_computed, new.num_cached, unpack_ints(new.blocks)
            )
        for slot, block in zip(unpack_ints(step.grow_slots), unpack_ints(step.grow_blocks), strict=True):
            self.rows[slot].blocks.append(block)
        slots, counts = unpack_ints(step.slots), unpack_ints(step.counts)
        assert len(set(slots)) == len(slots), "a slot stands twice in a step"
        assert sum(counts) <= self.budget, "the token budget is passed"
        assert sorted(counts, key=lambda count: count > 1) == counts, "decodes must come first"
        for slot, count in zip(slots, counts, strict=True):  # all writes of a layer precede its reads
            self._write(self.rows[slot], count)
        return [
            token for slot, count in zip(slots, counts, strict=True) for token in self._read(self.rows[slot], count)
        ]

    def _write(self, row: WorkerRow, count: int) -> None:
        for position in range(row.num_computed, row.num_computed + count):
            if position >= row.num_cached:
                self.content[self._place(row, position)] = tuple(row.tokens[: position + 1])

    def _read(self, row: WorkerRow, count: int) -> list[int]:
        end = row.num_computed + count
        for position in range(end):
            found = self.content.get(self._place(row, position))
            assert found == tuple(row.tokens[: position + 1]), f"position {position} reads another request's content"
        row.num_computed = end
        if end < len(row.tokens):
            return []
        token = next_token(row.tokens)
        row.tokens.append(token)
        return [token]

    def _place(self, row: WorkerRow, position: int) -> tuple[int, int]:
        block = row.blocks[position // self.block_size]
        assert block != 0, "the null block is read or written"
        return block, position % self.block_size


class Simulation:
    """A scheduler and a worker, with up to `max_steps_in_flight` steps between them; checks after every call."""

    def __init__(self, num_blocks: int = 40, **options: object) -> None:
        self.scheduler = make_scheduler(num_blocks, **options)
        config = make_config(**options)
        self.worker = SimulatedWorker(config.block_size, config.max_num_batched_tokens)
        self.plans: list[StepPlan] = []
        self.ended: list[Request] = []
        self._returned: list[list[int]] = []
        self._next_key = 0
        self.now = 0.0

    def add(self, prompt: list[int], priority: int = 0, salt: str = "", **params: object) -> Request:
        """Submit a prompt."""
        request = Request(
            key=(b"client", self._next_key),
            tokens=array("i", prompt),
            params=SamplingParams(**({"temperature": 0.0} | params)),  # type: ignore[arg-type]
            seed=0,
            arrival=self.now,
            priority=priority,
            cache_salt=salt,
        )
        self._next_key += 1
        self.scheduler.add(request)
        self.scheduler.check_integrity()
        return request

    def abort(self, request: Request) -> None:
        """Abort a request that may have ended already."""
        if self.scheduler.abort(request.key) is not None:
            self.ended.append(request)
        self.scheduler.check_integrity()

    def plan(self) -> StepPlan | None:
        """Plan one step and let the worker run it; its tokens are committed later."""
        self.now += 1.0
        plan = self.scheduler.schedule(self.now)
        self.scheduler.check_integrity()
        if plan is not None:
            self.plans.append(plan)
            self._returned.append(self.worker.run(encode(plan.to_message(epoch=0))))
        return plan

    def commit(self) -> Committed:
        """Commit the oldest step in flight."""
        committed = self.scheduler.commit(self._returned.pop(0), self.now)
        self.ended += committed.finished
        self.scheduler.check_integrity()
        return committed

    def step(self) -> bool:
        """Plan while steps may be in flight, then commit one. False when nothing is left to do."""
        while self.plan() is not None:
            pass
        if not self._returned:
            return False
        self.commit()
        return True

    def run(self, max_steps: int = 10_000) -> None:
        """Run until every request has ended."""
        for _ in range(max_steps):
            if not self.step():
                break
        assert not self.scheduler.has_unfinished, "no progress although requests are left"
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_usable, "blocks leaked"

    @staticmethod
    def output(request: Request) -> list[int]:
        """Generated tokens."""
        return request.tokens.tolist()[request.prompt_len :]
