"""The bell that wakes a thread which waits for sockets: ringing never waits, and no ring is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq

from nanovllm_dist.wire.wakeup import Wakeup


@pytest.fixture
def wakeup() -> Iterator[Wakeup]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    wakeup = Wakeup(context)
    yield wakeup
    wakeup.close()
    context.term()


def test_a_ring_wakes_and_a_clear_makes_quiet(wakeup: Wakeup) -> None:
    assert not wakeup.socket.poll(0)
    wakeup.ring()
    assert wakeup.socket.poll(1000)
    wakeup.clear()
    assert not wakeup.socket.poll(0)
    wakeup.ring()
    assert wakeup.socket.poll(1000)


@pytest.mark.timeout(20)
def test_rings_that_nobody_hears_never_block_and_count_once(wakeup: Wakeup) -> None:
    for _ in range(5000):  # more than ZeroMQ would hold
        wakeup.ring()
    wakeup.clear()
    assert not wakeup.socket.poll(0)


def test_a_ring_after_the_end_and_a_clear_without_a_ring_do_nothing(wakeup: Wakeup) -> None:
    wakeup.clear()
    wakeup.close()
    wakeup.ring()
    wakeup.close()
