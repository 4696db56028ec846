"""The coordinator process: serves clients, drives workers, owns the scheduler. The one file here that knows sockets.

    python -m nanovllm_dist.scheduler.coordinator < spec.json

It reads a `CoordinatorSpec` from standard input and prints `CoordinatorListening`. It never sees a tensor, and a
bad message never stops it: the sender is told. When a rank is lost every request ends with an error, and the
process leaves with exit code 1.
"""

from __future__ import annotations

import gc
import logging
import random
import signal
import sys
import time
from array import array

import msgspec
import zmq

from nanovllm_dist import __version__
from nanovllm_dist.errors import EngineDeadError, InvalidRequestError, NanoVLLMError, WireError
from nanovllm_dist.models.config import ModelConfig, read_model_config
from nanovllm_dist.scheduler.clients import Clients
from nanovllm_dist.scheduler.log_limit import LogLimit
from nanovllm_dist.scheduler.outbox import Outbox
from nanovllm_dist.scheduler.plan import Committed
from nanovllm_dist.scheduler.request import Request
from nanovllm_dist.scheduler.request_limits import check_limits, without_texts
from nanovllm_dist.scheduler.scheduler import Scheduler
from nanovllm_dist.scheduler.startup import Startup
from nanovllm_dist.scheduler.step_clock import StepClock
from nanovllm_dist.scheduler.step_deadline import StepDeadline
from nanovllm_dist.scheduler.step_trace import StepTrace
from nanovllm_dist.wire import messages as wire
from nanovllm_dist.wire.partial_request import request_id_of
from nanovllm_dist.wire.sockets import Server

log = logging.getLogger("coordinator")

_POLL_MS = 200
_PING_SECONDS = 1.0
_EPOCH = 0
# Clients that never pause must not keep steps and results waiting
_FRAMES_PER_TURN = 256
_WARNINGS_AT_ONCE = 10
_WARNING_SECONDS = 10.0


