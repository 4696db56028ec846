"""One rank's ModelRunner, driven by hand: what a coordinator knows of its rows is kept here, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.launcher.resolve import resolve_config
from nanovllm_dist.models.parallel import SingleRank
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire.messages import NewRow, Step, StepResult, pack_ints, unpack_ints
from nanovllm_dist.workers.graphs import Recorder
from nanovllm_dist.workers.model_runner import ModelRunner
from nanovllm_dist.workers.platform import get_platform
from nanovllm_dist.workers.running_step import RunningStep

DEVICE = "cuda"
MAX_NUM_SEQS = 64
MAX_TOKENS = 4096
MAX_LEN = 256
BLOCK_SIZE = 16
BLOCKS_PER_ROW = MAX_LEN // BLOCK_SIZE


@dataclass(frozen=True)
class Row:
    """A request that enters `slot`."""

    slot: int
    prompt: list[int]
    params: SamplingParams
    bad_words: tuple[tuple[int, ...], ...] = ()


class Runner:
    """A ModelRunner and what a coordinator keeps of it: each row's blocks, from a shuffled pool, and its counters."""

    def __init__(self, model: Path, dtype: str = "float32", **options: object) -> None:
        config, model_config = resolve_config(
            EngineConfig(
                model=str(model), device=DEVICE, dtype=dtype, max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_LEN,
                max_num_batched_tokens=MAX_TOKENS, block_size=BLOCK_SIZE, num_blocks=MAX_NUM_SEQS * BLOCKS_PER_ROW + 1,
                **options,
            ),  # type: ignore[arg-type]
            progress=False,
        )  # fmt: skip
        platform = get_platform(config.device)
        device = platform.open_device(0, config)
        self.recorded = 0
        make_recorder = platform.recorder
        platform.recorder = lambda *of: self._counting(make_recorder(*of))  # type: ignore[method-assign,assignment]
        self._runner = ModelRunner(config, model_config, platform, SingleRank(), device)
        self._runner.load(lambda done, total: None)
        self._runner.allocate(self._runner.measure_blocks())
        self._pool = torch.randperm(config.num_blocks - 1, generator=torch.Generator().manual_seed(3)) + 1
        self._computed = [0] * MAX_NUM_SEQS
        self._held = [0] * MAX_NUM_SEQS
        self._number = 0

    def start(self, counts: Sequence[tuple[int, int]], entering: Sequence[Row] = ()) -> RunningStep:
        """Start a step of (slot, tokens) rows, single tokens first; rows that enter are among them."""
        new_rows = [self._enter(row) for row in entering]
        grown: list[tuple[int, int]] = []
        for slot, count in counts:
            self._computed[slot] += count
            while self._held[slot] * BLOCK_SIZE < self._computed[slot]:
                grown.append((slot, self._block(slot, self._held[slot])))
                self._held[slot] += 1
        slots, tokens = zip(*counts, strict=True)
        grow_slots, grow_blocks = zip(*grown, strict=True) if grown else ((), ())
        step = Step(
            0,
            self._number,
            pack_ints(slots),
            pack_ints(tokens),
            pack_ints(grow_slots),
            pack_ints(grow_blocks),
            new_rows,
        )
        self._number += 1
        running = self._runner.start(step)
        assert running is not None
        return running

    def run(self, counts: Sequence[tuple[int, int]], entering: Sequence[Row] = ()) -> StepResult:
        """A step from beginning to end."""
        return self.start(counts, entering).result()

    def prefill(self, rows: Sequence[Row]) -> list[int]:
        """All rows enter with their prompts whole; their first tokens."""
        return tokens_of(self.run([(row.slot, len(row.prompt)) for row in rows], rows))

    def cache(self) -> list[torch.Tensor]:
        """Keys and values of each layer, without the null block, which takes what nobody reads."""
        return [part[1:] for layer in self._runner._kv_caches for part in layer]

    def _enter(self, row: Row) -> NewRow:
        self._computed[row.slot] = 0
        self._held[row.slot] = -(-len(row.prompt) // BLOCK_SIZE)
        blocks = [self._block(row.slot, index) for index in range(self._held[row.slot])]
        return NewRow(
            slot=row.slot,
            tokens=pack_ints(row.prompt),
            prompt_len=len(row.prompt),
            num_computed=0,
            num_cached=0,
            blocks=pack_ints(blocks),
            seed=row.params.seed or 0,
            params=row.params,
            bad_words=[pack_ints(word) for word in row.bad_words],
        )

    def _block(self, slot: int, index: int) -> int:
        return int(self._pool[slot * BLOCKS_PER_ROW + index])

    def _counting(self, recorder: Recorder | None) -> Recorder | None:
        if recorder is None:
            return None
        record = recorder.record

        def counted(*arguments: Any) -> Any:
            self.recorded += 1
            return record(*arguments)

        recorder.record = counted  # type: ignore[method-assign]
        return recorder


def tokens_of(result: StepResult) -> list[int]:
    return list(unpack_ints(result.tokens))
