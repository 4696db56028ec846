"""llama.cpp's server as a contestant, driven over HTTP, a connection for every request.

    python -m nanovllm_dist.bench.peers.llama_cpp

The first line is {"server", "gguf", "threads", "max_model_len", "max_num_seqs"}, each later one a piece of work; see
`contestant.py` for what is answered. Times of requests are the server's own.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nanovllm_dist.bench.json_process import reserve_stdout, write_line
from nanovllm_dist.launcher import child

_HOST = "127.0.0.1"
_READY_SECONDS = 120.0
_POLL_SECONDS = 0.02


class Server:
    """A running llama-server with `max_num_seqs` slots of `max_model_len` tokens, which dies with this process."""

    def __init__(self, server: str, gguf: str, threads: int, max_model_len: int, max_num_seqs: int) -> None:
        self._port = _free_port()
        arguments = ["-m", gguf, "--host", _HOST, "--port", str(self._port), "-t", str(threads), "--no-ui"]
        arguments += ["-np", str(max_num_seqs), "-c", str(max_num_seqs * max_model_len)]
        self._pool = ThreadPoolExecutor(max_num_seqs)
        parent = os.getpid()
        self._process = subprocess.Popen(
            [server, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            preexec_fn=lambda: child.die_with_parent(parent),
        )

    def wait(self) -> None:
        """Return when it serves. Raises RuntimeError when it ends or takes too long."""
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"llama-server ended with code {self._process.returncode}")
            try:
                if self._request("GET", "/health")[0] == http.client.OK:
                    return
            except OSError:
                pass
            time.sleep(_POLL_SECONDS)
        raise RuntimeError(f"llama-server was not ready within {_READY_SECONDS:.0f} s")

    def run(self, prompts: list[list[int]], output_lens: list[int], temperature: float) -> dict[str, Any]:
        """All requests at once: wall seconds, and the server's times of every request."""
        started = time.perf_counter()
        answers = list(self._pool.map(self._complete, prompts, output_lens, [temperature] * len(prompts)))
        seconds = time.perf_counter() - started
        times = [answer["timings"] for answer in answers]
        if [one["predicted_n"] for one in times] != output_lens:
            raise RuntimeError("an answer is not as long as it was asked for")
        return {
            "seconds": seconds,
            "first_token": [one["prompt_ms"] / 1e3 for one in times],
            # its clock of the answer starts with the first token
            "per_token": [
                one["predicted_ms"] / 1e3 / (one["predicted_n"] - 1) for one in times if one["predicted_n"] > 1
            ],
        }

    def stop(self) -> None:
        """End it."""
        self._pool.shutdown(cancel_futures=True)
        self._process.terminate()
        self._process.wait()

    def _complete(self, prompt: list[int], length: int, temperature: float) -> dict[str, Any]:
        plain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": temperature}
        asked = {"prompt": prompt, "n_predict": length, "ignore_eos": True, "cache_prompt": False, **plain}
        status, body = self._request("POST", "/completion", json.dumps(asked).encode())
        if status != http.client.OK:
            raise RuntimeError(f"llama-server answered {status}: {body[:200]!r}")
        answer: dict[str, Any] = json.loads(body)
        return answer

    def _request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(_HOST, self._port)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def version_of(server: str) -> str:
    """What the program says of itself."""
    shown = subprocess.run([server, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in (shown.stdout + shown.stderr).splitlines() if line.startswith("version")]
    return lines[0] if lines else Path(server).name


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((_HOST, 0))
        return int(free.getsockname()[1])


def main() -> int:
    """Process entry point: answer each line until the input ends."""
    channel = reserve_stdout()
    server = None
    try:
        options = json.loads(sys.stdin.readline())
        server = Server(**options)
        server.wait()
        write_line(channel, {"ready": True, "version": version_of(options["server"])})
        for line in sys.stdin:
            write_line(channel, server.run(**json.loads(line)))
    except Exception as error:
        write_line(channel, {"error": f"{type(error).__name__}: {error}", "code": "internal"})
        return 1
    finally:
        if server is not None:
            server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