class Coordinator:
    """One engine's centre. `run()` returns the exit code."""

    def __init__(self, spec: wire.CoordinatorSpec, model: ModelConfig) -> None:
        self.config = spec.config
        self.model = model
        self._context = zmq.Context()
        self._client_server = Server(self._context, spec.client_endpoint, wire.CLIENT_FRAME_LIMIT, spec.keys)
        self._clients = Clients(self._client_server.send, self._client_gone)
        self._worker_frame_limit = wire.worker_frame_limit(spec.config)
        self._workers = Server(self._context, spec.worker_endpoint, self._worker_frame_limit, spec.keys)
        self._identities = [wire.worker_identity(rank) for rank in range(spec.config.tensor_parallel_size)]
        self._startup = Startup(spec.config.tensor_parallel_size)
        self._status = wire.EngineStatus("starting", "start")
        self._scheduler: Scheduler | None = None
        self._committed: list[tuple[Committed, dict[int, wire.TokenLogprobs], float]] = []
        self._outbox = Outbox()
        self._clock = StepClock()
        self._deadline = StepDeadline(spec.config.step_timeout)
        self._warnings = LogLimit(_WARNINGS_AT_ONCE, _WARNING_SECONDS)
        self._trace: StepTrace | None = None
        self._seeds = random.Random(spec.config.seed)
        self._rendezvous = ""
        self._last_step = self._last_ping = time.monotonic()
        self._exit_code: int | None = None

    @property
    def listening(self) -> wire.CoordinatorListening:
        """The endpoints really bound."""
        return wire.CoordinatorListening(
            client_endpoint=self._client_server.endpoint, worker_endpoint=self._workers.endpoint
        )

    def stop(self) -> None:
        """End every request with `abort` and leave, at the next turn of the loop."""
        if self._exit_code is None:
            self._exit_code = 0

    def run(self) -> int:
        """Serve until stopped or a rank is lost."""
        poller = zmq.Poller()
        poller.register(self._client_server.socket, zmq.POLLIN)
        poller.register(self._workers.socket, zmq.POLLIN)
        try:
            while self._exit_code is None:
                poller.poll(_POLL_MS)
                self._turn(time.monotonic())
            self._leave()
        finally:
            self._client_server.close()
            self._workers.close()
            self._context.term()
        return self._exit_code

    # --- one turn of the loop ------------------------------------------------------------------------------

    def _turn(self, woke: float) -> None:
        while (received := self._workers.receive()) is not None:
            self._from_worker(*received)
            if self._committed:  # the devices wait for the next step, so nothing else comes before it
                self._plan_steps()
                left = time.monotonic()
                self._clock.answered(left - woke)
                self._deliver()
                woke = time.monotonic()
                if self._trace is not None:
                    self._trace.delivered(left, woke)
        for _ in range(_FRAMES_PER_TURN):
            if (received := self._client_server.receive()) is None:
                break
            self._from_client(*received)
        self._plan_steps()
        self._send_outputs()
        if self._trace is not None:
            self._watch_trace(self._trace)
        self._watch_steps()
        self._ping_workers()

    def _plan_steps(self) -> None:
        if self._scheduler is None:
            return
        if not self._scheduler.has_unfinished:
            self._clock.idle(time.process_time())
            if self._trace is not None:
                self._trace.idle()
            self._last_step = time.monotonic()  # who has nothing to do is not late
        planned = time.monotonic()
        while (plan := self._scheduler.schedule(planned)) is not None:
            message = plan.to_message(_EPOCH)
            if self._trace is not None and self._trace.takes_next():
                self._to_workers(msgspec.structs.replace(message, traced=True))
                self._trace.sent(plan, planned, time.monotonic())
            else:
                self._to_workers(message)
            self._clock.step_left(time.process_time(), len(self._scheduler.running), len(plan.rows))
            planned = time.monotonic()

    def _deliver(self) -> None:
        for committed, logprobs, now in self._committed:
            for request, token in committed.tokens:
                self._outbox.token(request, token, logprobs.get(id(request)))
            for request in committed.finished:
                self._outbox.finished(request, now)
        self._committed.clear()
        self._send_outputs()

    def _send_outputs(self) -> None:
        self._outbox.send(self._clients.send)

    # --- clients -------------------------------------------------------------------------------------------

    def _from_client(self, client: bytes, frame: bytes) -> None:
        try:
            message = wire.decode_client(frame)
        except WireError as error:
            self._refuse(client, frame, error)
            return
        try:
            if isinstance(message, wire.AddRequest):
                self._add(client, message)
            elif isinstance(message, wire.AbortRequests):
                self._abort(client, message)
            elif isinstance(message, wire.StatsRequest):
                self._send_stats(client)
            elif isinstance(message, wire.TraceSteps):
                self._start_trace(client, message)
            elif isinstance(message, wire.FramesRead):
                self._clients.has_read(client, message.size)
            else:
                self._hello(client, message)
        except (WireError, EngineDeadError) as error:
            self._protocol_error(client, error)

    def _refuse(self, client: bytes, frame: bytes, error: WireError) -> None:
        """Answer a frame that does not decode: end its request if it has an id of its own, which harms no other."""
        request_id = request_id_of(frame)
        running = self._scheduler is not None and self._scheduler.get((client, request_id or 0)) is not None
        if request_id is None or running:
            self._protocol_error(client, error)
        else:
            self._outbox.refused(client, request_id, wire.ErrorInfo.of(InvalidRequestError(str(error))))

    def _protocol_error(self, client: bytes, error: NanoVLLMError) -> None:
        self._warn(f"client {client.hex()}: {error}")
        self._clients.send(client, wire.encode(wire.ProtocolError(wire.ErrorInfo.of(error))))

    def _hello(self, client: bytes, message: wire.Hello) -> None:
        if message.protocol != wire.PROTOCOL_VERSION:
            raise WireError(f"protocol {message.protocol} is not {wire.PROTOCOL_VERSION}: use matching versions")
        self._clients.welcome(client, wire.encode(self._status))

    def _send_stats(self, client: bytes) -> None:
        self._clients.check_known(client)
        self._clients.send(client, wire.encode(self._stats()))

    def _start_trace(self, client: bytes, message: wire.TraceSteps) -> None:
        self._clients.check_known(client)
        if self._trace is not None:
            self._send_trace(self._trace)
        self._trace = StepTrace(client, message.count, message.skip, len(self._startup.ranks))

    def _watch_trace(self, trace: StepTrace) -> None:
        if trace.complete:
            self._send_trace(trace)
            self._trace = None
        elif trace.must_ask_ranks():
            self._last_ping = -_PING_SECONDS

    def _send_trace(self, trace: StepTrace) -> None:
        self._clients.send(trace.client, wire.encode(trace.to_message()))

    def _add(self, client: bytes, message: wire.AddRequest) -> None:
        self._clients.check_known(client)
        if self._scheduler is None:
            error: NanoVLLMError = EngineDeadError(f"the engine is {self._status.state}: wait until it is ready")
            self._outbox.refused(client, message.id, wire.ErrorInfo.of(error))
            return
        if self._scheduler.get((client, message.id)) is not None:
            raise WireError(f"request id {message.id} is already running")
        params = without_texts(message.params)
        try:
            check_limits(message)
            request = Request(
                key=(client, message.id),
                tokens=array("i", wire.unpack_ints(message.prompt)),
                params=params,
                seed=params.seed if params.seed is not None else self._seeds.getrandbits(63),
                arrival=time.monotonic(),
                priority=message.priority,
                cache_salt=message.cache_salt,
                bad_words=message.bad_words,
            )
            self._scheduler.add(request)
        except NanoVLLMError as error:
            self._outbox.refused(client, message.id, wire.ErrorInfo.of(error))

    def _abort(self, client: bytes, message: wire.AbortRequests) -> None:
        reason = "stop" if message.reason == "stop" else "abort"
        if self._scheduler is not None:
            for request_id in message.ids:
                request = self._scheduler.abort((client, request_id), reason)
                if request is not None:
                    self._outbox.finished(request, time.monotonic())

    def _client_gone(self, client: bytes, error: NanoVLLMError | None) -> None:
        if error is not None:
            log.warning("client %s: %s", client.hex(), error)
        if self._scheduler is not None:
            for request in self._scheduler.requests():
                if request.key[0] == client:
                    self._scheduler.abort(request.key)

    def _set_status(self, status: wire.EngineStatus) -> None:
        if status == self._status:
            return
        self._status = status
        self._clients.send_all(wire.encode(status))

    def _stats(self) -> wire.EngineStats:
        scheduler = self._scheduler
        if scheduler is None:
            return wire.EngineStats()
        stats = scheduler.stats
        return wire.EngineStats(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            free_blocks=scheduler.pool.num_free,
            num_blocks=scheduler.pool.num_usable,
            steps=stats.steps,
            prompt_tokens=stats.prompt_tokens,
            generated_tokens=stats.generated_tokens,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            preemptions=stats.preemptions,
            finished=stats.finished,
            seconds_since_step=time.monotonic() - self._last_step if scheduler.has_unfinished else 0.0,
            host_us_per_step=self._clock.host_us_per_step(),
            answer_us_per_step=self._clock.answer_us_per_step(),
            batch_histogram=self._clock.batch_histogram,
        )

    # --- workers -------------------------------------------------------------------------------------------

    def _from_worker(self, identity: bytes, frame: bytes) -> None:
        answered = time.monotonic()
        rank = self._rank_of(identity)
        if rank is None:
            self._warn(f"a frame from an unknown worker {identity.hex()} was dropped")
            return
        try:
            message = wire.decode_from_worker(frame, self._worker_frame_limit)
            if isinstance(message, wire.StepResult):
                self._commit(message, answered)
            elif isinstance(message, wire.TracedSteps):
                if self._trace is not None:
                    self._trace.on_rank(rank, message.times)
            elif isinstance(message, wire.WorkerFailed):
                self._fail(message.error)
            else:
                self._start(rank, message)
        except WireError as error:
            self._warn(f"rank {rank}: {error}")

    def _rank_of(self, identity: bytes) -> int | None:
        return self._identities.index(identity) if identity in self._identities else None

    def _start(
        self,
        rank: int,
        message: wire.WorkerHello | wire.WorkerProgress | wire.CacheMeasured | wire.WorkerReady,
    ) -> None:
        state = self._startup.ranks[rank]
        if isinstance(message, wire.WorkerHello):
            state.said_hello = True
            self._rendezvous = message.rendezvous or self._rendezvous
            if self._startup.all_said_hello:
                for other in range(1, len(self._startup.ranks)):
                    self._to_worker(other, wire.encode(wire.Rendezvous(self._rendezvous)))
        elif isinstance(message, wire.WorkerProgress):
            self._startup.progress(rank, message.phase, message.done, message.total)
        elif isinstance(message, wire.CacheMeasured):
            state.num_blocks = message.num_blocks
            if self._startup.num_blocks:
                self._to_workers(wire.AllocateCache(self._startup.num_blocks))
        else:
            self._startup.progress(rank, "ready", 0, 0)
            if self._startup.all_ready:
                self._ready()
                return
        slowest = self._startup.slowest()
        self._set_status(wire.EngineStatus("starting", slowest.phase, slowest.done, slowest.total))

    def _ready(self) -> None:
        config, num_blocks = self.config, self._startup.num_blocks
        self._scheduler = Scheduler(config, num_blocks, self.model.vocab_size, self.model.eos_token_ids)
        info = wire.EngineInfo(
            version=__version__,
            model=config.served_model_name or config.model,
            model_path=config.model,
            tokenizer=config.tokenizer or config.model,
            architecture=self.model.architecture,
            device=config.device,
            dtype=config.dtype,
            tensor_parallel_size=config.tensor_parallel_size,
            vocab_size=self.model.vocab_size,
            max_total_tokens=self._scheduler.max_total_tokens,
            max_num_seqs=config.max_num_seqs,
            max_queued=config.max_num_queued_reqs,
            block_size=config.block_size,
            num_blocks=num_blocks,
            eos_token_ids=list(self.model.eos_token_ids),
        )
        gc.collect()
        gc.freeze()  # what lives until the end need not be walked in the middle of a step
        self._set_status(wire.EngineStatus("ready", info=info))
        log.info("ready: %d blocks of %d tokens", num_blocks, config.block_size)

    def _commit(self, result: wire.StepResult, now: float) -> None:
        scheduler = self._scheduler
        plan = scheduler.oldest_in_flight if scheduler is not None else None
        if scheduler is None or plan is None or (result.epoch, result.step) != (_EPOCH, plan.step):
            self._warn(f"the result of step {result.step} of epoch {result.epoch} was not expected")
            return
        self._last_step = now
        logprobs: dict[int, wire.TokenLogprobs] = {}
        if result.logprobs or result.prompt_logprobs:
            by_slot = {row.slot: row.request for row in plan.rows}
            logprobs = {id(by_slot[slot]): entry for slot, entry in result.logprobs}
            for slot, first, entries in result.prompt_logprobs:
                by_slot[slot].prompt_logprobs.update(enumerate(entries, start=first))
        self._committed.append((scheduler.commit(wire.unpack_ints(result.tokens), now), logprobs, now))
        if self._trace is not None:
            self._trace.committed(result.step, now, time.monotonic())

    def _to_workers(self, message: wire.ToWorker) -> None:
        frame = wire.encode(message)
        for rank in range(len(self._startup.ranks)):
            self._to_worker(rank, frame)

    def _to_worker(self, rank: int, frame: bytes) -> None:
        if not self._workers.send(self._identities[rank], frame):
            self._fail(wire.ErrorInfo.of(EngineDeadError(f"rank {rank} is gone: its process died or was cut off")))

    def _watch_steps(self) -> None:
        """End the engine when a step does not: ranks that stand still hold every request and say nothing."""
        plan = self._scheduler.oldest_in_flight if self._scheduler is not None else None
        if self._deadline.passed(time.monotonic(), None if plan is None else plan.step) and plan is not None:
            last = len(self._startup.ranks) - 1
            ranks = f"ranks 0 to {last} have" if last else "rank 0 has"  # in lockstep: one holds up all of them
            error = EngineDeadError(
                f"{ranks} not answered step {plan.step} within {self.config.step_timeout:g} s: a process stands still, "
                "or the device is stuck; where steps may take longer raise --step-timeout (step_timeout, 0 for ever)"
            )
            self._fail(wire.ErrorInfo.of(error))

    def _ping_workers(self) -> None:
        now = time.monotonic()
        if now - self._last_ping < _PING_SECONDS:
            return
        self._last_ping = now
        frame = wire.encode(wire.Ping())
        for rank, state in enumerate(self._startup.ranks):
            if state.said_hello:
                self._to_worker(rank, frame)

    def _warn(self, text: str) -> None:
        """Log what a peer did wrong, and could do without end."""
        left_out = self._warnings.take(time.monotonic())
        if left_out is not None:
            log.warning("%s%s", text, f" ({left_out} warnings before it were left out)" if left_out else "")

    # --- the end -------------------------------------------------------------------------------------------

    def _fail(self, error: wire.ErrorInfo) -> None:
        if self._exit_code is not None:
            return
        log.error("%s", error.message)
        self._exit_code = 1
        self._end_all("error", error)
        self._set_status(wire.EngineStatus("failed", error=error))

    def _leave(self) -> None:
        if self._exit_code == 0:
            self._end_all("abort", None)
            self._set_status(wire.EngineStatus("stopping"))
        frame = wire.encode(wire.Shutdown())
        for rank, state in enumerate(self._startup.ranks):
            if state.said_hello:
                self._workers.send(self._identities[rank], frame)

    def _end_all(self, reason: str, error: wire.ErrorInfo | None) -> None:
        self._deliver()
        if self._scheduler is not None:
            for request in self._scheduler.requests():
                self._scheduler.abort(request.key, reason)
                self._outbox.finished(request, time.monotonic(), error)
        self._outbox.send(self._clients.send)


def main() -> int:
    """Process entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        spec = msgspec.json.decode(sys.stdin.buffer.read(), type=wire.CoordinatorSpec)
        coordinator = Coordinator(spec, read_model_config(spec.config.model, spec.config.hf_overrides))
    except (NanoVLLMError, msgspec.MsgspecError) as error:
        log.error("%s", error)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: coordinator.stop())
    sys.stdout.write(msgspec.json.encode(coordinator.listening).decode() + "\n")
    sys.stdout.flush()
    return coordinator.run()


if __name__ == "__main__":
    sys.exit(main())
