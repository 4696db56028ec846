"""Engine: start a whole engine and wait until it is ready, or fail within seconds with the reason; watch it; stop it.

Used by the command line and by `DistLLM`. It does not know requests.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zmq

from nanovllm_dist import errors
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import EngineDeadError, EngineStartError, NanoVLLMError
from nanovllm_dist.launcher.cluster_lookup import RayTakenError
from nanovllm_dist.launcher.deployment import LOG_HEADING, Deployment, process_report
from nanovllm_dist.launcher.process import RunningProcess
from nanovllm_dist.launcher.resolve import launcher_kind, resolve_config
from nanovllm_dist.wire import messages as wire
from nanovllm_dist.wire.sockets import Channel

# A process that failed tells the coordinator first; how long that message may take to get here, and the process to end
_REASON_SECONDS = 1.0
_EXIT_SECONDS = 5.0


@dataclass(frozen=True)
class Progress:
    """Where start-up is: `phase` resolve, cluster, start, connect, load, profile, warmup or ready; total 0: unknown."""

    phase: str
    done: int = 0
    total: int = 0


ProgressCallback = Callable[[Progress], None]


class Engine:
    """A ready engine. It is stopped by `stop`, by garbage collection, or when the program ends, whichever is first."""

    def __init__(self, deployment: Deployment, info: wire.EngineInfo) -> None:
        self.address = deployment.address
        self.key_file: Path | None = deployment.key_file
        self.info = info
        self.config = deployment.config
        self._deployment = deployment
        self._watcher = _Watcher(deployment)
        self._finalizer = weakref.finalize(self, _stop, deployment, self._watcher)

    @classmethod
    def start(cls, config: EngineConfig, progress: ProgressCallback | bool = False) -> Engine:
        """Resolve `config`, start every process and wait until requests can be served.

        `progress` is called in the calling thread, or True for a display on stderr; with either, a model that must
        be fetched shows bars there.

        Raises:
            ConfigError, ModelNotFoundError, UnsupportedModelError: before any process has started.
            EngineStartError: a process failed or took too long; `__cause__` is its typed error where it gave one.
                Nothing is left running, also when the wait is interrupted.
        """
        if isinstance(progress, bool):
            with _display(progress) as report:
                return cls._start(config, report, fetch_bars=progress)
        return cls._start(config, progress, fetch_bars=True)

    @classmethod
    def _start(cls, config: EngineConfig, report: ProgressCallback, fetch_bars: bool) -> Engine:
        report(Progress("resolve"))
        importing = threading.Thread(target=_import_ray_backend, daemon=True)
        if launcher_kind(config) == "ray":  # importing it takes a second: do so while the model is looked up
            importing.start()
        resolved, _ = resolve_config(config, progress=fetch_bars)
        if importing.ident is not None:
            importing.join()  # Ctrl-C while two threads wait for one import can leave both waiting for good
        try:
            return cls._launch(resolved, report)
        except RayTakenError:
            if config.launcher != "auto" or config.ray_address:
                raise
            return cls._launch(resolved.replace(launcher="local"), report)

    @classmethod
    def _launch(cls, resolved: EngineConfig, report: ProgressCallback) -> Engine:
        deadline = time.monotonic() + resolved.startup_timeout
        deployment = Deployment(resolved)
        try:
            if resolved.launcher == "ray":
                report(Progress("cluster"))
            deployment.open()
            report(Progress("start"))
            deployment.launch(deadline)
            info = _wait_ready(deployment, deadline, report)
        except BaseException:
            deployment.end(grace=0.0)
            raise
        report(Progress("ready"))
        return cls(deployment, info)

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name: coordinator, worker-0, ... (on their own hosts)."""
        return {process.name: process.pid for process in self._deployment.processes}

    def alive(self) -> bool:
        """Whether no process has ended and `stop` was not called."""
        return self._finalizer.alive and self._watcher.death is None

    def wait(self, timeout: float | None = None) -> bool:
        """Block until `stop` was called; False when `timeout` seconds passed before.

        Raises:
            EngineDeadError: a process ended on its own.
        """
        ended = self._watcher.ended.wait(timeout)
        if self._watcher.death is not None:
            raise self._watcher.death
        return ended

    def on_death(self, callback: Callable[[NanoVLLMError], None]) -> None:
        """Call `callback` with an EngineDeadError, in another thread, if a process ends on its own."""
        self._watcher.on_death(callback)

    def stop(self) -> None:
        """End running requests with `abort`, end every process, remove the run directory. Idempotent."""
        self._finalizer()


