"""A coordinator in a thread with ranks and clients around it, over real sockets.

The ranks are threads that speak the worker's protocol over an imaginary model (see `simulation`).
"""

from __future__ import annotations

import threading
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from simulation import EOS, VOCAB, SimulatedWorker, expected_output, make_config

from nanovllm_dist.connection import Connection
from nanovllm_dist.errors import NanoVLLMError
from nanovllm_dist.models.config import ModelConfig, parse_model_config
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.scheduler.coordinator import Coordinator
from nanovllm_dist.wire import messages as wire
from nanovllm_dist.wire.sockets import Channel

BLOCKS = 40


def model_config() -> ModelConfig:
    """A model of the simulated vocabulary."""
    return parse_model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": VOCAB,
            "eos_token_id": EOS,
        }
    )


class Rank(threading.Thread):
    """A rank that answers the protocol; `pause` holds its next step back."""

    def __init__(self, endpoint: str, rank: int = 0, num_blocks: int = BLOCKS, step_seconds: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.endpoint, self.rank, self.num_blocks, self.step_seconds = endpoint, rank, num_blocks, step_seconds
        self.worker = SimulatedWorker(block_size=4, budget=32)
        self.allocated = self.largest_frame = 0
        self.traced: list[wire.RankTimes] = []
        self.prompt_logprobs: list[tuple[int, int, list[wire.TokenLogprobs]]] = []  # of the next step
        self.vanish = threading.Event()
        self.start()

    def run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        channel = Channel(context, self.endpoint, wire.STEP_FRAME_LIMIT, None, wire.worker_identity(self.rank))
        channel.send(wire.encode(wire.WorkerHello(self.rank, 0, "here:1" if self.rank == 0 else "")))
        channel.send(wire.encode(wire.WorkerProgress("load", 1, 2)))
        channel.send(wire.encode(wire.CacheMeasured(self.num_blocks)))
        while not self.vanish.is_set():
            frame = channel.receive(0.05)
            if frame is None:
                continue
            self.largest_frame = max(self.largest_frame, len(frame))
            message = wire.decode_to_worker(frame)
            if isinstance(message, wire.Shutdown):
                break
            if isinstance(message, wire.AllocateCache):
                self.allocated = message.num_blocks
                channel.send(wire.encode(wire.WorkerReady()))
            elif isinstance(message, wire.Ping) and self.traced:
                channel.send(wire.encode(wire.TracedSteps(self.traced)))
                self.traced = []
            elif isinstance(message, wire.Step):
                received = time.monotonic()
                time.sleep(self.step_seconds)
                tokens = self.worker.run(frame)
                if message.traced:
                    self.traced.append(wire.RankTimes(message.step, received, received, time.monotonic()))
                if self.rank == 0:
                    prompt, self.prompt_logprobs = self.prompt_logprobs, []
                    result = wire.StepResult(message.epoch, message.step, wire.pack_ints(tokens), [], prompt)
                    channel.send(wire.encode(result))
        channel.close()
        context.term()


@dataclass
class Sink:
    """Records what one request is told."""

    tokens: list[int] = field(default_factory=list)
    ends: list[object] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def on_token(self, token: int, logprobs: wire.TokenLogprobs | None) -> None:
        self.tokens.append(token)

    def on_prompt_logprobs(self, positions: list[wire.TokenLogprobs]) -> None:
        """Not asked for here."""

    def on_finished(self, finished: wire.Finished) -> None:
        self.ends.append(finished)
        self.done.set()

    def on_error(self, error: NanoVLLMError) -> None:
        self.ends.append(error)
        self.done.set()

    def wait(self) -> object:
        assert self.done.wait(10), "the request never ended"
        return self.ends[0]


class Engine:
    """A coordinator in a thread, with its ranks."""

    def __init__(self, directory: Path, world_size: int = 1, step_seconds: float = 0.0, **options: object) -> None:
        config = make_config(tensor_parallel_size=world_size, **options)
        spec = wire.CoordinatorSpec(
            config=config, client_endpoint=f"ipc://{directory}/c", worker_endpoint=f"ipc://{directory}/w"
        )
        self.coordinator = Coordinator(spec, model_config())
        self.address = self.coordinator.listening.client_endpoint
        self.worker_endpoint = self.coordinator.listening.worker_endpoint
        self.exit_code: int | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self.ranks = [Rank(self.worker_endpoint, rank, BLOCKS + 10 * rank, step_seconds) for rank in range(world_size)]
        self.connections: list[Connection] = []

    def _run(self) -> None:
        self.exit_code = self.coordinator.run()

    def connect(self) -> Connection:
        connection = Connection(self.address)
        self.connections.append(connection)
        connection.wait_ready(10)
        return connection

    def forget_clients(self) -> None:
        """Know no client any more, as after reconnects, which come with new identities. Between two turns of the
        coordinator's loop: what it sends in one, it counts after the client may have read it."""
        forgotten = threading.Event()
        turn = self.coordinator._turn

        def forget_first(woke: float) -> None:
            self.coordinator._turn = turn  # type: ignore[method-assign]
            self.coordinator._clients._unread.clear()
            forgotten.set()
            turn(woke)

        self.coordinator._turn = forget_first  # type: ignore[method-assign]
        assert forgotten.wait(10), "the coordinator's loop stands still"

    def stop(self) -> None:
        for connection in self.connections:
            connection.close()
        self.coordinator.stop()
        self.thread.join(10)
        for rank in self.ranks:
            rank.vanish.set()
            rank.join(10)


def submit(connection: Connection, prompt: list[int], **params: object) -> tuple[int, Sink]:
    """Send one greedy request."""
    sink = Sink()
    merged = SamplingParams(**({"temperature": 0.0, "ignore_eos": True} | params))  # type: ignore[arg-type]
    request_id = connection.next_id()
    connection.submit(request_id, array("i", prompt).tobytes(), merged, sink)
    return request_id, sink


def output_of(prompt: list[int], max_tokens: int) -> list[int]:
    return expected_output(prompt, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens), 64)
