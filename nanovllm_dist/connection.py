"""Connection: one client's end of the wire, a thread that owns the socket and hands each request its news.

Any thread may submit and abort. It knows messages and request ids; texts, tokenizers and users are not its matter.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq

from nanovllm_dist.errors import (
    EngineConnectError,
    EngineDeadError,
    InvalidRequestError,
    NanoVLLMError,
    WireError,
    error_from_code,
)
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire import messages as wire
from nanovllm_dist.wire.sockets import Channel
from nanovllm_dist.wire.wakeup import Wakeup

KEY_FILE_ENV = "NANOVLLM_KEY_FILE"
_PROBE_AFTER_SECONDS = 10.0
_DEAD_AFTER_SECONDS = 40.0
_LOOK_AFTER_SECONDS = 1.0
_POLL_MS = 500
_CLOSE_SECONDS = 10.0


class Sink(Protocol):
    """Who is told of one request's progress, on the connection's thread: be quick, and never block.

    Only where the thread has left, or is held by a sink that does block, does `close` tell the end from its own.
    """

    def on_token(self, token: int, logprobs: wire.TokenLogprobs | None) -> None:
        """A new token."""

    def on_prompt_logprobs(self, positions: list[wire.TokenLogprobs]) -> None:
        """Log-probabilities of the prompt, before the end."""

    def on_finished(self, finished: wire.Finished) -> None:
        """The one end, as the engine saw it."""

    def on_error(self, error: NanoVLLMError) -> None:
        """The one end, when the engine is gone."""


class Connection:
    """A connected client. Raises EngineConnectError when no engine answers within `timeout` seconds."""

    def __init__(self, address: str, key_file: str | Path | None = None, timeout: float = 10.0) -> None:
        self.address = address = _absolute(address)
        self._status: wire.EngineStatus | None = None
        self._status_changed = threading.Condition()
        self._sinks: dict[int, Sink] = {}
        self._ids = itertools.count(1)
        self._outgoing: deque[bytes] = deque()
        self._stats: deque[Future[wire.EngineStats]] = deque()
        self._traces: deque[Future[wire.StepTrace]] = deque()
        self._error: NanoVLLMError | None = None
        self._process = os.getpid()
        self._closing = False
        self._lock = threading.RLock()  # garbage collection may abort a request while this thread holds it
        self._last_heard = time.monotonic()
        self._unreported = 0  # bytes read that the engine has not been told of
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._channel = self._open_channel(_read_keys(address, key_file))
        self._wakeup = Wakeup(self._context)
        self._thread = threading.Thread(target=self._run, name="nanovllm-connection", daemon=True)
        self._thread.start()
        try:
            self._send(wire.Hello())
            self._wait_for_first_status(timeout)
        except BaseException:
            self.close()
            raise

    def _open_channel(self, keys: wire.Keys | None) -> Channel:
        try:
            return Channel(self._context, self.address, wire.RESULT_FRAME_LIMIT, keys)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise EngineConnectError(
                f"{self.address}: {error}: an address is tcp://HOST:PORT, and its key file the engine's own"
            ) from None

    def _wait_for_first_status(self, timeout: float) -> None:
        with self._status_changed:
            self._status_changed.wait_for(lambda: self._status is not None or self._error is not None, timeout)
        if self._status is None:
            error = self._error
            raise EngineConnectError(
                f"no engine answers at {self.address}"
                + (f": {error}" if error else f" within {timeout:g} s: is it running, and is the key file its own?")
            )

    @property
    def status(self) -> wire.EngineStatus:
        """The engine's last reported state."""
        if self._status is None:
            raise EngineConnectError(f"no engine has answered at {self.address}")
        return self._status

    @property
    def error(self) -> NanoVLLMError | None:
        """Why this connection is of no more use, if it is."""
        return self._error

    def wait_ready(
        self, timeout: float, on_status: Callable[[wire.EngineStatus], None] | None = None
    ) -> wire.EngineInfo:
        """Wait until the engine is ready; `on_status` sees every change on the way.

        Raises the engine's typed error when it fails instead, EngineConnectError when time runs out.
        """
        deadline = time.monotonic() + timeout
        seen: wire.EngineStatus | None = None
        while True:
            with self._status_changed:
                self._status_changed.wait_for(
                    lambda: self._status is not seen or self._error is not None,  # noqa: B023
                    max(0.0, deadline - time.monotonic()),
                )
                status = self._status
            if status is not None and status is not seen and on_status is not None:
                on_status(status)
            if status is not None and status.info is not None:
                return status.info
            if status is not None and status.error is not None:
                raise status.error.to_exception()
            if self._error is not None:
                raise self._error
            if status is seen:
                raise EngineConnectError(f"the engine at {self.address} was not ready within {timeout:g} s")
            seen = status

    def next_id(self) -> int:
        """An id for a request to submit."""
        return next(self._ids)

    def _in_fork(self) -> bool:
        """In a process that was forked the thread is missing, and the lock may be held for good."""
        return self._process != os.getpid()

    def _check(self) -> None:
        """Raises why nothing can be asked, if that is so."""
        if self._error is not None:
            raise self._error
        if self._in_fork():
            raise EngineDeadError("this client was made before a fork: DistLLM.connect makes one of this process")

    def submit(
        self,
        request_id: int,
        prompt: bytes,
        params: SamplingParams,
        sink: Sink,
        *,
        bad_words: list[bytes] | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        """Queue a request; `sink` hears of it until its end.

        Raises EngineDeadError, InvalidRequestError for an option that the wire does not take, WireError for a request
        larger than a frame may be.
        """
        _check_options(priority, cache_salt)
        frame = _frame(wire.AddRequest(request_id, prompt, params, bad_words or [], priority, cache_salt))
        self._check()
        with self._lock:
            self._check()  # again, for who failed meanwhile
            self._greet_after_silence()
            self._sinks[request_id] = sink
        self._queue(frame)

    def abort(self, ids: list[int], reason: str = "abort") -> None:
        """Ask for the end of these requests; each still ends through its sink."""
        if self._error is None:
            for start in range(0, len(ids), wire.ABORT_LIMIT):
                self._send(wire.AbortRequests(ids[start : start + wire.ABORT_LIMIT], reason))

    def stats(self, timeout: float = 10.0) -> wire.EngineStats:
        """The engine's counters now. Raises EngineDeadError when it does not answer."""
        future: Future[wire.EngineStats] = Future()
        self._check()
        with self._lock:
            self._check()  # again, for who failed meanwhile
            self._greet_after_silence()
            self._stats.append(future)
        self._send(wire.StatsRequest())
        try:
            return future.result(timeout)
        except FutureTimeoutError:
            raise EngineDeadError(f"the engine at {self.address} did not answer within {timeout:g} s") from None

    def trace_steps(self, count: int, skip: int = 0) -> Future[wire.StepTrace]:
        """Ask for the times of `count` steps, after `skip` others; see `DistLLM.trace_steps`."""
        if not 0 <= count <= wire.TRACE_LIMIT or not 0 <= skip < 2**31:
            raise InvalidRequestError(f"a trace of {count} steps after {skip}: 0 to {wire.TRACE_LIMIT:,} can be traced")
        future: Future[wire.StepTrace] = Future()
        self._check()
        with self._lock:
            self._check()  # again, for who failed meanwhile
            self._greet_after_silence()
            self._traces.append(future)
            self._send(wire.TraceSteps(count, skip))
        return future

    def _greet_after_silence(self) -> None:
        """Before anything is asked: the connection may have been renewed, as one that the engine does not know."""
        if self._sinks:
            return
        now = time.monotonic()
        if now - self._last_heard > _PROBE_AFTER_SECONDS:
            self._send(wire.Hello())
        self._last_heard = now

    def fail(self, error: NanoVLLMError) -> None:
        """The connection is of no more use, and its thread ends every request with `error`."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
        with self._status_changed:
            self._status_changed.notify_all()
        self._wakeup.ring()

    def close(self) -> None:
        """Disconnect; requests still running end with EngineDeadError here and `abort` there. Twice is fine."""
        if self._in_fork():
            return
        with self._lock:
            if self._closing:
                return
            self.abort(list(self._sinks))
            self._closing = True
        self._wakeup.ring()
        if self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_SECONDS)  # it may be held by a sink that blocks, and its engine must be stopped
        self.fail(EngineDeadError("the connection was closed"))
        self._end_if_failed()

    # --- the thread ----------------------------------------------------------------------------------------

    def _send(self, message: wire.ClientMessage) -> None:
        self._queue(_frame(message))

    def _queue(self, frame: bytes) -> None:
        self._outgoing.append(frame)
        self._wakeup.ring()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._channel.socket, zmq.POLLIN)
        poller.register(self._wakeup.socket, zmq.POLLIN)
        try:
            while not self._closing:
                events = dict(poller.poll(_POLL_MS))
                if self._wakeup.socket in events:
                    self._wakeup.clear()
                self._flush()
                if self._channel.socket in events:
                    # an engine that never pauses must not keep what is to be sent, or the end, waiting
                    while not self._closing and (frame := self._channel.receive(0)) is not None:
                        self._receive(frame)
                        self._report_read(len(frame))
                        self._flush()
                        self._end_if_failed()
                self._watch()
                self._end_if_failed()
            self._flush()
            self.fail(EngineDeadError("the connection was closed"))
        except NanoVLLMError as error:
            self.fail(error)
        except Exception as error:  # a caller must not wait for a thread that is gone
            self.fail(EngineDeadError(f"the connection broke: {type(error).__name__}: {error}"))
        finally:
            try:
                self._end_if_failed()
            finally:
                self._channel.close()
                self._wakeup.close()
                self._context.term()

    def _end_if_failed(self) -> None:
        """Once there is an error, hand it to whoever still waits."""
        if self._error is None:
            return
        with self._lock:
            sinks, self._sinks = list(self._sinks.values()), {}
            unanswered: list[Future[Any]] = [*self._stats, *self._traces]
            self._stats, self._traces = deque(), deque()
        for sink in sinks:
            sink.on_error(self._error)
        for future in unanswered:
            _settle(future, self._error)

    def _flush(self) -> None:
        while self._outgoing:
            self._channel.send(self._outgoing.popleft())

    def _receive(self, frame: bytes) -> None:
        self._last_heard = time.monotonic()
        try:
            message = wire.decode_server(frame)
        except WireError as error:
            self.fail(error)
            return
        if isinstance(message, wire.Outputs):
            self._outputs(message)
        elif isinstance(message, wire.EngineStatus):
            self._set_status(message)
        elif isinstance(message, wire.EngineStats):
            if self._stats:
                _settle(self._stats.popleft(), message)
        elif isinstance(message, wire.StepTrace):
            if self._traces:
                _settle(self._traces.popleft(), message)
        else:
            self.fail(error_from_code(message.error.code, message.error.message))

    def _report_read(self, size: int) -> None:
        """Say now and then how much has been read: the engine drops a client that does not keep up."""
        self._unreported += size
        if self._unreported >= wire.READ_REPORT:
            self._outgoing.append(wire.encode(wire.FramesRead(self._unreported)))
            self._unreported = 0

    def _outputs(self, message: wire.Outputs) -> None:
        logprobs = dict(message.logprobs)
        tokens = wire.unpack_ints(message.tokens)
        for index, request_id in enumerate(wire.unpack_ints(message.ids)):
            sink = self._sinks.get(request_id)
            if sink is not None:
                sink.on_token(tokens[index], logprobs.get(index))
        for entry in message.prompt_logprobs:
            sink = self._sinks.get(entry.id)
            if sink is not None:
                sink.on_prompt_logprobs(entry.positions)
        for finished in message.finished:
            with self._lock:
                sink = self._sinks.pop(finished.id, None)  # not there if `fail` has ended it meanwhile
            if sink is not None:
                sink.on_finished(finished)

    def _set_status(self, status: wire.EngineStatus) -> None:
        with self._status_changed:
            self._status = status
            self._status_changed.notify_all()
        if status.state == "failed" and status.error is not None:
            self.fail(status.error.to_exception())
        elif status.state == "stopping":
            self.fail(EngineDeadError(f"the engine at {self.address} was stopped"))

    def _watch(self) -> None:
        """With requests waiting and a silent engine, ask for a sign of life, and give up without one."""
        if not self._sinks or self._error is not None:
            return
        silent = time.monotonic() - self._last_heard
        if silent > _LOOK_AFTER_SECONDS and not _is_there(self.address):
            self.fail(EngineDeadError(f"the engine at {self.address} is gone: its socket does not exist any more"))
        elif silent > _DEAD_AFTER_SECONDS:
            self.fail(EngineDeadError(f"the engine at {self.address} has been silent for {silent:.0f} s"))
        elif silent > _PROBE_AFTER_SECONDS and not self._stats:
            self._stats.append(Future())
            self._channel.send(wire.encode(wire.StatsRequest()))


# a Struct checks types when decoded, not when constructed; there, one bad request would cost the whole connection
_Options = msgspec.defstruct(
    "_Options",
    [(one.name, one.type) for one in msgspec.structs.fields(wire.AddRequest) if one.name in ("priority", "cache_salt")],
)


def _check_options(priority: int, cache_salt: str) -> None:
    try:
        msgspec.convert({"priority": priority, "cache_salt": cache_salt}, _Options)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"request options: {error}") from None


def _frame(message: wire.ClientMessage) -> bytes:
    try:
        frame = wire.encode(message)
    except (UnicodeEncodeError, OverflowError) as error:
        raise InvalidRequestError(f"the request is not valid UTF-8 and 64-bit integers throughout: {error}") from None
    if len(frame) > wire.CLIENT_FRAME_LIMIT:
        raise WireError(f"the request takes {len(frame)} bytes, over the limit of {wire.CLIENT_FRAME_LIMIT}")
    return frame


def _settle(future: Future[Any], result: wire.EngineStats | wire.StepTrace | NanoVLLMError) -> None:
    with suppress(InvalidStateError):  # whoever asked may have stopped waiting
        if isinstance(result, NanoVLLMError):
            future.set_exception(result)
        else:
            future.set_result(result)


def _absolute(address: str) -> str:
    """The address wherever the program goes from here."""
    file = address.removeprefix("ipc://")
    return address if file == address or not file else f"ipc://{os.path.abspath(file)}"


def _is_there(address: str) -> bool:
    """Whether an ipc address still has its socket; of others nothing can be told."""
    try:
        return not address.startswith("ipc://") or bool(os.stat(address.removeprefix("ipc://")))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):  # it may be there for others
        return True


def _read_keys(address: str, key_file: str | Path | None) -> wire.Keys | None:
    """Keys for a tcp address from its key file, or the one that NANOVLLM_KEY_FILE names."""
    if not address.startswith(("ipc://", "tcp://")):
        raise EngineConnectError(f"{address!r} is not an engine address: it begins with ipc:// or tcp://")
    if address.startswith("ipc://"):
        if not _is_there(address):
            raise EngineConnectError(f"no engine is running at {address}: its socket does not exist")
        return None
    path = key_file or os.environ.get(KEY_FILE_ENV)
    if not path:
        raise EngineConnectError(
            f"{address} needs the engine's key file: give key_file, or set {KEY_FILE_ENV} to its path"
        )
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return msgspec.convert({**content, "server_secret": ""}, wire.Keys)
    except (OSError, ValueError, TypeError) as error:  # msgspec's are ValueErrors
        raise EngineConnectError(f"key file {path}: {type(error).__name__}: {error}") from None
