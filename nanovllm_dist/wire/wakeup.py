"""Wakeup: lets any thread wake the one that waits for sockets, at once and without ever waiting itself.

It carries no data: what there is to do lies elsewhere, and is looked at after `clear`.
"""

from __future__ import annotations

import threading
from contextlib import suppress

import zmq


class Wakeup:
    """A bell with a socket to poll. Rung many times before it is cleared, it has been rung once."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._lock = threading.RLock()  # garbage collection may ring on a thread that is ringing
        self._rung = False
        name = f"inproc://wakeup-{id(self)}"
        self.socket, self._bell = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self.socket.bind(name)
        self._bell.connect(name)

    def ring(self) -> None:
        """Wake the waiting thread; without effect once closed."""
        with self._lock:
            if not self._rung and not self._bell.closed:
                self._rung = True
                self._bell.send(b"", zmq.NOBLOCK)

    def clear(self) -> None:
        """Be ready for the next ring. For the waiting thread, before it looks at what there is to do."""
        with self._lock:
            with suppress(zmq.Again):
                self.socket.recv(zmq.NOBLOCK)
            self._rung = False

    def close(self) -> None:
        """Close both ends. For the waiting thread."""
        with self._lock:
            self._bell.close(linger=0)
            self.socket.close(linger=0)
