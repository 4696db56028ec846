"""Ctrl-C and SIGTERM as exceptions of the main thread."""

from __future__ import annotations

import signal
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, except that a chat, where Ctrl-C stops an answer, leaves."""


def handle_signals() -> None:
    """Install both handlers; a program started in the background may have inherited SIGINT as ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(*_: object) -> NoReturn:
    raise Terminated
