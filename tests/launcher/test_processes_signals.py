"""Whatever ends `nanovllm-launch`, and whenever: no process, file or shared memory of the engine is left.

A tiny model with random weights, real processes, real signals.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_sandbox import LAUNCHERS, SMALL, Command, Sandbox, model, sandbox, wait_for

from nanovllm_dist.config import EngineConfig

__all__ = ["model", "sandbox"]  # fixtures
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_serving_engine_prints_one_ready_line_and_ends_on_a_signal(
    model: str, sandbox: Sandbox, tmp_path: Path, launcher: str, number: int
) -> None:
    command = Command(tmp_path, model, launcher)
    command.wait_for_output("ready")
    assert len(sandbox.processes()) >= 5

    command.process.send_signal(number)

    assert command.process.wait(30) == 0
    assert re.fullmatch(r"ready ipc://\S+/client\n", command.out.read_text())
    assert "received" not in command.err.read_text()  # Ray's own handler would write a stack trace
    sandbox.assert_empty()


def test_a_sigterm_to_the_group_that_ray_shares_ends_a_serving_engine(
    model: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    command = Command(tmp_path, model, "ray", start_new_session=True)
    command.wait_for_output("ready")

    os.killpg(command.process.pid, signal.SIGTERM)

    assert command.process.wait(30) == 0
    sandbox.assert_empty()


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("phase", ["looking for the model", "starting processes", "loading weights"])
def test_ctrl_c_while_it_starts(model: str, sandbox: Sandbox, tmp_path: Path, launcher: str, phase: str) -> None:
    command = Command(tmp_path, model, launcher)
    command.wait_for_output(phase)

    command.process.send_signal(signal.SIGINT)

    assert command.process.wait(30) == 130
    assert "Traceback" not in command.err.read_text()
    sandbox.assert_empty()


def test_ctrl_c_while_ray_starts(model: str, sandbox: Sandbox, tmp_path: Path) -> None:
    command = Command(tmp_path, model, "ray")
    command.wait_for_output("starting the cluster")

    command.process.send_signal(signal.SIGINT)

    assert command.process.wait(30) == 130
    sandbox.assert_empty()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_while_it_generates(model: str, sandbox: Sandbox, tmp_path: Path, launcher: str) -> None:
    common = {"prompt": [1, 2, 3], "ignore_eos": True, "detokenize": False}
    lines = [json.dumps({**common, "id": name, "max_tokens": n}) for name, n in [("short", 3), ("endless", 4000)]]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    command = Command(tmp_path, model, launcher, "--prompts-file", str(tmp_path / "in.jsonl"), "--output", str(out))
    wait_for(lambda: (partial.exists() and "\n" in partial.read_text()) or command.process.poll() is not None)

    command.process.send_signal(signal.SIGTERM)

    assert command.process.wait(30) == 130, command.err.read_text()
    assert "Traceback" not in command.err.read_text()
    assert [json.loads(line)["id"] for line in partial.read_text().splitlines()] == ["short"]
    sandbox.assert_empty()


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("when", ["starting processes", "ready"])
def test_sigkill_of_the_launcher(model: str, sandbox: Sandbox, tmp_path: Path, launcher: str, when: str) -> None:
    command = Command(tmp_path, model, launcher)
    command.wait_for_output(when)

    command.process.kill()
    command.process.wait()

    sandbox.assert_empty()


def test_prompts_are_answered_in_order_and_a_refused_one_is_named(model: str, sandbox: Sandbox, tmp_path: Path) -> None:
    lines = [{"prompt": [1], "id": "a"}, {"prompt": [9999], "id": "b"}, {"prompt": [2], "id": "c"}]
    for line in lines:
        line |= {"max_tokens": 3, "ignore_eos": True, "detokenize": False, "temperature": 0}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    command = Command(
        tmp_path, model, "local", "--prompts-file", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")
    )

    assert command.process.wait(60) == 1
    assert "1 of 3 prompts failed, first prompt 1" in command.err.read_text()
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["a", "b", "c"]
    assert [record.get("num_tokens") for record in records] == [3, None, 3]
    assert records[1]["error"]["code"] == "invalid_request"
    sandbox.assert_empty()


FORGETFUL = """
import sys, weakref
if sys.argv[2] == "late":
    weakref.finalize(sys, int)  # Ray, imported after this, takes its leave before the engine does
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.launcher.engine import Engine
engine = Engine.start(EngineConfig.from_json(sys.argv[1]))
"""


@pytest.mark.parametrize(("launcher", "order"), [("local", "early"), ("ray", "early"), ("ray", "late")])
def test_a_program_that_ends_without_stopping_its_engine(
    model: str, sandbox: Sandbox, launcher: Any, order: str
) -> None:
    config = msgspec.json.encode(EngineConfig(model=model, launcher=launcher, **SMALL)).decode()
    command = [sys.executable, "-c", FORGETFUL, config, order]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    sandbox.assert_empty()
