"""What the engine counted during a measurement is the difference of its statistics."""

from __future__ import annotations

import msgspec
import pytest

from nanovllm_dist.bench.engine_run import HostTime, counted, sampling_params
from nanovllm_dist.bench.workloads import make_workload
from nanovllm_dist.wire.messages import EngineStats

BEFORE = EngineStats(
    running=0,
    waiting=0,
    free_blocks=10,
    num_blocks=10,
    steps=10,
    prompt_tokens=100,
    generated_tokens=50,
    prefix_queries=100,
    prefix_hits=5,
    preemptions=1,
    finished={"length": 4},
    seconds_since_step=0.0,
    host_us_per_step={1: (4, 100.0), 8: (6, 300.0)},
    answer_us_per_step={8: (6, 30.0)},
    batch_histogram={1: 4, 8: 6},
)
AFTER = msgspec.structs.replace(
    BEFORE,
    steps=40,
    prompt_tokens=300,
    generated_tokens=150,
    prefix_queries=300,
    prefix_hits=5,
    preemptions=3,
    host_us_per_step={1: (4, 100.0), 8: (12, 200.0), 64: (24, 900.0)},
    answer_us_per_step={8: (12, 25.0)},
    batch_histogram={1: 4, 8: 12, 64: 24},
)


def test_counters_are_those_of_the_measurement_alone() -> None:
    counters = counted(BEFORE, AFTER)
    assert (counters.steps, counters.prompt_tokens, counters.generated_tokens) == (30, 200, 100)
    assert (counters.prefix_queries, counters.prefix_hits, counters.preemptions) == (200, 0, 2)
    assert counters.batch_histogram == {8: 6, 64: 24}


def test_host_time_is_the_mean_over_the_new_steps_and_not_over_all() -> None:
    host = counted(BEFORE, AFTER).host_us_per_step
    assert set(host) == {8, 64}  # no new step with one request running
    assert host[8] == HostTime(6, pytest.approx(100.0))  # 12 * 200 - 6 * 300 over 6
    assert host[64] == HostTime(24, pytest.approx(900.0))
    assert counted(BEFORE, AFTER).answer_us_per_step == {8: HostTime(6, pytest.approx(20.0))}


def test_nothing_happened_between_equal_statistics() -> None:
    counters = counted(AFTER, AFTER)
    assert counters.steps == 0
    assert counters.host_us_per_step == {}
    assert counters.batch_histogram == {}


def test_each_request_asks_for_exactly_its_tokens_and_no_text() -> None:
    workload = make_workload("c1")
    params = sampling_params(workload, 0.6)
    assert tuple(one.max_tokens for one in params) == workload.output_lens
    assert all(one.ignore_eos and not one.detokenize and one.temperature == 0.6 for one in params)
