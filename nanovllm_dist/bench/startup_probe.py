"""A user's first minute, for `startup`: start an engine, ask for one token, and say when each thing happened.

    python -m nanovllm_dist.bench.startup_probe

It reads an engine config as one JSON line and writes a line per event; whoever reads them has the clock.
"""

from __future__ import annotations

import sys

from nanovllm_dist.bench.json_process import reserve_stdout, write_line
from nanovllm_dist.client import DistLLM
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import NanoVLLMError
from nanovllm_dist.launcher.engine import Engine, Progress
from nanovllm_dist.sampling_params import SamplingParams

_PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


def main() -> int:
    """Process entry point."""
    channel = reserve_stdout()
    config = EngineConfig.from_json(sys.stdin.readline())
    last = ""

    def report(progress: Progress) -> None:
        nonlocal last
        if progress.phase != last:
            write_line(channel, {"event": progress.phase})
        last = progress.phase

    try:
        with DistLLM.from_engine(Engine.start(config, progress=report)) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
            llm.generate(_PROMPT, params, use_tqdm=False)
            write_line(channel, {"event": "first_token"})
        write_line(channel, {"event": "stopped"})
    except NanoVLLMError as error:
        write_line(channel, {"error": str(error), "code": error.code})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
