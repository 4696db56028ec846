"""Reports: the JSON file holds everything, typed; the tables show the figures that matter."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from traced_steps import traced_window

from nanovllm_dist.bench.distribution import Distribution
from nanovllm_dist.bench.engine_run import EngineCounters, HostTime
from nanovllm_dist.bench.environment import describe_environment
from nanovllm_dist.bench.latency import LatencyReport
from nanovllm_dist.bench.load import LoadReport, RateResult
from nanovllm_dist.bench.report import (
    Report,
    read_json,
    show_latency,
    show_startup,
    show_throughput,
    write_json,
)
from nanovllm_dist.bench.report_load import show_load
from nanovllm_dist.bench.report_scheduler import show_scheduler
from nanovllm_dist.bench.roofline import Achieved, Limit
from nanovllm_dist.bench.scheduler_cost import SchedulerReport, StepCost
from nanovllm_dist.bench.session import EngineSummary, WorkloadSummary
from nanovllm_dist.bench.startup import StartupReport
from nanovllm_dist.bench.step_breakdown import breakdown
from nanovllm_dist.bench.throughput import Comparison, Rates, ThroughputReport

TIMES = Distribution(count=4, mean=0.0123, p50=0.012, p90=0.02, p99=0.0456)
COUNTERS = EngineCounters(
    steps=100,
    prompt_tokens=400,
    generated_tokens=800,
    prefix_queries=400,
    prefix_hits=7,
    preemptions=3,
    host_us_per_step={64: HostTime(90, 512.4)},
    answer_us_per_step={64: HostTime(88, 73.4)},
    batch_histogram={rows: rows for rows in range(1, 13)},
)
ENGINE = EngineSummary(
    model="tiny",
    architecture="LlamaForCausalLM",
    device="cpu",
    dtype="bfloat16",
    tensor_parallel_size=2,
    launcher="local",
    max_num_seqs=64,
    block_size=32,
    num_blocks=9,
    options={"dtype": "bfloat16"},
)
WORK = WorkloadSummary("c1", 64, 9_768, 9_790, 0.6)
RATES = Rates([2.0, 4.0, 3.0], [600.0, 300.0, 400.0], 400.0, 800.0)
LIMIT = Limit(
    prefill=1.0,
    decode=2.0,
    all_reduce=0.0,
    output_tokens_per_second=1000.0,
    one_request_tokens_per_second=160.0,
    weight_bytes=5e9,
    cache_bytes=6e9,
)
THROUGHPUT = ThroughputReport(
    environment=describe_environment(),
    engine=ENGINE,
    workload=WORK,
    rates=RATES,
    ttft=TIMES,
    tpot=TIMES,
    e2e=TIMES,
    itl=None,
    counters=COUNTERS,
    comparison=Comparison("transformers", "default", 32, RATES, 1.25, [1.0, 1.25, 1.5]),
    limit=LIMIT,
    achieved=Achieved(share=0.4, cache_bandwidth=2.107e12, attention_bandwidth=2.513e12),
    steps=breakdown(traced_window(11)),
)
LATENCY = LatencyReport(
    environment=describe_environment(),
    engine=ENGINE,
    workload=WORK,
    runs=5,
    ttft=TIMES,
    itl=TIMES,
    e2e=TIMES,
    decode_tokens_per_second=80.0,
    counters=COUNTERS,
    limit=LIMIT,
    share_of_limit=0.5,
)
LOAD = LoadReport(
    environment=describe_environment(),
    engine=ENGINE,
    results=[
        RateResult(
            rate=16.0,
            workload=WorkloadSummary("random", 720, 553_000, 92_160, 0.6),
            refused=3,
            seconds=46.2,
            requests_per_second=15.58,
            output_tokens_per_second=1994.8,
            ttft=TIMES,
            itl=TIMES,
            tpot=TIMES,
            e2e=TIMES,
            lateness=msgspec.structs.replace(TIMES, p99=0.0037),
            client_cpu=0.21,
            counters=COUNTERS,
            steps=breakdown(traced_window(11)),
        )
    ],
)
SCHEDULER = SchedulerReport(
    environment=describe_environment(),
    steps=500,
    by_running=[StepCost(1, 0, 1.5, 0.5, 2.0, 4.0, None), StepCost(1024, 0, 1500.0, 500.0, 2000.0, 4000.0, None)],
    by_queue=[StepCost(64, 1, 60.0, 30.0, 90.0, 190.0, 12.0), StepCost(64, 100_000, 69.0, 30.0, 99.0, 250.0, 13.5)],
)
STARTUP = StartupReport(
    environment=describe_environment(),
    model="tiny",
    launcher="ray",
    dtype="bfloat16",
    device="cpu",
    ready=[3.25, 3.5, 4.0],
    first_token=[3.75, 4.0, 4.5],
    stop=[0.25, 0.25, 0.5],
    median_ready=3.5,
    median_first_token=4.0,
    phases={"resolve": 0.5, "load": 2.0},
)


def shown(report: Report) -> str:
    console = Console(file=io.StringIO(), width=220)
    if isinstance(report, ThroughputReport):
        show_throughput(report, console)
    elif isinstance(report, LatencyReport):
        show_latency(report, console)
    elif isinstance(report, LoadReport):
        show_load(report, console)
    elif isinstance(report, SchedulerReport):
        show_scheduler(report, console)
    else:
        show_startup(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("report", [THROUGHPUT, LATENCY, STARTUP, LOAD, SCHEDULER], ids=lambda one: type(one).__name__)
def test_a_report_comes_back_from_its_file_as_it_was(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(report, str(path))
    assert read_json(str(path)) == report
    raw = json.loads(path.read_text())
    assert raw["benchmark"] in ("throughput", "latency", "startup", "load", "scheduler")
    assert {"nanovllm_dist", "python", "torch", "transformers", "cpu", "cores"} <= set(raw["environment"])


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"benchmark": "throughput", "rates": 3}')
    with pytest.raises(msgspec.ValidationError):
        read_json(str(path))


def test_the_throughput_table_shows_rates_rival_limit_and_engine() -> None:
    text = shown(THROUGHPUT)
    for figure in (
        "400.0",
        "800.0",
        "1.25 x",
        "1,000",
        "40%",
        "9,768",
        "9,790",
        "512  (90 steps)",
        "73  (88 steps)",
        "7 of 400",
    ):
        assert figure in text
    assert "ITL" not in text  # it was not measured


def test_the_throughput_table_shows_the_bandwidth_of_keys_and_values() -> None:
    text = shown(THROUGHPUT)
    assert "2,107" in text
    assert "2,513" in text


@pytest.mark.parametrize("report", [THROUGHPUT, LOAD], ids=lambda one: type(one).__name__)
def test_the_table_of_steps_shows_every_phase_and_how_long_the_device_was_idle(report: Report) -> None:
    text = shown(report)
    assert "10 steps in a row, 8.0 rows" in text
    for phase, mean in (
        ("schedule", "100"),
        ("send", "400"),
        ("prepare", "1,000"),
        ("device (sampling is part of it)", "3,000"),
        ("return", "500"),
        ("sum", "5,700"),
        ("the device idle", "1,000"),
    ):
        assert any(phase in line and mean in line for line in text.splitlines()), phase


def test_a_report_of_a_run_in_which_no_step_was_traced_has_no_table_of_steps() -> None:
    assert "steps in a row" not in shown(msgspec.structs.replace(THROUGHPUT, steps=None))


def test_the_load_table_shows_the_rate_the_refused_and_what_the_client_added() -> None:
    text = shown(LOAD)
    for figure in ("16 requests/s", "720 requests", "15.58", "1,994.8", "0.21", "sent late by", "3.7"):
        assert figure in text
    for name in ("TTFT", "ITL", "TPOT", "E2E"):
        assert name in text


def test_the_scheduler_table_shows_both_series_and_the_growth_with_the_queue() -> None:
    text = shown(SCHEDULER)
    for figure in ("1,024", "2,000.0", "100,000", "99.0", "13.5", "1.10 x", "500 steps"):
        assert figure in text


def test_times_are_shown_in_milliseconds() -> None:
    assert "12.3" in shown(LATENCY)
    assert "45.6" in shown(LATENCY)


def test_the_latency_table_shows_the_decode_rate_and_the_limit_of_one_request() -> None:
    text = shown(LATENCY)
    for figure in ("80.0", "160", "50%"):
        assert figure in text


def test_the_startup_table_shows_medians_phases_and_every_run() -> None:
    text = shown(STARTUP)
    for figure in ("3.50", "4.00", "load began", "3.25  3.50  4.00", "launcher ray"):
        assert figure in text


def test_a_long_histogram_shows_its_most_frequent_sizes() -> None:
    assert "12: 12  (and 4 other sizes)" in shown(THROUGHPUT)


def test_a_busy_host_is_said_so_beside_the_figures() -> None:
    quiet = msgspec.structs.replace(STARTUP, environment=msgspec.structs.replace(STARTUP.environment, load=0.1))
    busy = msgspec.structs.replace(STARTUP, environment=msgspec.structs.replace(STARTUP.environment, load=3.5))
    assert "the host was busy" not in shown(quiet)
    assert "load 3.5 before the start: the host was busy" in shown(busy)


def test_the_environment_names_the_machine_and_the_versions() -> None:
    environment = describe_environment()
    assert environment.cores >= 1
    assert environment.torch
    assert environment.cpu
