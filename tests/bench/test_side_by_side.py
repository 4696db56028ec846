"""Contestants do the same work, their processes' memory is told apart, and what is missing is said before any start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from nanovllm_dist.bench.contestant import OURS, Answer, Rivals, entries
from nanovllm_dist.bench.memory_watch import MARK, MemoryWatch
from nanovllm_dist.bench.report import read_json, write_json
from nanovllm_dist.bench.report_side_by_side import show_side_by_side
from nanovllm_dist.bench.side_by_side import SideBySideReport, SideBySideSettings, measure_side_by_side, ratio, work_of
from nanovllm_dist.bench.workloads import Workload
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError


def tiny_config(model: Path) -> EngineConfig:
    return EngineConfig(
        model=str(model), load_format="dummy", device="cpu", dtype="float32", max_model_len=256, launcher="local"
    )


def test_tokens_per_second_come_from_each_answer() -> None:
    work = work_of(Workload("two", (3, 4), (10, 30)), [Answer(2.0, [0.5, 0.1, 0.3], [0.02]), Answer(4.0)])
    assert work.output_tokens_per_second == [20.0, 10.0]
    assert work.first_token == [0.3, None]
    assert work.decode_tokens_per_second == [50.0, None]


def test_a_ratio_is_of_medians_and_none_where_one_side_is_unknown() -> None:
    assert ratio([10.0, 30.0, 20.0], [5.0, None, 5.0]) == 4.0
    assert ratio([10.0], [None]) is None


@pytest.mark.parametrize(
    ("rivals", "message"),
    [
        (Rivals(("sglang",)), "--compare sglang: there are"),
        (Rivals(("vllm",)), "takes --vllm-python"),
        (Rivals(("vllm",), vllm_python="/nowhere/python"), "--vllm-python /nowhere/python: no such file"),
        (Rivals(("vllm",), sys.executable, ("/nowhere/lib.so",)), "--vllm-preload /nowhere/lib.so: no such file"),
        (Rivals(("llama.cpp",), llama_server=sys.executable), "takes --gguf"),
    ],
)
def test_a_rival_that_cannot_run_is_refused_before_anything_starts(
    rivals: Rivals, message: str, tiny_model: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        entries(tiny_config(tiny_model), rivals, 64)


def test_we_are_the_first_contestant(tiny_model: Path) -> None:
    assert [entry.name for entry in entries(tiny_config(tiny_model), Rivals(("transformers",)), 64)] == [
        OURS,
        "transformers",
    ]


def test_memory_is_summed_over_all_processes_of_a_mark_and_no_others() -> None:
    child = "import subprocess, sys, time; x = bytearray(64 << 20); x[:] = b'1' * len(x); print(1, flush=True)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child + '; time.sleep(30)'!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        env={**os.environ, MARK: "some"},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        with MemoryWatch() as watch:
            deadline = time.monotonic() + 10.0
            while watch.peak("some") < 64 << 20 and time.monotonic() < deadline:
                time.sleep(0.1)
        assert 64 << 20 < watch.peak("some") < 300 << 20
        assert watch.peak("other") == 0
    finally:
        os.killpg(process.pid, 9)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.mark.slow
def test_a_run_reports_starts_memory_and_work_of_every_contestant(tiny_model: Path, tmp_path: Path) -> None:
    workloads = [Workload("one", (9,), (6,)), Workload("three", (3, 9, 5), (4, 2, 6))]
    lines: list[str] = []
    settings = SideBySideSettings(Rivals(("transformers",)), runs=2)
    report = measure_side_by_side(tiny_config(tiny_model), workloads, settings, lines.append)
    assert [one.name for one in report.contestants] == [OURS, "transformers"]
    for one in report.contestants:
        assert 0.0 < one.ready < one.first_token
        assert one.peak_memory > 50 << 20
        assert [len(work.seconds) for work in one.work.values()] == [2, 2]
        assert all(value is not None and value > 0 for value in one.work["one"].decode_tokens_per_second)
    assert len(lines) == 2 + 4
    write_json(report, str(tmp_path / "report.json"))
    assert read_json(str(tmp_path / "report.json")) == report
    console = Console(record=True, width=160)
    show_side_by_side(report, console)
    assert "transformers" in console.export_text()


def test_reports_kept_with_the_docs_can_be_read() -> None:
    kept = sorted((Path(__file__).parents[2] / "docs" / "results").rglob("cpu-*-rivals.json"))
    assert kept
    for path in kept:
        assert isinstance(read_json(str(path)), SideBySideReport)
