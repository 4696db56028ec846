"""The engine's end of a client's wire, spoken by a test: real sockets and messages, no scheduler behind them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from nanovllm_dist.errors import NanoVLLMError
from nanovllm_dist.wire import messages as wire
from nanovllm_dist.wire.sockets import Server

TIMES = wire.RequestTimes(0.0, 0.0, 0.0, 0, 0)


def engine_info(max_queued: int) -> wire.EngineInfo:
    """Of an engine whose queue holds so many requests."""
    return wire.EngineInfo(
        version="",
        model="m",
        model_path="",
        tokenizer="",
        architecture="",
        device="cpu",
        dtype="float32",
        tensor_parallel_size=1,
        vocab_size=100,
        max_total_tokens=1000,
        max_num_seqs=1,
        max_queued=max_queued,
        block_size=16,
        num_blocks=10,
        eos_token_ids=[],
    )


class ScriptedEngine:
    """Answers Hello as a started engine does; what else it says is the test's matter."""

    def __init__(self, directory: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._server = Server(self._context, f"ipc://{directory}/c", wire.CLIENT_FRAME_LIMIT, None)
        self.address = self._server.endpoint

    def welcome(self, info: wire.EngineInfo | None = None) -> bytes:
        """Wait for a Hello and answer that the engine starts, or is ready with `info`; the client's identity."""
        client, message = self.receive()
        assert isinstance(message, wire.Hello)
        self.send(client, wire.EngineStatus("starting" if info is None else "ready", info=info))
        return client

    def receive(self, seconds: float = 10.0) -> tuple[bytes, wire.ClientMessage]:
        assert self._server.socket.poll(int(1000 * seconds)), "the client said nothing"
        received = self._server.receive()
        assert received is not None
        return received[0], wire.decode_client(received[1])

    def send(self, client: bytes, message: wire.ServerMessage) -> bool:
        return self._server.send(client, wire.encode(message))

    def close(self) -> None:
        self._server.close()
        self._context.destroy(linger=0)


@dataclass
class RecordingSink:
    """Keeps the one end of a request, and is as slow about it as the test wants: `hold` is waited for."""

    ends: list[object] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    told: threading.Event = field(default_factory=threading.Event)
    hold: threading.Event | None = None

    def on_token(self, token: int, logprobs: wire.TokenLogprobs | None) -> None:
        """Tokens are not what these tests are about."""

    def on_prompt_logprobs(self, positions: list[wire.TokenLogprobs]) -> None:
        """Not asked for here."""

    def on_finished(self, finished: wire.Finished) -> None:
        self._end(finished)

    def on_error(self, error: NanoVLLMError) -> None:
        self._end(error)

    def _end(self, end: object) -> None:
        self.told.set()
        if self.hold is not None:
            self.hold.wait()
        self.ends.append(end)
        self.done.set()
