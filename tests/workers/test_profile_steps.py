"""The steps that measure memory stay within the engine's limits, however tight these are."""

from __future__ import annotations

import pytest

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.wire.messages import unpack_ints
from nanovllm_dist.workers.profile_steps import profile_steps


@pytest.mark.parametrize("max_model_len", [2, 3, 4, 5, 64, 4096])
@pytest.mark.parametrize(("seqs", "budget"), [(1, 1), (1, 64), (3, 7), (64, 64), (256, 8192)])
@pytest.mark.parametrize("block_size", [1, 16, 48])
def test_no_row_outgrows_the_model_length_the_blocks_or_the_budget(
    max_model_len: int, seqs: int, budget: int, block_size: int
) -> None:
    config = EngineConfig(
        model="m",
        max_model_len=max_model_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        block_size=block_size,
    )
    steps, num_blocks = profile_steps(config, budget)
    lengths: dict[int, int] = {}
    for step in steps:
        slots, counts = unpack_ints(step.slots), unpack_ints(step.counts)
        assert len(slots) <= seqs
        assert sum(counts) <= budget
        for slot, count in zip(slots, counts, strict=True):
            lengths[slot] = lengths.get(slot, 0) + count
    assert max(lengths.values()) <= max_model_len
    assert max(lengths.values()) <= (num_blocks - 1) * block_size
