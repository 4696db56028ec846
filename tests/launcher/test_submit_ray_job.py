"""scripts/submit_ray_job.py against a real Ray head with its job server: submit, follow, status, stop, list."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "submit_ray_job.py"
HAS_JOB_SERVER = all(importlib.util.find_spec(name) for name in ("aiohttp", "opencensus"))
needs_job_server = pytest.mark.skipif(not HAS_JOB_SERVER, reason="needs ray[default]")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Head:
    """A Ray head of two CPUs whose PATH has a `nanovllm-launch` of this checkout."""

    def __init__(self, directory: Path) -> None:
        port, dashboard, agent = free_ports(3)
        self.address = f"http://127.0.0.1:{dashboard}"
        launch = directory / "bin" / "nanovllm-launch"
        launch.parent.mkdir()
        launch.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m nanovllm_dist.launcher.cli "$@"\n')
        launch.chmod(0o755)
        (directory / "tmp").mkdir()
        self.token = uuid.uuid4().hex
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "PATH": f"{launch.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(directory / "tmp"),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        options = [
            f"--port={port}",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
            "--node-ip-address=127.0.0.1",
            "--num-cpus=2",
            f"--object-store-memory={80 * 2**20}",
            f"--temp-dir={directory}/r",
            "--block",
        ]
        with (directory / "log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self._log = directory / "log"

    def wait(self) -> None:
        """Until the job server answers."""
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/api/jobs/", timeout=5).read()
            except urllib.error.HTTPError:  # it wants the token, so it is there
                return
            except OSError:
                assert time.monotonic() < deadline, self._log.read_text()
                assert self._process.poll() is None, self._log.read_text()
                time.sleep(0.5)

    def close(self) -> None:
        children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for child in children:
            if child.is_running():
                child.kill()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="nv", dir="/tmp", ignore_cleanup_errors=True) as directory:
        head = Head(Path(directory))
        try:
            head.wait()
            yield head
        finally:
            head.close()


def run(head: Head, action: str, *arguments: str, token: str | None = None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the script."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), action, "--address", head.address, *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "RAY_AUTH_TOKEN": head.token if token is None else token},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@needs_job_server
def test_a_generation_job_runs_on_the_cluster_and_its_log_is_followed(
    head: Head, smollm2: Path, tmp_path: Path
) -> None:
    prompts, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "The sky is", "id": number}) + "\n" for number in range(3)))
    model = ["--model", str(smollm2), "--device", "cpu", "--tp", "2", "--num-blocks", "50", "--max-model-len", "256"]
    sampling = ["--raw", "--max-tokens", "8", "--temperature", "0", "--ignore-eos"]
    files = ["--prompts-file", str(prompts), "--output", str(answers)]

    code, output, errors = run(head, "generate", "--id", "batch", *model, *sampling, *files)

    assert code == 0, output + errors
    assert "job batch: nanovllm-launch --model" in errors
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == [0, 1, 2]
    assert all(line["text"] for line in lines)
    assert "batch  SUCCEEDED  nanovllm-launch" in run(head, "list")[1]


@pytest.mark.slow
@needs_job_server
def test_files_and_variables_travel_with_a_job_and_its_failure_is_the_scripts(head: Head, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import os; print('it says', os.environ['WORD']); raise SystemExit(3)")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "left.out").write_text("x")
    command = ["--working-dir", str(tmp_path), "--env", "WORD=hello", "--", sys.executable, "program.py"]

    code, output, errors = run(head, "submit", *command)

    assert (code, "it says hello" in output, "FAILED" in errors) == (1, True, True), (output, errors)


@pytest.mark.slow
@needs_job_server
def test_a_job_can_be_left_looked_at_and_stopped(head: Head) -> None:
    program = "print('begun', flush=True); import time; time.sleep(300)"
    code, output, _ = run(head, "submit", "--detach", "--", sys.executable, "-c", program)
    job = output.strip()
    assert code == 0
    deadline = time.monotonic() + 60
    while "begun" not in run(head, "logs", "--detach", job)[1]:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert run(head, "status", job)[1].startswith("RUNNING")

    assert run(head, "stop", job)[1] == "stopping\n"

    code, _, errors = run(head, "logs", job)
    assert (code, "STOPPED" in errors) == (1, True)
    assert run(head, "stop", job)[1] == "it had ended\n"


@pytest.mark.slow
@needs_job_server
def test_what_the_cluster_refuses_is_said_in_a_line(head: Head) -> None:
    code, _, errors = run(head, "status", "no-such-job")
    assert code == 1
    assert errors.startswith(f"error: {head.address} refused (404)")
    assert len(errors.splitlines()) == 1


@pytest.mark.slow
@needs_job_server
def test_a_wrong_token_is_told_from_a_cluster_that_is_away(head: Head) -> None:
    code, _, errors = run(head, "list", token="not-this-one")
    assert (code, "wants the token that its head has" in errors) == (1, True), errors


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["submit"], 2, "there is no command"),
        (["list", "--address", "http://127.0.0.1:1"], 1, "no Ray job server answers at http://127.0.0.1:1"),
        (["list", "--", "ls"], 2, "unknown arguments: ls"),
        (["submit", "--address", "head:6379", "--", "ls"], 1, "not Ray's own port"),
        (["submit", "--env", "WORD", "--", "ls"], 1, "'WORD' is not NAME=VALUE"),
        (["submit", "--working-dir", "/no/such", "--", "ls"], 1, "is not a directory"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(arguments: list[str], code: int, message: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
