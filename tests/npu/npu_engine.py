"""Engines on simulated NPUs for tests: their options, a running command line, and greedy tokens from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prompts import PROMPTS

from nanovllm_dist.client import DistLLM
from nanovllm_dist.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]
FLOAT32_SITE = Path(__file__).with_name("float32_site")
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "num_blocks": 40,
    "block_size": 128,
    "threads_per_worker": 1,
}
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)


def environment() -> dict[str, str]:
    """Of a process whose engine may run in float32 on the simulated devices of this one."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(FLOAT32_SITE), os.environ["PYTHONPATH"]])}


def greedy_tokens(address: str, key_file: str | None = None) -> list[list[int]]:
    """Of every prompt, from a running engine."""
    llm = DistLLM.connect(address, key_file=key_file)
    try:
        return [list(output.token_ids) for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    finally:
        llm.close()


class Launched:
    """`nanovllm-launch` serving; `options` by field name, True for a flag."""

    def __init__(self, extra_environment: dict[str, str] | None = None, **options: Any) -> None:
        flags = []
        for name, value in {**SMALL, **options}.items():
            flag = f"--{name.replace('_', '-')}"
            flags.append(flag if value is True else f"{flag}={value}")
        self._directory = tempfile.TemporaryDirectory(prefix="nv")
        self._out, self._err = (Path(self._directory.name) / name for name in ("out", "err"))
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nanovllm_dist.launcher.cli", *flags],
                stdout=out,
                stderr=err,
                env={**environment(), **(extra_environment or {})},
                cwd=ROOT,
            )

    def address(self, seconds: float = 600.0) -> list[str]:
        """[address] or [address, key file], once it serves."""
        deadline = time.monotonic() + seconds
        while not (ready := self._out.read_text()).startswith("ready"):
            assert self.process.poll() is None, self.errors()
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.2)
        _, address, *key = ready.split()
        return [address, *(part.removeprefix("key-file=") for part in key)]

    def errors(self) -> str:
        """What it wrote to stderr so far."""
        return self._err.read_text()

    def stop(self) -> None:
        """As Ctrl-C does; raises when it does not leave."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self._directory.cleanup()
