"""Huawei's ProcessGroupHCCL in several processes, over the stand-in's collectives in shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.npu, pytest.mark.slow]

RANK = Path(__file__).with_name("standin_rank.py")


def start(case: str, ranks: int, directory: Path, **environment: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, str(RANK), case, str(rank), str(ranks), str(directory / "store")],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=120)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    assert lines, err
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("nanovllm-standin-*")}


@pytest.fixture
def answers(request: pytest.FixtureRequest, tmp_path: Path) -> list[dict[str, Any]]:
    return [result(process) for process in start(request.param, 2, tmp_path)]


@pytest.mark.parametrize("answers", ["collectives"], indirect=True)
def test_two_ranks_reduce_gather_scatter_and_tell(answers: list[dict[str, Any]]) -> None:
    for rank, answer in enumerate(answers):
        assert answer == {
            "summed": [100, 102, 104, 106],
            "largest": [1, 0, 7],
            "gathered": [0, 0, 0, 1, 1, 1],
            "told": [6, 6],
            "own": [4 * rank + 1, 4 * rank + 3],
            "big": True,
        }


@pytest.mark.parametrize("answers", ["captured"], indirect=True)
def test_a_captured_collective_runs_in_each_replay(answers: list[dict[str, Any]]) -> None:
    assert [answer["replayed"] for answer in answers] == [[[3, 3], [7, 7], [11, 11]]] * 2


def test_a_rank_that_does_not_come_is_an_error_within_the_timeout_and_leaves_no_memory(tmp_path: Path) -> None:
    before = shared_memory()
    waiting, absent = start("alone", 2, tmp_path, HCCL_EXEC_TIMEOUT="2")

    answer = result(waiting)
    absent.kill()
    absent.communicate()

    assert "waited 2 s for the others" in answer["error"]
    assert shared_memory() <= before
