"""A step in one C call on two ranks gives the numbers of its operations, also where one rank alone runs it so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_steps import BF16, CPU, MODELS, decodes, make_model, mixed, native, run, run_mixed
from rank_processes import in_processes

from nanovllm_dist.models.layers.decoder import DecoderLM
from nanovllm_dist.models.layers.embedding import LMHead, VocabWeight
from nanovllm_dist.models.layers.kernels import TorchLayers
from nanovllm_dist.models.layers.torch_attention import TorchAttention
from nanovllm_dist.models.parallel import Communicator, GroupCommunicator, SingleRank
from nanovllm_dist.workers.platform.cpu_group import CpuGroup
from nanovllm_dist.workers.platform.cpu_sampler import CpuSampler, cpu_sampler
from nanovllm_dist.workers.platform.cpu_step import FEW_ROWS, fuse_step

# Of one key/value head each rank has a copy
NAMES = ("llama", "qwen2", "qwen3", "one_kv_head")
STEPS: dict[str, tuple[list[tuple[int, int]], list[int]]] = {
    "one row": ([], [40]),
    "few rows": ([], [5, 300, 64]),
    "many rows": ([], [30] * (FEW_ROWS + 1)),
    # of more tokens than a product or a meeting takes at once
    "prefills": ([(400, 0), (300, 90)], [9, 77]),
}
VOCAB = 251


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found, in rank order."""
    return in_processes(check_everything, 2, tmp_path_factory.mktemp("ranks"))


def check_everything(rank: int, group: GroupCommunicator, directory: Path) -> dict[str, Any]:
    assert isinstance(group, CpuGroup)
    own = directory / f"model{rank}"
    own.mkdir()
    return {"steps": {name: check_steps(name, own, group) for name in NAMES}, "tokens": check_sampler(group)}


def check_steps(name: str, directory: Path, comm: CpuGroup) -> dict[str, dict[str, Any]]:
    """Each step by operation, fused, and fused on rank 1 alone."""
    kernels = native(MODELS[name]["head_dim"])
    model = make_model(name, directory, kernels, comm=comm)
    same_weights(model, comm)
    fused = fuse_step(model, comm, BF16)
    assert fused is not None
    found: dict[str, dict[str, Any]] = {}
    for step, (prefills, lengths) in STEPS.items():
        results = []
        for runs in (None, fused, fused if comm.rank else None):
            model.fused = runs
            batch = mixed(model, prefills, lengths) if prefills else decodes(model, lengths)
            hidden = (run_mixed if prefills else run)(model, batch)
            results.append([hidden, *(part for cache in batch.kv_caches for part in cache)])
        expected, in_one, unlike = results
        found[step] = {
            "fused": all(map(torch.equal, in_one, expected)),
            "unlike": all(map(torch.equal, unlike, expected)),
            "hidden": [value.hex() for value in expected[0].flatten().tolist()[:500]],
        }
    return found


def same_weights(model: DecoderLM, comm: Communicator) -> None:
    """What every rank holds whole is the same in a checkpoint; drawn per shard, it need not be."""
    for parameter in model.parameters():
        if parameter.dim() == 1 and parameter.numel() == len(model.norm.weight):
            comm.broadcast(parameter.data)


def check_sampler(comm: CpuGroup) -> list[int]:
    """Draws from one vocabulary, each rank with its range of it."""
    rows = VocabWeight("lm_head.weight", VOCAB, 2, comm, BF16, CPU)
    sampler = cpu_sampler(comm, LMHead(rows, False, comm))
    assert isinstance(sampler, CpuSampler)
    own = torch.full((len(logits()), len(rows.weight)), 100.0, dtype=BF16)  # padding, where it is likeliest
    own[:, : rows.end - rows.start] = logits()[:, rows.start : rows.end]
    tokens: list[int] = sampler.sample(own, *draws()).tolist()
    return tokens


def logits() -> torch.Tensor:
    return torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(1)).to(BF16) * 3


def draws() -> tuple[torch.Tensor, torch.Tensor]:
    inverse = torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat(10)
    return inverse, torch.linspace(0, 0.999, 40).double()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_a_fused_step_on_two_ranks_is_the_same_as_its_operations(
    outcomes: list[dict[str, Any]], name: str, step: str
) -> None:
    assert [found["steps"][name][step]["fused"] for found in outcomes] == [True, True]


@pytest.mark.parametrize("step", STEPS)
def test_a_rank_that_cannot_fuse_its_shard_keeps_step_with_one_that_can(
    outcomes: list[dict[str, Any]], step: str
) -> None:
    assert all(found["steps"][name][step]["unlike"] for found in outcomes for name in NAMES)


@pytest.mark.parametrize("step", STEPS)
def test_both_ranks_have_the_same_hidden_states(outcomes: list[dict[str, Any]], step: str) -> None:
    for name in NAMES:
        assert outcomes[0]["steps"][name][step]["hidden"] == outcomes[1]["steps"][name][step]["hidden"]


def test_two_ranks_draw_what_one_rank_draws(outcomes: list[dict[str, Any]]) -> None:
    alone = SingleRank()
    sampler = cpu_sampler(alone, LMHead(VocabWeight("lm_head.weight", VOCAB, 2, alone, BF16, CPU), False, alone))
    assert sampler is not None
    expected = sampler.sample(logits(), *draws()).tolist()
    assert [found["tokens"] for found in outcomes] == [expected, expected]


def test_without_shared_memory_ranks_run_by_operation(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path, TorchLayers(TorchAttention()))

    class Elsewhere(SingleRank):
        world_size = 2

    assert fuse_step(model, Elsewhere(), BF16) is None
    assert cpu_sampler(Elsewhere(), model.lm_head) is None
