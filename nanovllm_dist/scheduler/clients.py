"""Clients: who is connected, how much each has left unread, and when one is given up. What sends is handed in.

ZeroMQ queues without end for a client that does not read, and counts frames where memory counts bytes. So bytes are
counted here: clients say what they have read, and nothing more is queued for one that is too far behind.
"""

from __future__ import annotations

from collections.abc import Callable

from nanovllm_dist.errors import EngineDeadError, NanoVLLMError, WireError
from nanovllm_dist.wire import messages as wire

_MAX_CLIENTS = 1024
_MOST_TOLD = 2**16  # bytes queued for one that is not known: what is wrong, a few hundred times


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
        self._owed: dict[bytes, int] = {}  # the same of those that were given up
        self._told: dict[bytes, int] = {}  # bytes sent to those that are not known

    def welcome(self, client: bytes, frame: bytes) -> None:
        """Know a client from now on, and send `frame` to it. Raises WireError when there are too many, or this one has
        most of what it was given up for still to read."""
        if self._owed.get(client, 0) > wire.UNREAD_LIMIT // 2:
            raise WireError(f"{self._owed[client]} bytes for this client are still unread: read them, or connect anew")
        if client not in self._unread:
            if len(self._unread) >= _MAX_CLIENTS:
                self.send_all(frame)  # those that left are noticed by it
            if len(self._unread) >= _MAX_CLIENTS:
                raise WireError(f"{_MAX_CLIENTS} clients are connected already")
            self._unread[client] = self._owed.pop(client, 0)
            self._told.pop(client, None)
        self.send(client, frame)

    def check_known(self, client: bytes) -> None:
        """Raise EngineDeadError for one that has said no Hello since it connected, or was given up."""
        if client not in self._unread:
            raise EngineDeadError("this connection is new or was lost, and requests of a lost one ended: connect again")

    def has_read(self, client: bytes, size: int) -> None:
        """So many more bytes."""
        for counts in (self._unread, self._owed):
            if client in counts:
                counts[client] = max(0, counts[client] - size)

    def send_all(self, frame: bytes) -> None:
        """Send to every known client."""
        for client in list(self._unread):
            self.send(client, frame)

    def send(self, client: bytes, frame: bytes) -> bool:
        """Queue a frame; False when the client left, or is given up. One that is not known gets little."""
        if client not in self._unread:
            return self._tell(client, frame)
        unread = self._unread[client] + len(frame)
        if unread > wire.UNREAD_LIMIT:
            self._give_up(client)
        elif not self._send(client, frame):
            self._forget(client, None)
        else:
            self._unread[client] = unread
            return True
        return False

    def _tell(self, client: bytes, frame: bytes) -> bool:
        told = self._told.get(client, 0) + len(frame)
        if told > _MOST_TOLD:
            return False
        if len(self._told) >= _MAX_CLIENTS:
            self._told.clear()
        self._told[client] = told
        return self._send(client, frame)

    def _forget(self, client: bytes, error: NanoVLLMError | None) -> None:
        self._unread.pop(client, None)
        self._on_gone(client, error)

    def _give_up(self, client: bytes) -> None:
        """ZeroMQ cannot cut off one peer; this one hears why after all that it left unread."""
        error = EngineDeadError(
            f"more than {wire.UNREAD_LIMIT} bytes of answers were left unread, so this client was dropped and its "
            "requests were aborted: connect again, and run fewer at a time or ask for fewer log-probabilities"
        )
        if len(self._owed) >= _MAX_CLIENTS:
            self._owed.pop(next(iter(self._owed)))
        self._owed[client] = self._unread[client]
        self._forget(client, error)
        self._send(client, wire.encode(wire.ProtocolError(wire.ErrorInfo.of(error))))
