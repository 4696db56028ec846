"""This engine as a contestant: a user's program that starts it and generates.

    python -m nanovllm_dist.bench.peers.ours

The first line is an engine config, each later one a piece of work; see `contestant.py` for what is answered.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from nanovllm_dist import __version__
from nanovllm_dist.bench.json_process import reserve_stdout, write_line
from nanovllm_dist.client import DistLLM
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import NanoVLLMError
from nanovllm_dist.launcher.engine import Engine
from nanovllm_dist.sampling_params import SamplingParams


def run(llm: DistLLM, prompts: list[list[int]], output_lens: list[int], temperature: float) -> dict[str, Any]:
    """One `generate` call: wall seconds, and the engine's times of every request."""
    params = [
        SamplingParams(temperature=temperature, max_tokens=length, ignore_eos=True, detokenize=False)
        for length in output_lens
    ]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    if [len(output.token_ids) for output in outputs] != output_lens:
        raise NanoVLLMError("an answer is not as long as it was asked for")
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    return {
        "seconds": seconds,
        "first_token": [one.first_token for one in metrics],
        "per_token": [one.per_token for one in metrics if one.per_token >= 0],
    }


def main() -> int:
    """Process entry point: answer each line until the input ends."""
    channel = reserve_stdout()
    try:
        config = EngineConfig.from_json(sys.stdin.readline())
        with DistLLM.from_engine(Engine.start(config)) as llm:
            write_line(channel, {"ready": True, "version": __version__})
            for line in sys.stdin:
                write_line(channel, run(llm, **json.loads(line)))
    except NanoVLLMError as error:
        write_line(channel, {"error": str(error), "code": error.code})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
