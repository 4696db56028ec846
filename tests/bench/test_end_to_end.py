"""Each command against a real engine: real processes, random weights of a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nanovllm_dist.bench.cli import app
from nanovllm_dist.bench.latency import LatencyReport
from nanovllm_dist.bench.load import LoadReport
from nanovllm_dist.bench.report import Report, read_json
from nanovllm_dist.bench.startup import StartupReport
from nanovllm_dist.bench.throughput import ThroughputReport

pytestmark = pytest.mark.slow
WORK = ("-w", "random", "--num-requests", "6", "--input-len", "20", "--output-len", "10", "--range-ratio", "0.5")


def bench(model: Path, directory: Path, command: str, *arguments: str) -> Report:
    """Run the command and return its report."""
    path = directory / "report.json"
    engine = ("-m", str(model), "--load-format", "dummy", "--launcher", "local")
    small = ("--max-num-seqs", "4", "--kv-cache-memory", "4MiB", "--threads-per-worker", "1")
    result = CliRunner().invoke(app, [command, *engine, *small, *arguments, "--json", str(path)])
    assert result.exit_code == 0, result.output
    return read_json(str(path))


def spans_of(trace: Path, name: str) -> list[dict[str, Any]]:
    return [one for one in json.loads(trace.read_text())["traceEvents"] if one["name"] == name]


def test_throughput_beside_transformers_accounts_for_every_token(tiny_model: Path, tmp_path: Path) -> None:
    report = bench(
        tiny_model,
        tmp_path,
        "throughput",
        *WORK,
        "--runs",
        "2",
        "--compare",
        "transformers",
        "--bandwidth",
        "40",
        "--flops",
        "1",
        "--trace",
        str(tmp_path / "steps.trace"),
        "--trace-steps",
        "4",
    )
    assert isinstance(report, ThroughputReport)
    work, counters = report.workload, report.counters
    assert work.num_requests == 6
    # the counters cover the two measured runs: neither the warm-up nor the streamed run
    assert counters.generated_tokens == 2 * work.output_tokens
    assert counters.prompt_tokens == 2 * work.prompt_tokens
    assert counters.prefix_hits == 0
    assert sum(counters.batch_histogram.values()) == counters.steps
    assert max(counters.batch_histogram) == 4
    assert report.ttft is not None
    assert report.ttft.count == 12
    assert report.itl is not None
    assert report.itl.count == work.output_tokens - work.num_requests
    assert report.comparison is not None
    assert len(report.comparison.ratios) == len(report.rates.seconds) == 2
    assert report.achieved is not None
    assert 0.0 < report.achieved.share < 1.0
    assert 0.0 < report.achieved.cache_bandwidth < 40e9
    assert report.engine.options["max_num_seqs"] == 4
    assert report.steps is not None
    assert report.steps.span.count == 3
    assert report.steps.device.mean + report.steps.device_idle.mean == pytest.approx(report.steps.interval.mean)
    assert {one["args"]["step"] for one in spans_of(tmp_path / "steps.trace", "step")} == {
        one["args"]["step"] for one in spans_of(tmp_path / "steps.trace", "schedule")
    }
    assert len(spans_of(tmp_path / "steps.trace", "step")) == 4


def test_latency_times_every_token(tiny_model: Path, tmp_path: Path) -> None:
    report = bench(tiny_model, tmp_path, "latency", *WORK, "--runs", "2")
    assert isinstance(report, LatencyReport)
    assert report.ttft is not None
    assert report.itl is not None
    assert report.e2e is not None
    assert report.ttft.count == report.e2e.count == 12
    assert report.itl.count == 2 * (report.workload.output_tokens - 6)
    assert max(report.counters.batch_histogram) == 1
    assert report.decode_tokens_per_second is not None
    assert report.ttft.p50 < report.e2e.p50


def test_load_times_every_token_at_every_rate_and_says_how_late_it_was(tiny_model: Path, tmp_path: Path) -> None:
    lengths = ("--input-len", "20", "--output-len", "10", "--range-ratio", "0.5")
    report = bench(tiny_model, tmp_path, "load", *lengths, "--rate", "10", "--rate", "40", "--seconds", "0.5")
    assert isinstance(report, LoadReport)
    assert [result.rate for result in report.results] == [10.0, 40.0]
    assert [result.workload.num_requests for result in report.results] == [5, 20]
    for result in report.results:
        work = result.workload
        assert result.refused == 0
        assert result.counters.generated_tokens == work.output_tokens
        assert result.counters.prefix_hits == 0
        assert result.itl is not None
        assert result.itl.count == work.output_tokens - work.num_requests
        assert result.ttft is not None
        assert result.e2e is not None
        assert result.lateness is not None
        assert result.ttft.count == result.e2e.count == result.lateness.count == work.num_requests
        assert result.ttft.p50 < result.e2e.p50
        assert result.lateness.p50 >= 0.0
        # the last request is due after 0.5 s, and the first is answered from its own arrival on
        assert result.seconds * result.requests_per_second == pytest.approx(work.num_requests)
        assert result.client_cpu > 0.0


def test_a_suite_measures_on_one_engine_and_keeps_a_report_of_each(tiny_model: Path, tmp_path: Path) -> None:
    small = ("-m", str(tiny_model), "--load-format", "dummy", "--launcher", "local", "--threads-per-worker", "1")
    work = ("-w", "random", "-w", "c2", "--num-requests", "3", "--input-len", "20", "--output-len", "10", "--runs", "1")
    load = ("--rate", "20", "--seconds", "0.2")
    directory = tmp_path / "new" / "reports"
    result = CliRunner().invoke(
        app, ["suite", *small, "--kv-cache-memory", "4MiB", *work, *load, "--output", str(directory), "--trace"]
    )
    assert result.exit_code == 0, result.output
    reports = {path.stem: read_json(str(path)) for path in directory.glob("*.json")}
    traces = {path.stem: spans_of(path, "step") for path in directory.glob("*.trace")}
    assert set(traces) == set(reports)
    assert traces["throughput-random"]
    assert set(reports) == {"throughput-random", "throughput-c2", "load"}
    assert isinstance(reports["throughput-random"], ThroughputReport)
    assert reports["throughput-random"].workload.num_requests == 3
    assert isinstance(reports["load"], LoadReport)
    assert reports["load"].engine == reports["throughput-c2"].engine  # type: ignore[union-attr]


def test_the_script_for_gpu_machines_runs_dry_anywhere(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "bench_gpu"
    finished = subprocess.run(
        [script, "--model", "tiny", "--quick", "--output", tmp_path, "--", "--threads-per-worker", "1"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert {"machine.txt", "startup-cold.json", "startup-warm.json", "throughput-random.json", "load.json"} <= names
    assert all(read_json(str(tmp_path / name)) for name in names if name.endswith(".json"))


def test_startup_times_fresh_processes(tiny_model: Path, tmp_path: Path) -> None:
    report = bench(tiny_model, tmp_path, "startup", "--runs", "2")
    assert isinstance(report, StartupReport)
    assert len(report.ready) == len(report.first_token) == len(report.stop) == 2
    assert all(ready < first for ready, first in zip(report.ready, report.first_token, strict=True))
    assert next(iter(report.phases)) == "resolve"
    assert "load" in report.phases
    assert report.launcher == "local"
