"""Each command against a real engine: real processes, random weights of a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from nanovllm_dist.bench.cli import app
from nanovllm_dist.bench.latency import LatencyReport
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
    assert report.share_of_limit is not None
    assert 0.0 < report.share_of_limit < 1.0
    assert report.engine.options["max_num_seqs"] == 4


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


def test_startup_times_fresh_processes(tiny_model: Path, tmp_path: Path) -> None:
    report = bench(tiny_model, tmp_path, "startup", "--runs", "2")
    assert isinstance(report, StartupReport)
    assert len(report.ready) == len(report.first_token) == len(report.stop) == 2
    assert all(ready < first for ready, first in zip(report.ready, report.first_token, strict=True))
    assert next(iter(report.phases)) == "resolve"
    assert "load" in report.phases
    assert report.launcher == "local"
