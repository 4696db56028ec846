"""What a decode costs the host in each graph mode: operators that Python launches, and microseconds on this machine.

The device is simulated. It executes nothing while the host's time is taken, but a launch is dearer than on a card, by
some 40 us: the counts are what a card would get, the times are this simulation's. torchair's is without what its engine
does.
"""

from __future__ import annotations

# ruff: noqa: T201
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from npu_rig import Rig, Sequence, random_sequences, shape_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.npu
ROWS = 8
LAYERS = 28
NARROW = shape_of("Qwen3", 256, 512, LAYERS, (4, 2), 1003, 128, tied=True)
STEPS = 5
Launch = Callable[[], object]


class Counting(TorchDispatchMode):
    """Counts operators that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        is_view = any(argument.alias_info and not argument.alias_info.is_write for argument in func._schema.arguments)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        # what the emulation of an operator does on the CPU is no launch
        on_device = any(tensor.device.type == "npu" for tensor in tensors)
        self.count += on_device and not is_view and not func.name().startswith("aten::empty")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    torch.npu.set_device(0)
    yield Rig(NARROW, torch.bfloat16, rows=ROWS, device=torch.device("npu", 0), graph_cache_dir=tmp_path)
    torch.npu.synchronize()


@torch.inference_mode()
def launches(rig: Rig, mode: str) -> tuple[Launch, list[Sequence]]:
    """A decode of `ROWS` rows in that mode."""
    sequences = random_sequences([5] * ROWS, 1003)
    rig.step([(sequence, 4) for sequence in sequences])
    inputs, lengths = rig.decode_inputs(sequences, ROWS), [5] * ROWS
    step = rig.decode_step()
    if mode == "eager":
        return lambda: step.forward(inputs, lengths), sequences
    if mode == "aclgraph":
        from nanovllm_dist.workers.platform.npu_aclgraph import AclGraphRecorder

        acl = AclGraphRecorder(rig.layers)  # type: ignore[arg-type]
        replay = acl.record(ROWS, step.forward, inputs, lengths)
    else:
        from nanovllm_dist.workers.platform.npu_torchair import TorchairRecorder

        replay = TorchairRecorder(rig.config, rig.model_config, rig.layers, rig.comm).record(  # type: ignore[arg-type]
            ROWS, step.forward, inputs, lengths
        )
    return lambda: replay(lengths), sequences


@pytest.mark.parametrize(
    ("mode", "least", "most"),
    [("eager", 12 * LAYERS, 20 * LAYERS + 100), ("aclgraph", LAYERS, LAYERS + 2), ("torchair", 0, 1)],
)
@torch.inference_mode()
def test_operators_that_the_host_launches_for_a_decode(rig: Rig, mode: str, least: int, most: int) -> None:
    from standin import engine

    launch, _sequences = launches(rig, mode)
    launch()
    torch.npu.synchronize()
    before = engine.runs.launched
    with mock.patch.object(engine.Program, "run", return_value=[]), Counting() as counting:
        _silently(launch)
    graphs = engine.runs.launched - before
    spent = min(_timed(launch) for _ in range(STEPS)) * 1e6

    print(f"-> {mode}: {counting.count} operators, {graphs} engine launches, {spent:.0f} us of host, {LAYERS} layers")
    assert least <= counting.count <= most
    assert graphs == (mode == "torchair")


def _silently(launch: Launch) -> None:
    with contextlib.suppress(IndexError):  # a graph that is not run gives nothing
        launch()


def _timed(launch: Launch) -> float:
    from standin import engine, runtime

    torch.npu.synchronize()
    with mock.patch.object(engine.Program, "run", return_value=[]), runtime.held_back():
        start = time.perf_counter()
        _silently(launch)
        return time.perf_counter() - start
