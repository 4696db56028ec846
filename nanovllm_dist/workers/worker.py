"""The worker process of one rank: connects, loads, then runs the steps it is sent, in order.

    python -m nanovllm_dist.workers.worker < spec.json

It reads a `WorkerSpec` from standard input. It decides nothing: a step it cannot run ends the process with the
error as its last message.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from traceback import format_exception_only
from typing import TYPE_CHECKING, TypeVar

import msgspec
import zmq

from nanovllm_dist.errors import ConfigError, EngineDeadError, NanoVLLMError
from nanovllm_dist.models.config import read_model_config
from nanovllm_dist.wire import messages as wire
from nanovllm_dist.wire.sockets import Channel
from nanovllm_dist.workers.platform import get_platform

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from nanovllm_dist.workers.running_step import RunningStep

T = TypeVar("T", bound="wire.ToWorker")
log = logging.getLogger("worker")

# The coordinator pings every second; this long without a word and it is gone
_SILENCE_SECONDS = 60.0
_PROGRESS_SECONDS = 0.1
# How often a worker looks whether its step is done or the next one is here
_LOOK_SECONDS = 2e-5


class _LeaveError(Exception):
    """The coordinator sent Shutdown."""


class Worker:
    """One rank, from its first message to its last."""

    def __init__(self, spec: wire.WorkerSpec) -> None:
        self._spec = spec
        self._context = zmq.Context()
        self._channel = Channel(
            self._context, spec.worker_endpoint, wire.STEP_FRAME_LIMIT, spec.keys, wire.worker_identity(spec.rank)
        )
        self._last_progress = 0.0
        self._received = 0.0  # when the last frame was in hand
        self._traced: list[wire.RankTimes] = []

    def run(self) -> int:
        """Serve until told to leave. Returns the exit code."""
        try:
            self._serve()
        except _LeaveError:
            return 0
        except Exception as error:
            if isinstance(error, ConfigError):  # in a line: where in the code it was found is of no use
                log.error("rank %d failed:\n%s", self._spec.rank, "".join(format_exception_only(error)).strip())
            else:
                log.exception("rank %d failed", self._spec.rank)
            self._send(wire.WorkerFailed(wire.ErrorInfo.of(error)))
            return 1
        finally:
            self._channel.close()
            self._context.term()
        return 0

    def _serve(self) -> None:
        # torch and the model are imported late: the import takes seconds, and errors in it must be reported too
        from nanovllm_dist.workers.model_runner import ModelRunner

        spec, config = self._spec, self._spec.config
        platform = get_platform(config.device)
        model_config = read_model_config(config.model, config.hf_overrides)
        device = platform.open_device(spec.device_index, config)
        comm = platform.connect(spec.rank, config, self._rendezvous())
        self._progress("load", 0, 0)
        runner = ModelRunner(config, model_config, platform, comm, device)
        runner.load(lambda done, total: self._progress("load", done, total))
        self._progress("profile", 0, 0)
        self._send(wire.CacheMeasured(runner.measure_blocks()))
        blocks = self._expect(wire.AllocateCache).num_blocks
        runner.allocate(blocks, lambda done, total: self._progress("warmup", done, total))
        gc.collect()
        gc.freeze()
        self._send(wire.WorkerReady())
        self._steps(runner.start)

    def _steps(self, start: Callable[[wire.Step], RunningStep | None]) -> None:
        """Start steps as they come; answer each when it is done, but start the next first if it is here."""
        running: deque[tuple[RunningStep, float]] = deque()
        while True:
            while running and not self._channel.waiting():
                if running[0][0].done() or len(running) == self._spec.config.max_steps_in_flight:
                    self._answer(*running.popleft())
                else:
                    time.sleep(_LOOK_SECONDS)
            message = self._receive()
            if isinstance(message, wire.Ping):
                self._report_traced()
                continue
            received = self._received
            step = start(self._require(wire.Step, message))
            if step is not None:
                running.append((step, received))
                if step.done():  # where nothing runs ahead of the host
                    self._answer(*running.popleft())

    def _answer(self, step: RunningStep, received: float) -> None:
        result = step.result()
        done = time.monotonic()
        if self._spec.rank == 0:
            self._send(result)
        if step.traced:
            self._traced.append(wire.RankTimes(step.number, received, step.launched, done))

    def _report_traced(self) -> None:
        if self._traced:
            self._send(wire.TracedSteps(self._traced))
            self._traced = []

    def _rendezvous(self) -> Store | None:
        """The store over which the ranks find each other; rank 0 serves it on a port of the system's choosing."""
        from torch._C._distributed_c10d import TCPStore

        spec, world_size = self._spec, self._spec.config.tensor_parallel_size
        if world_size == 1:
            self._send(wire.WorkerHello(spec.rank, os.getpid()))
            return None
        if spec.rank == 0:
            # given no socket, the store would listen on every interface, and it asks nobody for a key
            family = socket.AF_INET6 if ":" in spec.host else socket.AF_INET
            listener = socket.create_server((spec.host, 0), family=family)
            port = listener.getsockname()[1]
            self._send(wire.WorkerHello(0, os.getpid(), f"{spec.host}:{port}"))
            return TCPStore(
                spec.host, port, world_size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        self._send(wire.WorkerHello(spec.rank, os.getpid()))
        host, _colon, port = self._expect(wire.Rendezvous).address.rpartition(":")
        return TCPStore(host, int(port), world_size, is_master=False)

    def _expect(self, kind: type[T]) -> T:
        """The next message of that kind; pings are passed over."""
        while isinstance(message := self._receive(), wire.Ping):
            pass
        return self._require(kind, message)

    def _receive(self) -> wire.ToWorker:
        frame = self._channel.receive(_SILENCE_SECONDS)
        self._received = time.monotonic()
        if frame is None:
            raise EngineDeadError(f"the coordinator has been silent for {_SILENCE_SECONDS:.0f} s")
        return wire.decode_to_worker(frame)

    @staticmethod
    def _require(kind: type[T], message: wire.ToWorker) -> T:
        if isinstance(message, kind):
            return message
        if isinstance(message, wire.Shutdown):
            raise _LeaveError
        raise EngineDeadError(f"expected {kind.__name__}, got {type(message).__name__}")

    def _progress(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done in (0, total) or now - self._last_progress > _PROGRESS_SECONDS:
            self._last_progress = now
            self._send(wire.WorkerProgress(phase, done, total))

    def _send(self, message: wire.FromWorker) -> None:
        self._channel.send(wire.encode(message))


def main() -> int:
    """Process entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to handle; it ends us in order
    try:
        spec = msgspec.json.decode(sys.stdin.buffer.read(), type=wire.WorkerSpec)
        worker = Worker(spec)
    except (NanoVLLMError, msgspec.MsgspecError) as error:
        log.error("%s", error)
        return 1
    return worker.run()


if __name__ == "__main__":
    sys.exit(main())