class _Watcher:
    """A thread that notices when a process ends on its own."""

    def __init__(self, deployment: Deployment) -> None:
        self.death: EngineDeadError | None = None
        self.ended = threading.Event()
        self._stopping = threading.Event()
        self._deployment = deployment
        self._callbacks: list[Callable[[NanoVLLMError], None]] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="nanovllm-watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No longer take an end for a failure."""
        self._stopping.set()
        if threading.current_thread() is not self._thread:  # garbage collection may run this in any thread
            self._thread.join()
        self.ended.set()

    def _watch(self) -> None:
        while not self._stopping.wait(self._deployment.backend.poll_seconds):
            process = self._deployment.dead()
            if process is not None and not self._stopping.is_set():
                self._died(EngineDeadError(process_report(process, process.poll() or 0)))
                return

    def on_death(self, callback: Callable[[NanoVLLMError], None]) -> None:
        """Call `callback` at the death, or now if it was before."""
        with self._lock:
            self._callbacks.append(callback)
            death = self.death
        if death is not None:
            callback(death)

    def _died(self, error: EngineDeadError) -> None:
        with self._lock:
            self.death = error
            callbacks = list(self._callbacks)
        self.ended.set()
        for callback in callbacks:
            callback(error)


def _stop(deployment: Deployment, watcher: _Watcher) -> None:
    watcher.stop()
    deployment.end()


@contextlib.contextmanager
def _display(wanted: bool) -> Iterator[ProgressCallback]:
    if not wanted:
        yield lambda progress: None
        return
    from nanovllm_dist.launcher.start_display import StartDisplay

    with StartDisplay() as display:
        yield display


def _import_ray_backend() -> None:
    import nanovllm_dist.launcher.ray_cluster  # noqa: F401


# --- waiting for readiness ---------------------------------------------------------------------------------


def _wait_ready(deployment: Deployment, deadline: float, report: ProgressCallback) -> wire.EngineInfo:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channel = Channel(context, deployment.address, wire.RESULT_FRAME_LIMIT, deployment.keys)
    phase = ""
    try:
        channel.send(wire.encode(wire.Hello()))
        while time.monotonic() < deadline:
            status = _next_status(channel, deployment.backend.poll_seconds)
            if status is not None:
                if status.info is not None:
                    return status.info
                if status.error is None:
                    phase = status.phase
                    report(Progress(status.phase or status.state, status.done, status.total))
            _raise_if_failed(deployment, channel, status)
        raise EngineStartError(deployment.timeout_report(phase))
    finally:
        channel.close()
        context.term()


def _next_status(channel: Channel, timeout: float) -> wire.EngineStatus | None:
    frame = channel.receive(timeout)
    message = None if frame is None else wire.decode_server(frame)
    return message if isinstance(message, wire.EngineStatus) else None


def _raise_if_failed(deployment: Deployment, channel: Channel, status: wire.EngineStatus | None) -> None:
    dead = None if status is not None else deployment.dead()
    deadline = time.monotonic() + _REASON_SECONDS
    while dead is not None and (status is None or status.error is None) and time.monotonic() < deadline:
        status = _next_status(channel, deadline - time.monotonic()) or status
    if status is not None and status.error is not None:
        raise _start_error(deployment, status.error)
    if dead is not None:
        worker = _failed_worker(deployment) or dead
        report = process_report(worker, worker.poll() or 0)
        raise EngineStartError(report) from _error_in_log(report)


def _start_error(deployment: Deployment, error: wire.ErrorInfo) -> EngineStartError:
    """The reported error, with the log of the process that failed, given a moment to end."""
    deadline = time.monotonic() + _EXIT_SECONDS
    while (worker := _failed_worker(deployment)) is None and time.monotonic() < deadline:
        time.sleep(deployment.backend.poll_seconds)
    message = error.message
    if worker is not None:
        message = f"{worker.name}: {message}{LOG_HEADING}{worker.name}:\n{worker.log_tail()}"
    failure = EngineStartError(message)
    failure.__cause__ = error.to_exception()
    return failure


def _failed_worker(deployment: Deployment) -> RunningProcess | None:
    workers = [process for process in deployment.processes if process.name != "coordinator"]
    return next((process for process in workers if process.poll() not in (None, 0)), None)


def _error_in_log(log: str) -> NanoVLLMError | None:
    """The typed error that a traceback in the log ends with."""
    for name, message in reversed(re.findall(r"^nanovllm_dist\.errors\.(\w+): (.*)$", log, flags=re.MULTILINE)):
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, NanoVLLMError):
            return kind(message)
    return None
