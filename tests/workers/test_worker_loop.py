"""A worker starts steps in order, may run ahead by one, and answers each as soon as it is done, whatever else comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.wire import messages as wire
from nanovllm_dist.wire.sockets import Server
from nanovllm_dist.workers.running_step import RunningStep
from nanovllm_dist.workers.worker import Worker, _LeaveError

STEP_SECONDS = 0.1


class SlowCopy:
    """Tokens that a device takes a while to make."""

    def __init__(self) -> None:
        self.due = time.monotonic() + STEP_SECONDS

    def done(self) -> bool:
        return time.monotonic() >= self.due

    def tokens(self) -> list[int]:
        time.sleep(max(0.0, self.due - time.monotonic()))
        return [7]


class Coordinator:
    """The other end of the worker's channel."""

    def __init__(self, directory: Path, rank: int = 0) -> None:
        self.rank = rank
        self.context = zmq.Context()
        self.server = Server(self.context, f"ipc://{directory}/workers", wire.RESULT_FRAME_LIMIT, None)
        self.started: list[int] = []
        spec = wire.WorkerSpec(
            config=EngineConfig(model="none", max_steps_in_flight=2), rank=rank, worker_endpoint=self.server.endpoint
        )
        self.worker = Worker(spec)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.worker._send(wire.WorkerReady())  # its first message opens the way back
        assert isinstance(self.answer(), wire.WorkerReady)

    def _run(self) -> None:
        with pytest.raises(_LeaveError):
            self.worker._steps(self.start)

    def start(self, step: wire.Step) -> RunningStep | None:
        self.started.append(step.step)
        if self.rank != 0 and not step.traced:
            return None
        return RunningStep(step, time.monotonic(), SlowCopy(), [], [])

    def send(self, message: wire.ToWorker) -> None:
        assert self.server.send(wire.worker_identity(self.rank), wire.encode(message))

    def send_step(self, number: int, traced: bool = False) -> None:
        self.send(wire.Step(0, number, b"", b"", b"", b"", [], traced))

    def answer(self) -> wire.FromWorker:
        assert self.server.socket.poll(5_000), "no answer came"
        received = self.server.receive()
        assert received is not None
        return wire.decode_from_worker(received[1])

    def close(self) -> None:
        self.send(wire.Shutdown())
        self.thread.join(5)
        self.worker._channel.close()
        self.worker._context.term()
        self.server.close()
        self.context.term()


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    coordinator = Coordinator(tmp_path)
    yield coordinator
    coordinator.close()


def test_the_next_step_starts_before_the_last_is_answered(coordinator: Coordinator) -> None:
    coordinator.send_step(0)
    coordinator.send_step(1)
    time.sleep(STEP_SECONDS / 2)
    assert coordinator.started == [0, 1]
    answers = [coordinator.answer(), coordinator.answer()]
    assert [answer.step for answer in answers if isinstance(answer, wire.StepResult)] == [0, 1]


def test_a_ping_does_not_hold_an_answer_back(coordinator: Coordinator) -> None:
    coordinator.send_step(0)
    coordinator.send(wire.Ping())
    answer = coordinator.answer()
    assert isinstance(answer, wire.StepResult)
    assert answer.step == 0


def test_the_times_of_traced_steps_come_with_a_ping_and_not_with_the_steps(coordinator: Coordinator) -> None:
    sent = time.monotonic()
    for number, traced in enumerate((False, True, True, False)):
        coordinator.send_step(number, traced)
    assert [type(coordinator.answer()) for _ in range(4)] == [wire.StepResult] * 4
    answered = time.monotonic()
    coordinator.send(wire.Ping())

    message = coordinator.answer()

    assert isinstance(message, wire.TracedSteps)
    assert [one.step for one in message.times] == [1, 2]
    for one in message.times:
        assert sent <= one.received <= one.launched <= one.done <= answered
        assert one.done - one.launched >= STEP_SECONDS
    coordinator.send(wire.Ping())
    coordinator.send_step(9)
    assert isinstance(coordinator.answer(), wire.StepResult)  # the second ping had nothing to bring


def test_a_rank_that_answers_no_steps_tells_the_times_of_traced_ones(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path, rank=1)
    for number, traced in enumerate((False, True, True, False)):
        coordinator.send_step(number, traced)
    time.sleep(3 * STEP_SECONDS)
    coordinator.send(wire.Ping())
    message = coordinator.answer()
    assert isinstance(message, wire.TracedSteps)
    assert [one.step for one in message.times] == [1, 2]
    assert coordinator.started == [0, 1, 2, 3]
    coordinator.close()
