"""The ZeroMQ ends: a ROUTER that serves many peers and a DEALER that talks to one, with limits and keys.

Each peer has its own ordered channel, without a high-water mark that could drop a frame silently. It does not
know messages: frames are bytes.
"""

from __future__ import annotations

from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from nanovllm_dist.errors import EngineConnectError, EngineDeadError
from nanovllm_dist.wire.messages import Keys

_LINGER_MS = 500
_SEND_SECONDS = 2.0
_HEARTBEAT_MS = 5_000
_HEARTBEAT_TIMEOUT_MS = 60_000


def new_keys() -> Keys:
    """Fresh CURVE keys for one engine."""
    server_public, server_secret = zmq.curve_keypair()
    client_public, client_secret = zmq.curve_keypair()
    return Keys(
        server_public=server_public.decode(),
        server_secret=server_secret.decode(),
        client_public=client_public.decode(),
        client_secret=client_secret.decode(),
    )


class Server:
    """A bound ROUTER. A peer is named by its identity; a second peer of the same identity is refused.

    `frame_limit`: a peer that sends a larger frame is disconnected by ZeroMQ before the frame is read.
    Raises EngineConnectError when the endpoint cannot be bound.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, frame_limit: int, keys: Keys | None
    ) -> None:
        self._authenticator: ThreadAuthenticator | None = None
        self._own_context: zmq.Context[zmq.Socket[bytes]] | None = None
        if endpoint.startswith("tcp:"):  # a context has one authenticator, and each server its own keys
            context = self._own_context = zmq.Context()
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.MAXMSGSIZE, frame_limit)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.LINGER, _LINGER_MS)
        if endpoint.startswith("tcp:"):
            self._require_keys(context, endpoint, keys)
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise EngineConnectError(f"cannot listen on {endpoint}: {error}; choose another port or host") from None
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _require_keys(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: Keys | None) -> None:
        if keys is None:
            raise EngineConnectError(f"{endpoint} crosses hosts and needs keys")
        _heartbeat(self.socket)
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", _OneClientKey(keys.client_public))
        self.socket.curve_server = True
        self.socket.curve_secretkey = keys.server_secret.encode()
        self.socket.curve_publickey = keys.server_public.encode()

    def receive(self) -> tuple[bytes, bytes] | None:
        """(identity, frame) of the next message, or None when there is none now."""
        # asking first is cheaper than the exception of a receive that finds nothing
        if not int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return None
        identity = frame = self.socket.recv()
        while self.socket.getsockopt(zmq.RCVMORE):
            frame = self.socket.recv()
        return identity, frame

    def send(self, identity: bytes, frame: bytes) -> bool:
        """Queue `frame` for that peer; False when it is not connected (any more)."""
        try:
            self.socket.send(identity, zmq.NOBLOCK | zmq.SNDMORE)
            self.socket.send(frame, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def close(self) -> None:
        """Unbind, and remove the file of an ipc endpoint."""
        self.socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        if self._own_context is not None:
            self._own_context.term()
            self._own_context = None
        path = getattr(self, "endpoint", "")
        if path.startswith("ipc://"):
            Path(path.removeprefix("ipc://")).unlink(missing_ok=True)


class _OneClientKey:
    """Lets in the one client key that the launcher made."""

    def __init__(self, client_public: str) -> None:
        self._client_public = client_public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        """pyzmq's hook: is this key allowed?"""
        return key == self._client_public


class Channel:
    """A DEALER connected to one server; usable by one thread."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        frame_limit: int,
        keys: Keys | None,
        identity: bytes = b"",
    ) -> None:
        self.endpoint = endpoint
        self._frame_limit = frame_limit
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.MAXMSGSIZE, frame_limit)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.LINGER, _LINGER_MS)
        if identity:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        if endpoint.startswith("tcp:"):
            if keys is None:
                raise EngineConnectError(f"{endpoint} needs the engine's key file")
            _heartbeat(self.socket)
            self.socket.curve_serverkey = keys.server_public.encode()
            self.socket.curve_publickey = keys.client_public.encode()
            self.socket.curve_secretkey = keys.client_secret.encode()
        self.socket.connect(endpoint)

    def send(self, frame: bytes, timeout: float = _SEND_SECONDS) -> None:
        """Queue one frame. Raises EngineDeadError when the connection is cut for good, after `timeout` seconds."""
        try:
            self.socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            # without a high-water mark this is a socket that ZeroMQ took off the line, and does not connect again
            if not self.socket.poll(int(timeout * 1000), zmq.POLLOUT):
                raise EngineDeadError(
                    f"the connection to {self.endpoint} is cut: the other end sent a frame above {self._frame_limit} "
                    "bytes or broke the protocol; connect again"
                ) from None
            self.socket.send(frame)

    def waiting(self) -> bool:
        """Whether a frame is there to be received."""
        return bool(int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def receive(self, timeout: float | None = None) -> bytes | None:
        """The next frame; None when `timeout` seconds pass without one (None waits for ever)."""
        if timeout is not None and not self.socket.poll(max(0, int(timeout * 1000))):
            return None
        return self.socket.recv()

    def close(self) -> None:
        """Disconnect, giving queued frames half a second to leave."""
        self.socket.close()


def _heartbeat(socket: zmq.Socket[bytes]) -> None:
    # a peer host that vanishes without closing its connections must be noticed
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
