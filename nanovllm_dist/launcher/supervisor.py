"""The watchdog of one engine: when the launcher is gone, for whatever reason, nothing of the engine stays.

Run as a script, it makes the run directory and holds a pipe from the launcher. When that closes (or says `finish`) it
kills the processes it was told of and every process that writes its output into the directory, then removes that. It
uses the standard library alone, so that it is up in milliseconds, and knows nothing of engines.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

_SWEEP_SECONDS = 10.0
_PARENT_CHECK_SECONDS = 1.0
# Ray puts sockets with long names below the directory, and a socket's path may have 107 bytes
_LONGEST_TEMP_DIR = 24


class Supervisor:
    """The launcher's side: a private run directory (mode 0700) and the watchdog that removes it in the end."""

    def __init__(self) -> None:
        """Start the watchdog, and with it the directory. Raises OSError where none can be made."""
        parent = tempfile.gettempdir()
        parent = parent if len(parent) <= _LONGEST_TEMP_DIR else "/tmp"
        self.directory = Path(parent, f"nanovllm-{os.urandom(4).hex()}")
        # who removes the directory also makes it: there is no moment at which Ctrl-C would leave one behind
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(self.directory), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # what a watchdog that was killed did not read must not come up again in `close`
            start_new_session=True,
            cwd="/",
        )
        # pipes, by the arguments above
        self._commands, self._answers = cast("IO[bytes]", process.stdin), cast("IO[bytes]", process.stdout)
        try:
            kind, _, answer = self._answers.readline().decode().strip().partition(" ")
            process.wait()  # it left a child behind, which is the watchdog
            if kind != "pid":
                raise OSError(f"{self.directory} could not be made: {answer or 'its watchdog did not start'}")
            self.pid = int(answer)
        except BaseException:
            self._commands.close()  # the watchdog leaves and takes the directory along
            self._answers.close()
            raise

    def watch(self, *pids: int) -> None:
        """Have these processes killed in the end."""
        self._tell("".join(f"watch {pid}\n" for pid in pids))

    def finish(self) -> None:
        """Kill what is left, remove the run directory, and wait until that is done. Twice is fine."""
        if not self._commands.closed:
            self._tell("finish\n")
            select.select([self._answers], [], [], _SWEEP_SECONDS + 5.0)  # readable when the watchdog has left
            self._commands.close()
            self._answers.close()
        shutil.rmtree(self.directory, ignore_errors=True)  # in case the watchdog itself was killed

    def _tell(self, text: str) -> None:
        # the watchdog may have been killed; the launcher's own clean-up still runs
        with contextlib.suppress(BrokenPipeError):
            self._commands.write(text.encode())


def _stat(pid: int) -> tuple[str, str] | None:
    """(state, start time) of a process, so that a reused pid is not taken for it; None where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]


def _identity(pid: int) -> dict[int, str]:
    stat = _stat(pid)
    return {pid: stat[1] if stat is not None else ""}


def _living(watched: dict[int, str]) -> Iterator[int]:
    if sys.platform.startswith("linux"):
        for pid, started in watched.items():
            stat = _stat(pid)
            if stat is not None and stat[0] not in "ZX" and stat[1] == started:
                yield pid
        return
    for pid in watched:
        try:
            os.kill(pid, 0)
            yield pid
        except OSError:
            continue


def _writers(directory: str, spared: set[int]) -> Iterator[int]:
    """Processes whose standard output or error is a file below `directory`: it is private, so they are ours."""
    for entry in os.listdir("/proc") if sys.platform.startswith("linux") else []:
        if not entry.isdigit() or int(entry) in spared:
            continue
        for stream in "12":
            try:
                if os.readlink(f"/proc/{entry}/fd/{stream}").startswith(directory + "/"):
                    yield int(entry)
                    break
            except OSError:
                break


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        if kill is os.killpg and os.getpgid(pid) != pid:
            continue  # Ray's processes share the launcher's group
        kill(pid, signal.SIGKILL)


def _sweep(directory: str, watched: dict[int, str], spared: set[int]) -> None:
    deadline = time.monotonic() + _SWEEP_SECONDS
    while time.monotonic() < deadline:
        left = {*_living(watched), *_writers(directory, spared)}
        if not left:
            break
        for pid in left:
            try:
                _kill(pid)
            except (ProcessLookupError, PermissionError):
                continue
        time.sleep(0.02)
    while os.path.exists(directory) and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.02)


def _listen(launcher: dict[int, str], watched: dict[int, str]) -> None:
    """Return when the launcher says `finish` or is gone, even if a fork of it keeps the pipe open."""
    buffer = b""
    while any(_living(launcher)):
        if not select.select([0], [], [], _PARENT_CHECK_SECONDS)[0]:
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            return
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            if line == b"finish":
                return
            watched |= _identity(int(line.split()[1]))


def main() -> None:
    """Entry point of the watchdog: `supervisor.py RUN_DIRECTORY LAUNCHER_PID`."""
    directory, launcher = sys.argv[1], int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it leaves when the launcher does, and not before
    identity = _identity(launcher)
    try:
        # no longer a child of the launcher, it escapes a host (a Ray worker is one) that kills its children as it ends
        if os.fork():
            os._exit(0)
        os.mkdir(directory, 0o700)
    except OSError as error:
        os.write(1, f"error {error.strerror}\n".encode())
        return
    with contextlib.suppress(BrokenPipeError):  # a launcher that is gone already is noticed below
        os.write(1, f"pid {os.getpid()}\n".encode())
    watched: dict[int, str] = {}
    _listen(identity, watched)
    _sweep(directory, watched, spared={os.getpid(), launcher})


if __name__ == "__main__":
    main()
