"""JsonProcess: a helper process of the benchmark that speaks JSON lines over its standard input and output.

It dies with this process, and its standard error is kept for the case that it fails. It knows no messages.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

from typing_extensions import Self

from nanovllm_dist.errors import NanoVLLMError, error_from_code
from nanovllm_dist.launcher import child

_END_SECONDS = 20.0
_TAIL_BYTES = 4096


class JsonProcess:
    """`python -m module` with JSON lines in and out; a context manager that ends it.

    `environment` is complete; it replaces this process's own. `python` is the interpreter, this process's by default.
    """

    def __init__(
        self, name: str, module: str, environment: Mapping[str, str] | None = None, python: str = sys.executable
    ) -> None:
        self._name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            [python, "-u", child.__file__, str(os.getpid()), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(environment) if environment is not None else None,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, message: Any) -> None:
        """Write one line. A process that has gone is reported by the next `receive`."""
        with contextlib.suppress(BrokenPipeError):
            stdin = _pipe(self._process.stdin)
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for the next line.

        Raises the typed error that the process reports as {"error": message, "code": code}, or NanoVLLMError with
        the end of its log when it ended or wrote something else.
        """
        line = _pipe(self._process.stdout).readline()
        try:
            message = json.loads(line)
        except ValueError:
            raise NanoVLLMError(f"{self._name} ended or misspoke{self._log_tail()}") from None
        if not isinstance(message, dict):
            raise NanoVLLMError(f"{self._name} misspoke: {line[:80]!r}")
        if "error" in message:
            error = error_from_code(str(message.get("code")), f"{self._name}: {message['error']}")
            raise error
        return message

    def close(self) -> None:
        """Close its input, which is its sign to leave, and wait; it is killed if it does not."""
        with contextlib.suppress(BrokenPipeError):
            _pipe(self._process.stdin).close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _pipe(self._process.stdout).close()
        self._log.close()

    def _log_tail(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _TAIL_BYTES))
        text = self._log.read().decode(errors="replace").strip()
        return f"; last lines of its log:\n{text}" if text else " without a word"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.terminate()
        self.close()


def reserve_stdout() -> IO[str]:
    """In the helper: the channel to its parent; whatever libraries print goes to standard error from now on."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def write_line(channel: IO[str], message: Any) -> None:
    """In the helper: one message to the parent."""
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise NanoVLLMError("a helper process was started without pipes")
    return stream
