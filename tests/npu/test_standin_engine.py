"""torchair lowers for real, what it lowered can be read, and the stand-in's engine computes just that."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.npu

Step = Callable[..., Any]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    from standin import operators

    operators.install()
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(step: Step, *, dynamic: bool = False) -> Step:
    import torchair

    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    return torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)


def layer(x: torch.Tensor, gamma: torch.Tensor, weight: torch.Tensor, cache: torch.Tensor, places: torch.Tensor) -> Any:
    hidden, _, total = torch.ops.npu.npu_add_rms_norm(x, x, gamma, 1e-6)
    gated = torch.ops.npu.npu_swiglu(F.linear(hidden, weight))
    torch.ops.npu.npu_scatter_nd_update_(cache, places, gated)
    return gated, total


def layer_inputs(device: str) -> list[torch.Tensor]:
    tensors = [
        torch.randn(4, 16),
        torch.randn(16),
        torch.randn(16, 16),
        torch.zeros(9, 8),
        torch.tensor([[3], [0], [8], [1]]),
    ]
    return [tensor.to(device) for tensor in tensors]


def picking(table: torch.Tensor, ids: torch.Tensor, threshold: torch.Tensor, halves: torch.Tensor) -> Any:
    """Operators around sampling: most that a decode step has besides its layers."""
    rows = F.embedding(ids, table)
    top, index = rows.max(-1)
    masses = F.pad(torch.exp(rows - top.unsqueeze(1)), (0, 3)).view(len(ids), 1, -1)
    first, rest = torch.cat([masses.sum(-1), index.unsqueeze(1).float()], dim=1).split([1, 1], dim=-1)
    until = masses.squeeze(1).cumsum(-1)
    before = (until <= threshold.unsqueeze(1) * until[:, -1:]) & (until < until[:, -1:])
    place = before.float().sum(-1, keepdim=True).long().clamp(0, 15)
    drawn = torch.where(threshold == 0, index, place.view(-1))
    spread = until.gather(1, place).expand(-1, 2).transpose(0, 1).reshape(-1)
    small = rows.to(torch.bfloat16) @ halves.t()
    return (
        drawn,
        first,
        rest,
        spread,
        small,
        F.silu(rows),
        rows.masked_fill(rows > 0, 0.0),
        rows.argmax(-1),
        small.float().mean(-1),
    )


def picking_inputs(device: str) -> list[torch.Tensor]:
    tensors = [
        torch.randn(20, 16),
        torch.tensor([3, 19, 0, 7]),
        torch.tensor([0.0, 0.2, 0.5, 0.99]),
        torch.randn(5, 16).bfloat16(),
    ]
    return [tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize(("step", "inputs"), [(layer, layer_inputs), (picking, picking_inputs)])
def test_the_lowered_graph_computes_what_the_function_does(
    step: Step, inputs: Callable[[str], Any], device: str
) -> None:
    given = inputs(device)
    expected_from = [tensor.clone() for tensor in given]

    results = compiled(step)(*given)

    for result, want in zip(results, step(*expected_from), strict=True):
        assert (result.dtype, result.shape, result.device) == (want.dtype, want.shape, want.device)
        torch.testing.assert_close(result.cpu(), want.cpu(), rtol=1e-5, atol=1e-5)
    for after, want in zip(given, expected_from, strict=True):
        torch.testing.assert_close(after.cpu(), want.cpu())


def test_each_call_is_one_launch_of_one_loaded_graph() -> None:
    from standin import engine

    loaded, launched = engine.runs.loaded, engine.runs.launched
    run, inputs = compiled(layer), layer_inputs("npu")

    for _ in range(3):
        run(*inputs)

    assert (engine.runs.loaded - loaded, engine.runs.launched - launched) == (1, 3)


def attend(query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch.ops.npu.npu_fused_infer_attention_score(
        query, cache, cache, block_table=table, actual_seq_lengths_kv=lengths, num_heads=4, num_key_value_heads=2,
        scale=0.25, input_layout="BNSD", block_size=16,
    )[0]  # fmt: skip


def test_lengths_reach_the_graph_anew_in_each_call() -> None:
    from standin import engine

    query, cache = torch.randn(2, 4, 1, 16), torch.randn(9, 2, 16, 16)
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    for tensor in (query, cache, table):
        torch._dynamo.mark_static(tensor)
    loaded, run = engine.runs.loaded, compiled(attend, dynamic=True)

    for lengths in ([5, 6], [7, 40], [64, 2]):
        torch.testing.assert_close(run(query, cache, table, lengths), attend(query, cache, table, lengths))

    assert engine.runs.loaded == loaded + 1


def test_what_was_lowered_can_be_read() -> None:
    from standin import lowering

    with lowering.capture() as lowered:
        compiled(layer)(*layer_inputs("cpu"))

    graph = lowered.graph
    assert graph.operators == {"AddRmsNorm": 1, "MatMul": 1, "Transpose": 1, "SwiGlu": 1, "ScatterNdUpdate": 1}
    assert sorted(node.shape for node in graph.inputs) == [(4, 1), (4, 16), (9, 8), (16,), (16, 16)]
    assert [graph.producer(name).type for name in graph.outputs] == ["SwiGlu", "AddRmsNorm", "ScatterNdUpdate"]
    assert {graph.inputs[index].shape for index in graph.assigned.values()} == {(9, 8)}
    assert graph.copies == 0
    assert [graph.inputs[index].shape for index in graph.updated] == [(9, 8)]


def test_a_write_into_a_view_of_an_input_is_refused() -> None:
    def through_view(cache: torch.Tensor, places: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        torch.ops.npu.npu_scatter_nd_update_(cache.view(-1, 4), places, rows)
        return cache.sum()

    with pytest.raises(ValueError, match="writes into what a Reshape made"):
        compiled(through_view)(torch.zeros(2, 3, 4), torch.tensor([[5]]), torch.ones(1, 4))


def test_a_copy_in_the_graph_is_seen() -> None:
    from standin import lowering

    def written_twice(cache: torch.Tensor, places: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        before = cache * 2
        torch.ops.npu.npu_scatter_nd_update_(cache, places, rows)
        return before

    with lowering.capture() as lowered:
        cache = torch.ones(3, 4)
        before = compiled(written_twice)(cache, torch.tensor([[2]]), torch.zeros(1, 4))

    assert lowered.graph.copies == 1
    assert (before.sum(), cache.sum()) == (24, 8)


def test_an_operator_without_a_converter_is_torchairs_error() -> None:
    def bad(x: torch.Tensor) -> torch.Tensor:
        return x.roll(1)

    with pytest.raises(Exception, match=r"roll|converter"):
        compiled(bad)(torch.ones(3))


def test_dtypes_that_cann_does_not_mix_are_refused_by_the_engine() -> None:
    from standin.engine_operators import COMPUTE

    with pytest.raises(TypeError, match="do not mix"):
        COMPUTE["Add"](torch.ones(2), torch.ones(2, dtype=torch.bfloat16), {})


CACHED = """
import sys, torch, torch_npu, torchair
from standin import engine, lowering
class Step(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    def forward(self, x, lengths):
        return torch.nn.functional.linear(x, self.weight) * lengths[0]
step = Step()
config = torchair.CompilerConfig()
run = torchair.inference.cache_compile(step.forward, config=config, dynamic=True, cache_dir=sys.argv[1])
with lowering.capture() as lowered, torch.no_grad():
    x = torch.ones(2, 3)
    torch._dynamo.mark_static(x)
    print([run(x, [length]).tolist() for length in (2, 3)], len(lowered.graphs), engine.runs.loaded)
"""


@pytest.mark.slow
def test_a_second_process_runs_the_cached_graph_and_lowers_nothing(tmp_path: Path) -> None:
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CACHED, str(tmp_path)], capture_output=True, text=True, timeout=200, check=True
        )
        outputs.append(done.stdout.splitlines()[-1])

    assert outputs == [f"[[[6.0, 24.0], [6.0, 24.0]], [[9.0, 36.0], [9.0, 36.0]]] {lowered} 1" for lowered in (1, 0)]
