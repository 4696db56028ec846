"""Ctrl-C and SIGTERM as exceptions of the main thread."""

from __future__ import annotations

import signal
from collections import namedtuple
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, except that a chat, where Ctrl-C stops an answer, leaves."""


def handle_signals() -> None:
    """Install both handlers; a program started in the background may have inherited SIGINT as ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)


def forget_interrupt() -> None:
    """Let the process end with an exit code of its own choice after an interrupt that was caught.

    CPython remembers a KeyboardInterrupt that left code run from a string, which is how modules make their dataclasses
    while they are imported, and at exit of `python -m` ends itself by SIGINT. Running another string makes it forget:
    named tuples are made that way.
    """
    namedtuple("_Nothing", ())


def _terminate(*_: object) -> NoReturn:
    raise Terminated
