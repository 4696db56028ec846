"""Clients: who is connected, how much each has left unread, and when one is given up. What sends is handed in.

ZeroMQ queues without end for a client that does not read, and counts frames where memory counts bytes. So bytes are
counted here: clients say what they have read, and nothing more is queued for one that is too far behind.
"""

from __future__ import annotations

from collections.abc import Callable

from nanovllm_dist.errors import EngineDeadError, NanoVLLMError, WireError
from nanovllm_dist.wire import messages as wire

_MAX_CLIENTS = 1024


class Clients:
    """Clients that said Hello, by identity.

    `send(identity, frame)` queues a frame, or says that there is no such peer (any more); `on_gone(identity, error)` is
    called when a client left (error None), or is given up with that error.
    """

    def __init__(
        self, send: Callable[[bytes, bytes], bool], on_gone: Callable[[bytes, NanoVLLMError | None], None]
    ) -> None:
        self._send, self._on_gone = send, on_gone
        self._unread: dict[bytes, int] = {}  # bytes

    def welcome(self, client: bytes, frame: bytes) -> None:
        """Know a client from now on, and send `frame` to it. Raises WireError when there are too many."""
        if client not in self._unread:
            if len(self._unread) >= _MAX_CLIENTS:
                self.send_all(frame)  # those that left are noticed by it
            if len(self._unread) >= _MAX_CLIENTS:
                raise WireError(f"{_MAX_CLIENTS} clients are connected already")
            self._unread[client] = 0
        self.send(client, frame)

    def check_known(self, client: bytes) -> None:
        """Raise EngineDeadError for one that has said no Hello since it connected, or was given up."""
        if client not in self._unread:
            raise EngineDeadError("this connection is new or was lost, and requests of a lost one ended: connect again")

    def has_read(self, client: bytes, size: int) -> None:
        """So many more bytes."""
        if client in self._unread:
            self._unread[client] = max(0, self._unread[client] - size)

    def send_all(self, frame: bytes) -> None:
        """Send to every known client."""
        for client in list(self._unread):
            self.send(client, frame)

    def send(self, client: bytes, frame: bytes) -> bool:
        """Queue a frame, for a client that is not known too; False when it left or is given up."""
        unread = self._unread.get(client, 0) + len(frame)
        if unread > wire.UNREAD_LIMIT:
            self._give_up(client)
        elif not self._send(client, frame):
            self._forget(client, None)
        else:
            if client in self._unread:
                self._unread[client] = unread
            return True
        return False

    def _forget(self, client: bytes, error: NanoVLLMError | None) -> None:
        self._unread.pop(client, None)
        self._on_gone(client, error)

    def _give_up(self, client: bytes) -> None:
        """ZeroMQ cannot cut off one peer; this one hears why after all that it left unread."""
        error = EngineDeadError(
            f"more than {wire.UNREAD_LIMIT} bytes of answers were left unread, so this client was dropped and its "
            "requests were aborted: connect again, and run fewer at a time or ask for fewer log-probabilities"
        )
        self._forget(client, error)
        self._send(client, wire.encode(wire.ProtocolError(wire.ErrorInfo.of(error))))
