"""How many blocks a cache gets: as many as fit, never more than are of use, never so few that nothing could run."""

from __future__ import annotations

import pytest
import torch

from nanovllm_dist.errors import ConfigError
from nanovllm_dist.workers.kv_cache import allocate, blocks_that_fit


@pytest.mark.parametrize(("cache_bytes", "blocks"), [(300, 3), (399, 3), (700, 7), (5000, 9)])
def test_a_cache_takes_what_fits_up_to_what_is_of_use(cache_bytes: int, blocks: int) -> None:
    assert blocks_that_fit(cache_bytes, 100, least=3, most_useful=9) == blocks


@pytest.mark.parametrize(
    ("cache_bytes", "message"),
    [(299, "299 bytes .* hold 2 blocks of 100 bytes, and at least 3 are needed"), (99, "leave 99"), (-5, "leave 0")],
)
def test_a_cache_in_which_nothing_could_run_is_refused(cache_bytes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        blocks_that_fit(cache_bytes, 100, least=3, most_useful=9)


def test_a_cache_larger_than_memory_is_told_by_the_option_that_asks_for_it() -> None:
    blocks = 2**31 - 1
    told = f"num_blocks: a KV cache of {blocks} blocks takes {blocks * 2**20} bytes, .* lower num_blocks"
    with pytest.raises(ConfigError, match=told):
        allocate(1, blocks, 1024, 1, 128, torch.float32, torch.device("cpu"))
