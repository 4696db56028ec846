"""TransformersBaseline: Hugging Face `generate` as a rival, on the same work, in a process of its own.

Static batches, left padding, every batch run to its longest answer. Only wanted tokens count as output, as they
would to a user. It has the threads of one rank with all the cores, and waits as OpenMP's default has it, by spinning:
that is fastest on an idle host and ruinous on a busy one, where OMP_WAIT_POLICY=PASSIVE in the caller's environment
is fairer.
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
from nanovllm_dist.workers.platform.cpu import usable_cores

BATCH_SIZE = 32
TRANSFORMERS_WORKER = "nanovllm_dist.bench.transformers_worker"
_WAITING = "OMP_WAIT_POLICY"


class TransformersBaseline:
    """The rival, loaded and ready when the constructor returns.

    `config` is the engine's, resolved: model directory, dtype, device and load format are taken from it.
    Raises NanoVLLMError when transformers cannot load the model.
    """

    def __init__(self, config: EngineConfig) -> None:
        alone = config.replace(tensor_parallel_size=1, threads_per_worker=0)
        self._process = JsonProcess("transformers", TRANSFORMERS_WORKER, transformers_environment(config))
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


def transformers_environment(config: EngineConfig) -> dict[str, str]:
    """This process's environment with the threads of a single rank of the engine, which wait as said above."""
    alone = config.replace(tensor_parallel_size=1, threads_per_worker=0)
    environment = {**os.environ, **get_platform(config.device).worker_environment(alone, usable_cores())}
    environment.pop(_WAITING, None)
    if _WAITING in os.environ:
        environment[_WAITING] = os.environ[_WAITING]
    return environment


def waiting_policy() -> str:
    """How the rival's threads wait: `default`, or what OMP_WAIT_POLICY says."""
    return os.environ.get(_WAITING, "default")
