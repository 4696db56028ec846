"""Load: a Poisson process that is as fast as asked, and times as a client counts them."""

from __future__ import annotations

import statistics

import msgspec
import pytest

from nanovllm_dist.bench.engine_run import EngineCounters
from nanovllm_dist.bench.load import LoadSettings, RateResult, summarise
from nanovllm_dist.bench.load_run import Timeline, poisson_gaps
from nanovllm_dist.bench.session import WorkloadSummary
from nanovllm_dist.errors import ConfigError, NanoVLLMError

COUNTERS = EngineCounters(0, 0, 0, 0, 0, 0, {}, {}, {})
WORK = WorkloadSummary("random", 3, 30, 8, 0.6)


def summary(*timelines: Timeline) -> RateResult:
    return summarise(2.0, WORK, list(timelines), 0.25, COUNTERS)


def test_arrivals_take_as_long_as_the_rate_says() -> None:
    assert sum(poisson_gaps(16.0, 720, "seed")) == pytest.approx(45.0)


def test_gaps_are_exponential() -> None:
    gaps = poisson_gaps(4.0, 20_000, "seed")
    assert min(gaps) > 0.0
    # of an exponential distribution the deviation is the mean, and 1/e of it lies above the mean
    assert statistics.pstdev(gaps) == pytest.approx(0.25, rel=0.03)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.01)


def test_arrivals_repeat_with_the_seed_and_only_with_it() -> None:
    assert poisson_gaps(4.0, 10, "a") == poisson_gaps(4.0, 10, "a") != poisson_gaps(4.0, 10, "b")


def test_a_load_has_as_many_requests_as_arrive_in_its_time_with_lengths_around_the_given() -> None:
    works = LoadSettings(rates=(16.0, 32.0), seconds=45.0).workloads()
    assert [work.num_requests for work in works] == [720, 1440]
    assert (min(works[1].prompt_lens), max(works[1].prompt_lens)) == (515, 1021)
    assert (min(works[1].output_lens), max(works[1].output_lens)) == (86, 170)
    assert sum(works[1].output_lens) / 1440 == pytest.approx(128, rel=0.02)


def test_times_count_from_when_a_request_left_and_not_from_when_it_was_due() -> None:
    result = summary(
        Timeline(due=0.9, sent=1.0, tokens=[1.5, 1.6, 1.8]),
        Timeline(due=2.0, sent=2.0, tokens=[2.25]),
        Timeline(due=3.0, sent=3.5, tokens=[4.0, 4.5, 5.0, 6.0]),
    )
    assert result.ttft is not None
    assert result.ttft.p50 == pytest.approx(0.5)
    assert result.e2e is not None
    assert result.e2e.mean == pytest.approx((0.8 + 0.25 + 2.5) / 3)
    assert result.itl is not None
    assert result.itl.count == 5
    assert result.itl.mean == pytest.approx((0.1 + 0.2 + 0.5 + 0.5 + 1.0) / 5)
    assert result.tpot is not None  # of the two requests that have a second token
    assert result.tpot.count == 2
    assert result.tpot.mean == pytest.approx((0.15 + 2.0 / 3) / 2)
    assert result.lateness is not None
    assert result.lateness.p50 == pytest.approx(0.1)
    assert result.seconds == pytest.approx(5.0)
    assert result.requests_per_second == pytest.approx(3 / 5)
    assert result.output_tokens_per_second == pytest.approx(8 / 5)


def test_refused_requests_are_counted_and_have_no_times() -> None:
    result = summary(
        Timeline(due=1.0, sent=1.0, tokens=[1.5, 2.0]),
        Timeline(due=1.0, sent=1.25, refused=True),
    )
    assert result.refused == 1
    assert result.ttft is not None
    assert result.ttft.count == 1
    assert result.lateness is not None
    assert result.lateness.count == 2
    assert result.requests_per_second == pytest.approx(1.0)


def test_a_load_of_which_nothing_was_taken_is_an_error() -> None:
    with pytest.raises(NanoVLLMError, match="refused all 1 requests at 2 a second"):
        summary(Timeline(due=1.0, sent=1.0, refused=True))


@pytest.mark.parametrize("wrong", [{"rates": ()}, {"rates": (0.0,)}, {"rates": (1.0, -2.0)}, {"seconds": 0.0}])
def test_a_load_that_is_none_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        LoadSettings(**wrong)  # type: ignore[arg-type]


def test_a_result_comes_back_from_json() -> None:
    result = summary(Timeline(due=1.0, sent=1.0, tokens=[1.5, 2.0]))
    assert msgspec.json.decode(msgspec.json.encode(result), type=RateResult) == result
