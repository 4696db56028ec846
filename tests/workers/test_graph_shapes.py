"""Shapes of recorded steps: whatever a step needs fits one of them, without running many times its tokens."""

from __future__ import annotations

import pytest

from nanovllm_dist.workers.batch import StepShape
from nanovllm_dist.workers.graphs import chunk_shape, chunk_shapes, decode_size, decode_sizes


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 97, 100, 256, 300, 512])
def test_every_number_of_rows_has_a_decode_size_and_the_largest_is_its_own(max_num_seqs: int) -> None:
    sizes = decode_sizes(max_num_seqs)
    for rows in range(1, max_num_seqs + 1):
        assert rows <= decode_size(sizes, rows) <= (2 if rows <= 16 else 1.5) * rows
    assert decode_size(sizes, max_num_seqs) == max_num_seqs


@pytest.mark.parametrize(("tokens", "seqs"), [(16, 16), (64, 3), (100, 100), (1000, 64), (8192, 512)])
def test_every_step_within_the_limits_fits_a_shape(tokens: int, seqs: int) -> None:
    shapes = chunk_shapes(tokens, seqs)
    for prefills in {1, 2, seqs // 2, seqs} - {0}:
        decodes = seqs - prefills
        for needed in (decodes + 2 * prefills, (decodes + 2 * prefills + tokens) // 2, tokens):
            if decodes + 2 * prefills <= needed <= tokens:
                assert chunk_shape(shapes, StepShape(needed, decodes, prefills)) is not None


def test_many_short_tails_do_not_run_in_a_shape_many_times_their_size() -> None:
    shapes = chunk_shapes(8192, 512)
    for rows in (33, 100, 250):
        shape = chunk_shape(shapes, StepShape(2 * rows, 0, rows))
        assert shape is not None
        assert shape.tokens <= 3 * rows


def test_a_step_beyond_the_limits_has_none() -> None:
    assert chunk_shape(chunk_shapes(64, 8), StepShape(65, 0, 1)) is None
