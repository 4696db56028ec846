"""Percentiles are those that numpy computes."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from nanovllm_dist.bench.distribution import Distribution, median, percentile


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_interpolate_as_numpy_does(count: int) -> None:
    rng = Random(count)
    values = [rng.random() for _ in range(count)]
    summary = Distribution.of(values)
    assert summary is not None
    expected = [np.mean(values), *np.percentile(values, [50, 90, 99])]
    assert [summary.mean, summary.p50, summary.p90, summary.p99] == pytest.approx(expected)
    assert summary.count == count


def test_the_ends_are_the_smallest_and_the_largest() -> None:
    assert percentile([1.0, 2.0, 4.0], 0.0) == 1.0
    assert percentile([1.0, 2.0, 4.0], 1.0) == 4.0


def test_nothing_has_no_distribution() -> None:
    assert Distribution.of([]) is None


def test_the_median_of_an_even_number_lies_between_the_middle_two() -> None:
    assert median([4.0, 1.0, 3.0, 2.0]) == 2.5
