"""One engine process and its watchdog: what is started is fed, watched, and never left behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import EngineStartError
from nanovllm_dist.launcher.deployment import Deployment
from nanovllm_dist.launcher.process import LocalProcess, LongLivedThread, Program
from nanovllm_dist.launcher.supervisor import Supervisor

ECHO = "import sys; print(sys.stdin.read().upper(), flush=True); sys.exit('it ended badly')"
SLEEP = "import time; print('up', flush=True); time.sleep(600)"
PARENT = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Program]:
    """Makes a Program that runs the given source."""

    def make(source: str) -> Program:
        (tmp_path / "what_to_run.py").write_text(source)
        return Program("worker-0", "what_to_run", '{"text": "hi"}', {"PYTHONPATH": str(tmp_path)})

    return make


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """An empty directory for the output of processes."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_process_reads_its_spec_and_reports_line_log_and_exit_code(
    program: Callable[[str], Program], run_directory: Path
) -> None:
    process = LocalProcess(program(ECHO), run_directory)
    wait_for(lambda: process.poll() is not None)

    assert process.first_line() == '{"TEXT": "HI"}'
    assert process.poll() == 1
    assert process.log_tail() == "it ended badly"


def test_the_spec_is_on_no_disk_and_output_is_for_this_user_alone(
    program: Callable[[str], Program], run_directory: Path
) -> None:
    process = LocalProcess(program(ECHO), run_directory)
    wait_for(lambda: process.poll() is not None)

    assert sorted(path.name for path in run_directory.iterdir()) == ["worker-0.log", "worker-0.out"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in run_directory.iterdir()} == {0o600}


def test_kill_ends_what_the_process_started_too(program: Callable[[str], Program], run_directory: Path) -> None:
    process = LocalProcess(program(PARENT), run_directory)
    wait_for(process.first_line)
    grandchild = int(process.first_line() or 0)

    process.kill()

    assert process.poll() == -signal.SIGKILL
    wait_for(lambda: not runs(grandchild))


def test_a_process_outlives_the_thread_that_asked_for_it_and_ends_with_its_own(
    program: Callable[[str], Program], run_directory: Path
) -> None:
    thread = LongLivedThread()
    process = thread.run(lambda: LocalProcess(program(SLEEP), run_directory))
    wait_for(process.first_line)
    assert process.poll() is None

    thread.close()

    wait_for(lambda: process.poll() == -signal.SIGKILL)


def test_an_error_in_the_long_lived_thread_is_raised_where_it_was_asked_for() -> None:
    thread = LongLivedThread()
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 // 0)
    assert thread.run(lambda: 5) == 5
    thread.close()


# --- the watchdog ------------------------------------------------------------------------------------------


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    supervisor = Supervisor()
    yield supervisor
    supervisor.finish()


def test_the_run_directory_is_private_and_short_enough_for_sockets_below_it(supervisor: Supervisor) -> None:
    assert stat.S_IMODE(supervisor.directory.stat().st_mode) == 0o700
    assert len(str(supervisor.directory)) < 40


def test_a_long_tmpdir_does_not_make_a_long_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 20)))
    supervisor = Supervisor()
    assert len(str(supervisor.directory)) < 40
    supervisor.finish()


def test_a_run_directory_that_cannot_be_made_is_an_error_that_says_where_and_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    config = EngineConfig(model="m", device="cpu", launcher="local")

    with pytest.raises(
        EngineStartError, match=r": /proc/nanovllm-\w+ could not be made: No such file or directory; set TMPDIR$"
    ):
        Deployment(config)


INTERRUPTED = """
    import signal, sys, tempfile
    from nanovllm_dist.launcher.supervisor import Supervisor
    tempfile.tempdir = sys.argv[1]
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for microseconds in [*range(10, 1500, 10), *range(1500, 40_000, 500)]:
        supervisor = None
        try:
            signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6)
            supervisor = Supervisor()
        except KeyboardInterrupt:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        if supervisor is not None:
            supervisor.finish()
"""


