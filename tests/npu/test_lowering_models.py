"""Real lowering by Huawei's torchair: the decode step of whole models is one GE graph that updates its cache in place.

Every depth and width is the model's own; weights are memory that nobody has written to, because only shapes matter. The
graph is not run. Four ranks are one process with a process group that answers without talking.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from npu_rig import LLAMA_32_1B, QWEN2_7B, QWEN3_06B, QWEN3_32B, Rig

from nanovllm_dist.models.parallel import Communicator, GroupCommunicator, SingleRank

pytestmark = pytest.mark.npu
ROWS = 8


@contextmanager
def group_of(ranks: int) -> Iterator[Communicator]:
    if ranks == 1:
        yield SingleRank()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        hccl = SimpleNamespace(get_hccl_comm_name=lambda rank, init_comm=True: "a group")
        with mock.patch.object(dist.ProcessGroup, "_get_backend", return_value=hccl):
            yield GroupCommunicator()
    finally:
        dist.destroy_process_group()


def lower(raw: dict[str, Any], comm: Communicator, cache: Path) -> Any:
    """The GE graph of a decode of `ROWS` rows."""
    from standin import lowering
    from torchair.core._backend import TorchNpuGraph

    from nanovllm_dist.workers.platform.npu_torchair import TorchairRecorder

    rig = Rig(raw, torch.bfloat16, comm=comm, weights=False, graph_cache_dir=cache)
    recorder = TorchairRecorder(rig.config, rig.model_config, rig.layers, comm)  # type: ignore[arg-type]
    outputs = [torch.empty(0), torch.empty(0)]
    with (
        lowering.capture() as lowered,
        mock.patch.object(TorchNpuGraph, "run", return_value=outputs),
        torch.inference_mode(),
    ):
        recorder.record(ROWS, rig.decode_step().forward, rig.decode_inputs([], ROWS), [1] * ROWS)
    return lowered.graph


@pytest.mark.parametrize(
    ("raw", "ranks", "norms_heads"),
    [(QWEN3_06B, 1, True), (QWEN3_32B, 4, True), (LLAMA_32_1B, 2, False), (QWEN2_7B, 4, False)],
    ids=["qwen3-0.6b", "qwen3-32b-tp4", "llama-3.2-1b-tp2", "qwen2-7b-tp4"],
)
def test_a_decode_is_one_graph_that_copies_nothing(
    raw: dict[str, Any], ranks: int, norms_heads: bool, tmp_path: Path
) -> None:
    with group_of(ranks) as comm:
        graph = lower(raw, comm, tmp_path)
    layers = raw["num_hidden_layers"]
    found = graph.operators

    assert graph.copies == 0
    expected = {
        "FusedInferAttentionScore": layers,
        "ScatterNdUpdate": 2 * layers + 1,  # keys, values, and the token table
        "RotaryMul": 2 * layers,
        "AddRmsNorm": 2 * layers,
        "RmsNorm": 1 + (2 * layers if norms_heads else 0),
        "SwiGlu": layers,
        "MatMul": 4 * layers + 1,
        "Transpose": 0 if ranks == 1 else 1,  # of the ranks' statistics; no weight is transposed
        "HcomAllReduce": 2 * layers + 2 if ranks > 1 else 0,  # two a layer, the embedding's, the sampled token's
        "HcomAllGather": 1 if ranks > 1 else 0,
        "TensorMove": 0,
        "Assign": 0,
    }
    assert {name: found[name] for name in expected} == expected


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Qwen3-0.6B's."""
    return lower(QWEN3_06B, SingleRank(), tmp_path_factory.mktemp("graphs"))


def test_caches_are_written_in_place_and_never_returned(graph: Any) -> None:
    by_name = {op.name: op for op in graph.definition.op}
    updates = [op for op in by_name.values() if op.type == "ScatterNdUpdate"]

    written = [op.input[0] for op in updates]
    assert len(set(written)) == len(updates)
    assert {by_name[name.rsplit(":", 1)[0]].type for name in written} == {"Data"}
    assert len(graph.outputs) == 2  # tokens and logits
    assert [graph.producer(value).type for value in graph.outputs] == ["GatherV2", "MatMul"]
    assert graph.assigned == {}


def test_lengths_and_shapes_are_as_the_device_needs_them(graph: Any) -> None:
    by_name = {op.name: op for op in graph.definition.op}
    attentions = [op for op in by_name.values() if op.type == "FusedInferAttentionScore"]

    sources = {
        value.rsplit(":", 1)[0]
        for op in attentions
        for described, value in zip(op.input_desc, op.input, strict=False)
        if described.name == "actual_seq_lengths_kv"
    }
    assert len(sources) == 1
    lengths = by_name[sources.pop()]
    assert lengths.type == "Data"
    assert list(lengths.output_desc[0].shape.dim) == [ROWS]
    assert all(dim > 0 for node in graph.inputs for dim in node.shape), "an input has no shape of its own"
    assert {op.attr["input_layout"].s for op in attentions} == {b"BNSD"}
