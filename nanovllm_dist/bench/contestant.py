"""Contestants: engines to be run side by side, each in a process and an environment of its own.

Each is told once what to load, and answers {"ready", "version"}; then it is given work, {"prompts", "output_lens",
"temperature"}, and answers with wall "seconds" and, where it knows them, a list over requests of seconds to the
"first_token" and "per_token" after it. How often and in what order they run is not decided here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from nanovllm_dist.bench.environment import usable_cores
from nanovllm_dist.bench.json_process import JsonProcess
from nanovllm_dist.bench.memory_watch import MARK, MemoryWatch
from nanovllm_dist.bench.transformers_baseline import BATCH_SIZE, TRANSFORMERS_WORKER, transformers_environment
from nanovllm_dist.bench.workloads import Workload
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError

OURS = "nanovllm_dist"
RIVALS = ("transformers", "vllm", "llama.cpp")
_PEERS = "nanovllm_dist.bench.peers"
_PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
_VLLM_CACHE_GIB = "1"


@dataclass(frozen=True)
class Entry:
    """How a contestant is started: interpreter, module, what it is told first, and its environment's additions.

    `driver`: the process only drives others, and its memory is not the contestant's.
    """

    name: str
    module: str
    told: dict[str, Any]
    python: str = ""
    environment: Mapping[str, str] | None = None
    additions: dict[str, str] = field(default_factory=dict)
    with_each: dict[str, Any] = field(default_factory=dict)
    driver: bool = False


@dataclass(frozen=True)
class Rivals:
    """Where the rivals are: a Python that has vLLM, with libraries to preload; llama.cpp's server, with a model."""

    names: tuple[str, ...] = ()
    vllm_python: str = ""
    vllm_preload: tuple[str, ...] = ()
    llama_server: str = ""
    gguf: str = ""


class Answer(msgspec.Struct, frozen=True):
    """What a contestant says of one piece of work; times in seconds."""

    seconds: float
    first_token: list[float] = []
    per_token: list[float] = []


def entries(config: EngineConfig, rivals: Rivals, longest: int) -> list[Entry]:
    """Ourselves and the rivals, for requests of at most `longest` tokens; `config` is resolved.

    Raises ConfigError: a rival is unknown, or a program or file that it takes is not there.
    """
    limits = {"max_model_len": longest, "max_num_seqs": config.max_num_seqs}
    made = [Entry(OURS, f"{_PEERS}.ours", msgspec.to_builtins(config))]
    for name in rivals.names:
        if name == "transformers":
            alone = msgspec.to_builtins(config.replace(tensor_parallel_size=1, threads_per_worker=0))
            environment = transformers_environment(config)
            made.append(Entry(name, TRANSFORMERS_WORKER, alone, "", environment, with_each={"batch_size": BATCH_SIZE}))
        elif name == "vllm":
            python = _file(rivals.vllm_python, "--vllm-python")
            told = {"model": config.model, "dtype": config.dtype, **limits}
            additions = _vllm_environment(rivals.vllm_preload)
            made.append(Entry(name, f"{_PEERS}.vllm_offline", told, python, additions=additions))
        elif name == "llama.cpp":
            server, gguf = _file(rivals.llama_server, "--llama-server"), _file(rivals.gguf, "--gguf")
            told = {"server": server, "gguf": gguf, "threads": usable_cores(), **limits}
            made.append(Entry(name, f"{_PEERS}.llama_cpp", told, driver=True))
        else:
            raise ConfigError(f"--compare {name}: there are {', '.join(RIVALS)}")
    return made


class Contestant:
    """A started contestant, ready and past its first token when the constructor returns.

    Attributes:
        version: what it calls itself.
        ready, first_token: seconds from the command until it took work, and until it had answered with one token.

    Raises NanoVLLMError when it cannot start.
    """

    def __init__(self, entry: Entry, watch: MemoryWatch) -> None:
        self.name = entry.name
        self._entry = entry
        environment = {**(os.environ if entry.environment is None else entry.environment), **entry.additions}
        environment[MARK] = entry.name
        started = time.perf_counter()
        python = {"python": entry.python} if entry.python else {}
        self._process = JsonProcess(entry.name, entry.module, environment, **python)
        try:
            if entry.driver:
                watch.leave_out(self._process.pid)
            self._process.send(entry.told)
            self.version = str(self._process.receive().get("version", ""))
            self.ready = time.perf_counter() - started
            self._ask([_PROMPT], [1], 0.0)
            self.first_token = time.perf_counter() - started
        except BaseException as error:
            self._process.__exit__(type(error), error, None)
            raise

    def run(self, workload: Workload, prompts: list[list[int]], temperature: float) -> Answer:
        """Do the whole workload with these prompts. Raises NanoVLLMError."""
        return self._ask(prompts, list(workload.output_lens), temperature)

    def stop(self) -> None:
        """End its process."""
        self._process.close()

    def _ask(self, prompts: list[list[int]], output_lens: list[int], temperature: float) -> Answer:
        work = {"prompts": prompts, "output_lens": output_lens, "temperature": temperature, **self._entry.with_each}
        self._process.send(work)
        return msgspec.convert(self._process.receive(), Answer)


def _vllm_environment(preload: tuple[str, ...]) -> dict[str, str]:
    """All cores, a cache no larger than the work needs, no network; the libraries that its guide wants preloaded."""
    return {
        "LD_PRELOAD": ":".join(_file(library, "--vllm-preload") for library in preload),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{usable_cores() - 1}",
        "VLLM_CPU_KVCACHE_SPACE": _VLLM_CACHE_GIB,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _file(path: str, option: str) -> str:
    if not path:
        raise ConfigError(f"this rival takes {option}")
    if not Path(path).is_file():
        raise ConfigError(f"{option} {path}: no such file")
    return str(Path(path).absolute())
