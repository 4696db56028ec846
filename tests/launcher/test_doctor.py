"""`nanovllm-launch --doctor`: facts, what must be mended, and an exit code that agrees with the verdict."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nanovllm_dist.launcher import doctor
from nanovllm_dist.workers.platform.base import Finding


def examined(monkeypatch: pytest.MonkeyPatch, *found: Finding, device: str = "cpu") -> tuple[int, list[str]]:
    """Exit code and lines for a host whose platforms find this."""
    monkeypatch.setattr(doctor, "findings", lambda: {"cpu": list(found)})
    lines: list[str] = []
    return doctor.examine(device, lines.append), lines


def test_a_healthy_host_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines = examined(monkeypatch, Finding("CPU", "8 cores"))
    assert code == 0
    assert lines[-1] == "verdict: ready"
    assert not any(line.startswith("FIX") for line in lines)


def test_a_remark_alone_does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines = examined(monkeypatch, Finding("driver", "not found", "mount it"))
    assert code == 0
    assert any(line.startswith("note  driver") for line in lines)
    assert any(line.endswith("-> mount it") for line in lines)


def test_what_blocks_is_named_in_the_verdict_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    blocking = Finding("toolkit", "8.2", "install 9.0", blocks=True)
    code, lines = examined(monkeypatch, blocking)
    assert code == 1
    assert lines[-1] == "verdict: 1 to fix: toolkit"
    assert any(line.startswith("FIX   toolkit") for line in lines)
    assert any(line.endswith("-> install 9.0") for line in lines)


def test_what_another_device_lacks_is_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    blocking = Finding("toolkit", "8.2", "install 9.0", blocks=True)
    monkeypatch.setattr(doctor, "findings", lambda: {"npu": [blocking], "cpu": []})
    lines: list[str] = []

    assert doctor.examine("cpu", lines.append) == 0
    assert lines[-1] == "verdict: ready"
    assert any(line.startswith("note  toolkit") for line in lines)


def test_auto_is_judged_by_the_device_that_would_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = doctor.get_platform("auto").name
    other = next(name for name in ("npu", "cuda", "cpu") if name != taken)
    blocking = Finding("toolkit", "8.2", "install 9.0", blocks=True)
    for name, code in ((taken, 1), (other, 0)):
        monkeypatch.setattr(doctor, "findings", lambda name=name: {name: [blocking]})
        assert doctor.examine("auto", lambda line: None) == code


def test_columns_line_up(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = doctor.table([Finding("a", "1"), Finding("longer", "2", "why")])
    assert [line.index(value) for line, value in zip(lines, ("1", "2", "-> why"), strict=True)] == [14, 14, 14]


@pytest.mark.parametrize(
    ("device", "message"), [("abacus", "auto, npu, cuda, cpu"), ("npu", "pip install 'nanovllm_dist[npu]'")]
)
def test_a_device_that_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch, device: str, message: str) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "")
    code, lines = examined(monkeypatch, device=device)
    assert code == 1
    assert f"to fix: device {device}" in lines[-1]
    assert any(message in line for line in lines)


def test_the_command_says_what_this_host_has() -> None:
    command = [sys.executable, "-m", "nanovllm_dist.launcher.cli", "--doctor", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr  # this host may have something to mend
    for subject in ("nanovllm_dist", "Python", "torch", "ZeroMQ", "CPU", "device cpu"):
        assert f"  {subject} " in done.stdout
    assert done.stdout.splitlines()[-1].startswith("verdict: ")
    assert (done.returncode == 0) == (done.stdout.splitlines()[-1] == "verdict: ready")
