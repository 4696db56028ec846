"""Start, watch and end one engine process: JSON on its standard input, files for its output.

The same code runs in the launcher and inside a Ray actor. It knows neither engines nor Ray.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

_CHILD = Path(__file__).with_name("child.py")
_TAIL_BYTES = 8192
_REAP_SECONDS = 5.0

T = TypeVar("T")


@dataclass(frozen=True)
class Program:
    """What to run: a module of this package, the JSON it reads, and environment variables to add."""

    name: str
    module: str
    spec: str
    environment: dict[str, str] = field(default_factory=dict)


class RunningProcess(Protocol):
    """One engine process, here or on another host. No method raises because the process has gone."""

    name: str
    pid: int

    def poll(self) -> int | None:
        """Exit code (negative: the signal that ended it), or None while it runs."""
        ...

    def first_line(self) -> str | None:
        """The first complete line of its standard output, or None so far."""
        ...

    def log_tail(self) -> str:
        """The last lines of its log."""
        ...

    def terminate(self) -> None:
        """Ask it to leave (SIGTERM)."""
        ...

    def kill(self) -> None:
        """End it and what it started (SIGKILL to its group)."""
        ...


class LocalProcess:
    """A process on this host in a session of its own; its output is in `directory`/NAME.out and NAME.log."""

    def __init__(self, program: Program, directory: Path) -> None:
        self.name = program.name
        self._out = directory / f"{program.name}.out"
        self._log = directory / f"{program.name}.log"
        spec = directory / f"{program.name}.json"
        with _private(spec) as stdin, _private(self._out) as stdout, _private(self._log) as stderr:
            stdin.write(program.spec.encode())
            stdin.seek(0)
            spec.unlink()  # it may hold keys; the open file is enough
            self._process = subprocess.Popen(
                [sys.executable, "-u", str(_CHILD), str(os.getpid()), program.module],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, **program.environment},
                start_new_session=True,
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""
        return self._process.poll()

    def first_line(self) -> str | None:
        """The first complete line of its standard output, or None so far."""
        text = self._out.read_text(encoding="utf-8", errors="replace")
        line, newline, _ = text.partition("\n")
        return line if newline else None

    def log_tail(self) -> str:
        """The last lines of its log."""
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - _TAIL_BYTES))
            return log.read().decode(errors="replace").strip()

    def terminate(self) -> None:
        """SIGTERM, if it still runs."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to its process group, and reap it."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel, it ends with its system call
            self._process.wait(_REAP_SECONDS)


def _private(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "w+b")


class LongLivedThread:
    """One daemon thread that runs calls in order.

    Linux ends a child tied to its parent when the *thread* that started it ends, so every child is started here
    and not in whichever thread of the user's program creates the engine.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="nanovllm-processes", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run `call` after those before it."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:  # the caller's to handle, in its own thread
                future.set_exception(error)

        self._calls.put(run)
        return future

    def run(self, call: Callable[[], T]) -> T:
        """Run `call` there and wait for its result."""
        return self.submit(call).result()

    def close(self) -> None:
        """End the thread after the calls before this one; children that still run end with it."""
        self._calls.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