def test_an_interrupt_at_any_moment_of_the_start_leaves_no_directory() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        subprocess.run([sys.executable, "-c", textwrap.dedent(INTERRUPTED), parent], check=True)
        wait_for(lambda: not os.listdir(parent))


def test_finish_kills_the_watched_and_whoever_writes_into_the_directory(supervisor: Supervisor) -> None:
    watched = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with (supervisor.directory / "log").open("w") as log:
        writer = subprocess.Popen(["sleep", "600"], stderr=log, start_new_session=True)
    stranger = subprocess.Popen(["sleep", "600"], start_new_session=True)
    supervisor.watch(watched.pid)

    supervisor.finish()

    assert watched.wait(5) == writer.wait(5) == -signal.SIGKILL
    assert stranger.poll() is None
    assert not supervisor.directory.exists()
    stranger.kill()
    stranger.wait()


def test_a_watchdog_that_was_killed_leaves_the_directory_to_the_launcher(supervisor: Supervisor) -> None:
    os.kill(supervisor.pid, signal.SIGKILL)
    wait_for(lambda: not runs(supervisor.pid))

    supervisor.finish()

    assert not supervisor.directory.exists()


def test_finish_twice_is_fine(supervisor: Supervisor) -> None:
    supervisor.finish()
    supervisor.finish()
    wait_for(lambda: not runs(supervisor.pid))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_watchdog_ignores_signals_meant_for_the_whole_program(supervisor: Supervisor, number: int) -> None:
    wait_for(lambda: _ignores(supervisor.pid, number))
    os.kill(supervisor.pid, number)
    time.sleep(0.1)
    assert runs(supervisor.pid)


def _ignores(pid: int, number: int) -> bool:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


LAUNCHER = """
    import os, sys, time
    from pathlib import Path
    from nanovllm_dist.launcher.process import LocalProcess, Program
    from nanovllm_dist.launcher.supervisor import Supervisor
    supervisor = Supervisor()
    process = LocalProcess(Program("worker-0", "what_to_run", "", {"PYTHONPATH": sys.argv[1]}), supervisor.directory)
    while process.first_line() is None:
        time.sleep(0.02)
    supervisor.watch(process.pid)
    fork = os.fork() if len(sys.argv) > 2 else 0
    if fork or len(sys.argv) == 2:
        print(process.pid, supervisor.pid, supervisor.directory, fork, flush=True)
    time.sleep(600)
"""


def _launch(tmp_path: Path, *arguments: str) -> tuple[subprocess.Popen[str], list[str]]:
    launcher = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LAUNCHER), str(tmp_path), *arguments], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    return launcher, launcher.stdout.readline().split()


def test_nothing_is_left_when_the_launcher_is_killed(tmp_path: Path, program: Callable[[str], Program]) -> None:
    program(PARENT)
    launcher, (pid, supervisor, directory, _) = _launch(tmp_path)
    grandchild = int(Path(directory, "worker-0.out").read_text())
    assert runs(int(pid))
    assert runs(grandchild)

    launcher.kill()
    launcher.wait()

    wait_for(lambda: not any(runs(one) for one in (int(pid), int(supervisor), grandchild)))
    assert not Path(directory).exists()


def test_a_fork_that_keeps_the_pipe_open_does_not_hide_the_launchers_death(
    tmp_path: Path, program: Callable[[str], Program]
) -> None:
    program(SLEEP)
    launcher, (pid, supervisor, directory, fork) = _launch(tmp_path, "fork")

    launcher.kill()
    launcher.wait()

    wait_for(lambda: not runs(int(pid)) and not runs(int(supervisor)))
    assert not Path(directory).exists()
    os.kill(int(fork), signal.SIGKILL)


def test_a_process_ends_with_its_launcher_even_if_the_watchdog_was_killed_before(
    tmp_path: Path, program: Callable[[str], Program]
) -> None:
    program(SLEEP)
    launcher, (pid, supervisor, directory, _) = _launch(tmp_path)
    os.kill(int(supervisor), signal.SIGKILL)

    launcher.kill()
    launcher.wait()

    wait_for(lambda: not runs(int(pid)))
    for path in Path(directory).iterdir():
        path.unlink()
    Path(directory).rmdir()
