"""TransformersBaseline: Hugging Face `generate` as a rival, on the same work, in a process of its own.

Static batches, left padding, every batch run to its longest answer. Only wanted tokens count as output, as they
would to a user. What it is compared with is not known here.
"""

from __future__ import annotations

import os
from types import TracebackType

import msgspec
from typing_extensions import Self

from nanovllm_dist.bench.json_process import JsonProcess
from nanovllm_dist.bench.workloads import Workload
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.workers.platform import get_platform

BATCH_SIZE = 32


class TransformersBaseline:
    """The rival, loaded and ready when the constructor returns.

    `config` is the engine's, resolved: model directory, dtype, device and load format are taken from it.
    Raises NanoVLLMError when transformers cannot load the model.
    """

    def __init__(self, config: EngineConfig) -> None:
        # threads as one rank of ours that has all the cores; spinning while they wait, they collapse on a busy host
        alone = config.replace(tensor_parallel_size=1, threads_per_worker=0)
        environment = {**os.environ, **get_platform(config.device).worker_environment(alone)}
        self._process = JsonProcess("transformers", "nanovllm_dist.bench.transformers_worker", environment)
        try:
            self._process.send(msgspec.to_builtins(alone))
            self._process.receive()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def run(self, workload: Workload, prompts: list[list[int]], temperature: float) -> float:
        """Wall seconds of the whole workload with these prompts. Raises NanoVLLMError."""
        self._process.send(
            {
                "prompts": prompts,
                "output_lens": list(workload.output_lens),
                "temperature": temperature,
                "batch_size": BATCH_SIZE,
            }
        )
        return float(self._process.receive()["seconds"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.__exit__(kind, error, trace)
