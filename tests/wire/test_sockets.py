"""The ZeroMQ ends: ordered, private, authenticated across hosts, and unharmed by what strangers send."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from nanovllm_dist.errors import EngineConnectError, EngineDeadError
from nanovllm_dist.wire.sockets import Channel, Server, new_keys

LIMIT = 10_000


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


def receive(server: Server, seconds: float = 5.0) -> tuple[bytes, bytes] | None:
    """Poll a server."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.socket.poll(50):
            return server.receive()
    return None


def test_frames_arrive_in_order_and_none_is_dropped(context, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    server = Server(context, f"ipc://{tmp_path}/s", LIMIT, None)
    channel = Channel(context, server.endpoint, LIMIT, None, b"peer")
    channel.send(b"hello")
    assert receive(server) == (b"peer", b"hello")

    for index in range(20_000):  # far over ZeroMQ's default high-water mark, with a receiver that is not reading
        assert server.send(b"peer", str(index).encode())

    assert [channel.receive(5.0) for _ in range(20_000)] == [str(index).encode() for index in range(20_000)]
    channel.close()
    server.close()


def test_a_second_peer_of_the_same_identity_takes_nothing_from_the_first(context, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    server = Server(context, f"ipc://{tmp_path}/s", LIMIT, None)
    first = Channel(context, server.endpoint, LIMIT, None, b"rank-0")
    first.send(b"x")
    assert receive(server) is not None
    intruder = Channel(context, server.endpoint, LIMIT, None, b"rank-0")
    intruder.send(b"mine")
    assert receive(server, 0.5) is None
    server.send(b"rank-0", b"plan")
    assert first.receive(2.0) == b"plan"
    assert intruder.receive(0.3) is None
    for end in (first, intruder, server):
        end.close()  # type: ignore[attr-defined]


def test_sending_to_a_peer_that_left_says_so(context, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    server = Server(context, f"ipc://{tmp_path}/s", LIMIT, None)
    channel = Channel(context, server.endpoint, LIMIT, None, b"peer")
    channel.send(b"x")
    receive(server)
    channel.close()
    deadline = time.monotonic() + 5
    while server.send(b"peer", b"y") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.send(b"peer", b"z")
    server.close()


def test_an_oversized_frame_cuts_off_its_sender_and_nobody_else(context, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    server = Server(context, f"ipc://{tmp_path}/s", LIMIT, None)
    good = Channel(context, server.endpoint, LIMIT, None, b"good")
    bad = Channel(context, server.endpoint, LIMIT * 100, None, b"bad")
    bad.send(b"x" * (LIMIT + 1))
    assert receive(server, 0.5) is None
    good.send(b"fine")
    assert receive(server) == (b"good", b"fine")
    for end in (good, bad, server):
        end.close()  # type: ignore[attr-defined]


@pytest.mark.timeout(30)
def test_sending_on_a_channel_that_a_too_large_frame_cut_off_is_an_error_and_not_a_wait(
    context,  # type: ignore[no-untyped-def]
    tmp_path: Path,
) -> None:
    server = Server(context, f"ipc://{tmp_path}/s", LIMIT, None)
    channel = Channel(context, server.endpoint, LIMIT, None, b"peer")
    channel.send(b"hello")
    assert receive(server) is not None
    assert server.send(b"peer", b"x" * (LIMIT + 1))
    assert channel.receive(0.5) is None
    with pytest.raises(EngineDeadError, match="above 10000 bytes"):
        channel.send(b"are you there?", timeout=0.2)
    for end in (channel, server):
        end.close()  # type: ignore[attr-defined]


def test_closing_a_server_removes_its_socket_file(context, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    server = Server(context, f"ipc://{tmp_path}/s", LIMIT, None)
    assert (tmp_path / "s").exists()
    server.close()
    assert not (tmp_path / "s").exists()


def test_a_port_that_is_taken_is_an_error_that_names_it(context) -> None:  # type: ignore[no-untyped-def]
    keys = new_keys()
    server = Server(context, "tcp://127.0.0.1:0", LIMIT, keys)
    with pytest.raises(EngineConnectError, match=r"cannot listen on tcp://127\.0\.0\.1"):
        Server(context, server.endpoint, LIMIT, keys)
    server.close()


def test_tcp_lets_in_the_right_key_only(context) -> None:  # type: ignore[no-untyped-def]
    keys = new_keys()
    server = Server(context, "tcp://127.0.0.1:0", LIMIT, keys)
    stranger_keys = new_keys()
    stranger = Channel(
        context,
        server.endpoint,
        LIMIT,
        type(keys)(
            server_public=keys.server_public,
            server_secret="",
            client_public=stranger_keys.client_public,
            client_secret=stranger_keys.client_secret,
        ),
    )
    stranger.send(b"let me in")
    assert receive(server, 1.0) is None
    plain = context.socket(zmq.DEALER)
    plain.connect(server.endpoint)
    plain.send(b"no keys at all")
    assert receive(server, 1.0) is None
    friend = Channel(context, server.endpoint, LIMIT, keys)
    friend.send(b"hello")
    received = receive(server)
    assert received is not None
    assert received[1] == b"hello"
    plain.close(linger=0)
    for end in (stranger, friend, server):
        end.close()  # type: ignore[attr-defined]


def test_tcp_without_keys_is_refused_on_both_ends(context) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EngineConnectError, match="needs keys"):
        Server(context, "tcp://127.0.0.1:0", LIMIT, None)
    with pytest.raises(EngineConnectError, match="key file"):
        Channel(context, "tcp://127.0.0.1:1", LIMIT, None)
