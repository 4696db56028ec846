"""How dimensions and heads are dealt to ranks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm_dist.errors import ConfigError
from nanovllm_dist.models.partition import balanced_range, split_heads


@given(total=st.integers(0, 5000), parts=st.integers(1, 64), unit=st.sampled_from([1, 8, 32]))
def test_ranges_tile_the_whole_and_differ_by_at_most_one_unit(total: int, parts: int, unit: int) -> None:
    ranges = [balanced_range(total, parts, index, unit) for index in range(parts)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == total
    assert all(left[1] == right[0] for left, right in pairwise(ranges))
    sizes = [end - start for start, end in ranges]
    assert max(sizes) - min(sizes) <= unit
    assert sizes == sorted(sizes, reverse=True)


def test_ranges_are_whole_units_only_where_none_would_be_empty() -> None:
    assert [balanced_range(160, 3, index, 32) for index in range(3)] == [(0, 64), (64, 128), (128, 160)]
    assert [balanced_range(64, 3, index, 32) for index in range(3)] == [(0, 22), (22, 43), (43, 64)]
    assert [balanced_range(100, 2, index, 32) for index in range(2)] == [(0, 50), (50, 100)]


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 8), data=st.data())
def test_every_query_head_is_on_one_rank_with_its_key_value_head(
    kv_heads: int, group: int, data: st.DataObject
) -> None:
    num_heads = kv_heads * group
    world_size = data.draw(st.integers(1, num_heads))
    ranks = [split_heads(num_heads, kv_heads, world_size, rank) for rank in range(world_size)]
    assert [head for part in ranks for head in range(part.q_start, part.q_end)] == list(range(num_heads))
    for part in ranks:
        assert part.num_heads > 0
        assert part.num_heads % part.num_kv_heads == 0
        local_group = part.num_heads // part.num_kv_heads
        for index in range(part.num_heads):
            assert (part.q_start + index) // group == part.kv_start + index // local_group


def test_more_ranks_than_query_heads_are_refused_with_the_limit() -> None:
    with pytest.raises(ConfigError, match="at most 9 ranks"):
        split_heads(9, 3, 10, 0)
