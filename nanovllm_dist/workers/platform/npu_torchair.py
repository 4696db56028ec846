"""Decodes as graphs of CANN's graph engine, lowered by torchair: one launch a step.

A size is traced once, with every tensor of one shape and the lengths as numbers that are inputs; what was lowered is
kept on disk, and what runs is always what was loaded from there: without guards, it is never compiled a second time,
whatever the lengths. All that guards would have looked at is in the name of its directory. What a step computes is
unknown here.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
import torch_npu

from nanovllm_dist import __version__
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.workers import decode_step
from nanovllm_dist.workers.decode_step import DecodeStep
from nanovllm_dist.workers.graphs import Replay, StepBody, T
from nanovllm_dist.workers.platform.graph_cache import entry_directory, try_lock
from nanovllm_dist.workers.platform.npu_graphs import cache_root, decode_sizes
from nanovllm_dist.workers.platform.npu_layers import NpuLayers

# torchair's name of the file that an entry is
_ENTRY = "compiled_module"
_COUNT = count()
_LOCK_POLL_SECONDS = 1.0


class TorchairRecorder:
    """A Recorder of the current device."""

    records_prefills = False
    shares_logits = False
    records_ahead = True

    def __init__(self, config: EngineConfig, model: ModelConfig, layers: NpuLayers, comm: Communicator) -> None:
        self._config = config
        self._model = model
        self._layers = layers
        self._comm = comm
        self._root = cache_root(config)

    def decode_sizes(self, max_num_seqs: int) -> list[int]:
        """See npu_graphs."""
        return decode_sizes(max_num_seqs)

    def record(self, key: Hashable, body: StepBody[T], inputs: list[torch.Tensor], lengths: list[int]) -> Replay[T]:
        """See Recorder; `body` is the `forward` of a DecodeStep.

        Raises:
            ConfigError: no compiled graph can be kept on disk.
        """
        step = body.__self__  # type: ignore[attr-defined]
        assert isinstance(step, DecodeStep)
        # the engine keeps the addresses of parameters, and is given those of other tensors with each launch
        step.kv_caches = [(_parameter(keys), _parameter(values)) for keys, values in step.kv_caches]
        size = len(lengths)
        directory = entry_directory(self._root, self._facts(step, size))
        with self._alone(directory, inputs[0].device):
            loaded = self._load(step, size, directory)
            # a first run talks to the other ranks: one of them that compiles needs all to
            if self._on_any_rank(loaded is None, inputs[0].device):
                with _traceable(step, inputs, self._layers.constants):
                    self._compile(step, size, directory)(inputs, _trace_lengths(size, self._config.max_model_len))
                torch._dynamo.reset()  # what was traced would keep an engine's graph of its own
                loaded = self._load(step, size, directory)
        if loaded is None:
            raise ConfigError(
                f"graph_mode=torchair: torchair kept no compiled graph in {directory}: its log says why; "
                "graph_mode=aclgraph needs none"
            )
        run: Callable[[list[torch.Tensor], list[int]], T] = loaded
        return lambda lengths: run(inputs, lengths)

    @contextmanager
    def _alone(self, directory: Path, device: torch.device) -> Iterator[None]:
        """While no other engine uses this rank's directory, nor those of the other ranks.

        Ranks take theirs together or not at all: of two engines that each held some, both would wait for ever. Nor do
        they wait in a collective, which has a time limit.
        """
        while True:
            lock = try_lock(directory)
            if not self._on_any_rank(lock is None, device):
                break
            if lock is not None:
                os.close(lock)
            time.sleep(_LOCK_POLL_SECONDS)
        assert lock is not None
        try:
            yield
        finally:
            os.close(lock)

    def _load(self, step: DecodeStep, size: int, directory: Path) -> Any:
        """What was compiled before, over this step's own tensors; None if there is no such entry or it is broken."""
        if not any(directory.rglob(_ENTRY)):
            return None
        compiled = self._lazy(step, size, directory).compile(vars(decode_step))
        return compiled if any(directory.rglob(_ENTRY)) else None  # torchair removes what it cannot load

    def _compile(self, step: DecodeStep, size: int, directory: Path) -> Any:
        for entry in directory.rglob(_ENTRY):
            entry.unlink()
        return self._lazy(step, size, directory)

    def _lazy(self, step: DecodeStep, size: int, directory: Path) -> Any:
        """torchair's handle of one size. An entry belongs to a function's name; whether it was compiled twice, which
        torchair refuses to keep, is told by the code, so that is made anew each time."""
        import torchair

        config = torchair.CompilerConfig()
        config.experimental_config.frozen_parameter = True
        source = DecodeStep.forward
        code = source.__code__.replace(co_name=f"decode_{size}_{next(_COUNT)}")
        function = FunctionType(code, source.__globals__, f"decode_{size}")
        method = MethodType(function, step)
        return torchair.inference.cache_compile(method, config=config, dynamic=True, cache_dir=str(directory))

    def _on_any_rank(self, flag: bool, device: torch.device) -> bool:
        ranks = torch.tensor([int(flag)], dtype=torch.int32, device=device)
        return bool(self._comm.all_reduce(ranks).item())

    def _facts(self, step: DecodeStep, size: int) -> dict[str, Any]:
        """All that the graph of a size depends on, but for this package's code."""
        config = self._config
        tensors = (step.known, step.block_tables, *chain(*step.kv_caches), *step.parameters(), *self._layers.constants)
        return {
            "model": asdict(self._model),
            "tensors": [[str(tensor.dtype), *tensor.shape] for tensor in tensors],
            "options": {
                name: getattr(config, name)
                for name in ("dtype", "max_model_len", "max_num_seqs", "block_size", "weight_format")
            },
            "rows": size,
            "ranks": self._comm.world_size,
            "rank": self._comm.rank,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torch_npu": torch_npu.__version__,
                "cann": torch_npu.npu.utils.get_cann_version(),
                "nanovllm_dist": __version__,
            },
            "device": torch_npu.npu.get_device_name(),
        }


@contextmanager
def _traceable(step: DecodeStep, inputs: list[torch.Tensor], constants: list[torch.Tensor]) -> Iterator[None]:
    """While a step is traced: every tensor has one shape, and the token table is written to in another place.

    A table that is both read and written would be copied in each step; the graph gets the one table for both when it is
    loaded. Reads come before writes in it all the same: what is written is made of what was read.
    """
    step.sampled = torch.zeros_like(step.known)
    tensors = (step.known, step.sampled, step.block_tables, *chain(*step.kv_caches), *inputs, *constants)
    for tensor in tensors:
        torch._dynamo.mark_static(tensor)
    try:
        yield
    finally:
        step.sampled = step.known


def _parameter(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _trace_lengths(rows: int, longest: int) -> list[int]:
    """Lengths to trace with. torch 2.13 makes an input of each whatever it is; these are above 1, and differ unless
    there are more than lengths, so that no torch that treats 0, 1 or equal numbers alike can make fewer of them."""
    return [2 + row % max(1, longest - 1) for row in range(rows)]
