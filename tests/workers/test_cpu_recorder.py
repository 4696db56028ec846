"""A step of decodes in one C call, from token table to token table, is the step that DecodeStep takes by operation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_steps import BF16, BLOCK_SIZE, CPU, MODELS, decodes, make_model, native
from rank_processes import in_processes

from nanovllm_dist.models.layers.decoder import DecoderLM
from nanovllm_dist.models.layers.kernels import TorchLayers
from nanovllm_dist.models.layers.torch_attention import TorchAttention
from nanovllm_dist.models.parallel import Communicator, GroupCommunicator, SingleRank
from nanovllm_dist.workers.decode_step import DecodeStep
from nanovllm_dist.workers.graphs import Graphs
from nanovllm_dist.workers.platform.cpu_group import CpuGroup
from nanovllm_dist.workers.platform.cpu_recorder import CpuRecorder, cpu_recorder
from nanovllm_dist.workers.platform.cpu_sampler import cpu_sampler
from nanovllm_dist.workers.platform.cpu_step import FEW_ROWS, fuse_step
from nanovllm_dist.workers.transfers import Array, DirectTransfers

MAX_ROWS, MAX_LEN = 24, 320
LENGTHS = {
    "one row": [40],
    "few rows": [5, 300, 64],
    "most of few": [9 + row for row in range(FEW_ROWS)],
    "many rows": [30 + row for row in range(MAX_ROWS)],
}
NAMES = ("llama", "qwen2", "qwen3", "one_kv_head")


class Rig:
    """A model over a cache and tables, its rows in slots that are not in order."""

    def __init__(self, model: DecoderLM, comm: Communicator, lengths: list[int], fused: bool = True) -> None:
        batch = decodes(model, lengths)
        rows = len(lengths)
        self.slots = torch.randperm(MAX_ROWS, generator=torch.Generator().manual_seed(rows))[:rows].numpy()
        self.known = torch.randint(0, 256, (MAX_ROWS + 1, MAX_LEN), generator=torch.Generator().manual_seed(7)).int()
        tables = torch.full((MAX_ROWS + 1, MAX_LEN // BLOCK_SIZE), -1, dtype=torch.int32)
        tables[torch.from_numpy(self.slots), : batch.block_tables.shape[1]] = batch.block_tables
        self.caches = batch.kv_caches
        sampler = cpu_sampler(comm, model.lm_head)
        assert sampler is not None
        logits = torch.empty(MAX_ROWS, model.lm_head.columns, dtype=BF16)
        model.fused = fuse_step(model, comm, BF16) if fused else None
        self.step = DecodeStep(model, sampler, self.known, tables, self.caches, logits)
        positions = np.array(lengths) - 1
        inverse = np.array([0.0, 1.5, 0.7], dtype=np.float32)[np.arange(rows) % 3]
        self.lengths = lengths
        self.arrays: list[Array] = [
            self.slots * MAX_LEN + positions,
            self.slots,
            positions,
            batch.slot_mapping.numpy(),
            (positions + 1).astype(np.int32),
            inverse,
            np.linspace(0, 0.99, rows),
        ]

    def by_operation(self) -> list[torch.Tensor]:
        return self._outcome(*self.step.forward([torch.from_numpy(array) for array in self.arrays], self.lengths))

    def in_one_call(self, recorder: CpuRecorder, times: int = 1) -> list[torch.Tensor]:
        graphs = Graphs(recorder, DirectTransfers(), CPU)
        for _ in range(times):
            outcome = graphs.run(len(self.lengths), self.arrays, self.lengths, self.step.forward)
        return self._outcome(*outcome)

    def _outcome(self, tokens: torch.Tensor, logits: torch.Tensor) -> list[torch.Tensor]:
        return [tokens.clone(), logits.clone(), self.known, *(part for cache in self.caches for part in cache)]


@torch.inference_mode()
def differences(model: DecoderLM, comm: Communicator, kernels: Any, lengths: list[int], fused: bool) -> list[int]:
    """Which of tokens, logits, token table and caches differ."""
    expected = Rig(model, comm, lengths, fused).by_operation()
    recorder = cpu_recorder(comm, kernels)
    assert recorder is not None
    found = Rig(model, comm, lengths, fused).in_one_call(recorder, times=2)  # a step run again writes the same
    return [index for index, pair in enumerate(zip(found, expected, strict=True)) if not torch.equal(*pair)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_one_call_gives_the_tokens_logits_and_cache_of_its_operations(
    name: str, int8: bool, lengths: list[int], tmp_path: Path
) -> None:
    kernels = native(MODELS[name]["head_dim"], int8)
    model = make_model(name, tmp_path, kernels)
    assert differences(model, SingleRank(), kernels, lengths, fused=True) == []


def test_layers_that_are_not_fused_are_run_by_operation(tmp_path: Path) -> None:
    kernels = native()
    model = make_model("llama", tmp_path, kernels)
    assert differences(model, SingleRank(), kernels, [40, 9], fused=False) == []


@torch.inference_mode()
def test_tokens_are_appended_to_their_rows_alone(tmp_path: Path) -> None:
    kernels = native()
    rig = Rig(make_model("llama", tmp_path, kernels), SingleRank(), [5, 300, 64])
    before = rig.known.clone()
    recorder = cpu_recorder(SingleRank(), kernels)
    assert recorder is not None
    tokens = rig.in_one_call(recorder)[0]
    before[torch.from_numpy(rig.slots), torch.tensor([5, 300, 64])] = tokens.int()
    assert torch.equal(rig.known, before)


def test_there_is_no_recorder_for_other_layers_or_other_hosts() -> None:
    class Elsewhere(SingleRank):
        world_size = 2

    assert cpu_recorder(SingleRank(), TorchLayers(TorchAttention())) is None
    assert cpu_recorder(Elsewhere(), native()) is None


def test_two_ranks_run_the_same_step_in_one_call_each(tmp_path: Path) -> None:
    found = in_processes(differences_of_all, 2, tmp_path)
    assert found == [{f"{name}, {rows}": [] for name in NAMES for rows in LENGTHS}] * 2


def differences_of_all(rank: int, group: GroupCommunicator, directory: Path) -> dict[str, Any]:
    assert isinstance(group, CpuGroup)
    own = directory / f"model{rank}"
    own.mkdir()
    found = {}
    for name in NAMES:
        kernels = native(MODELS[name]["head_dim"])
        model = make_model(name, own, kernels, comm=group)
        for rows, lengths in LENGTHS.items():
            found[f"{name}, {rows}"] = differences(model, group, kernels, lengths, fused=True)
    return found
