"""The Ascend path computes what the CPU path does: prefill, chunked prefill and mixed steps by operator on simulated
NPUs, decodes as the GE graph that torchair lowered, saved and loaded, run by the simulated graph engine.

The operators are emulated with the documented arithmetic, so this shows that they are put together right, not how a
card rounds. The CPU path computes in fp32, with weights of the same dtype: in bf16 its own rounding would be as large
as what is looked for.
"""

from __future__ import annotations

# ruff: noqa: T201
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from npu_rig import SMALL, Rig
from numerics_rank import run_script

pytestmark = pytest.mark.npu
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
TIMEOUT = 200.0


def logits_of_ranks(model: str, dtype: str, ranks: int, directory: Path) -> dict[str, torch.Tensor]:
    """Whole logits of each kind of step, from a process for each rank."""
    script = Path(__file__).with_name("numerics_rank.py")
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(script.parent), str(script.parents[2])])
    commands = [
        [*(sys.executable, script, rank, ranks, directory / "store", directory / str(rank), model, dtype), "graphs"]
        for rank in range(ranks)
    ]
    processes = [
        subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, "PYTHONPATH": path},
            cwd=directory,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)[-4000:]
    parts = [torch.load(directory / str(rank)) for rank in range(ranks)]
    return {kind: torch.cat([part[kind] for part in parts], dim=-1) for kind in parts[0]}


@pytest.mark.parametrize(
    ("model", "dtype", "ranks"),
    [
        ("qwen3", "float32", 1),
        ("qwen3", "float32", 2),
        ("llama", "float32", 1),
        ("llama", "float32", 2),
        ("qwen2", "float32", 1),
        ("qwen3", "bfloat16", 1),
        ("qwen3", "bfloat16", 2),
        ("llama", "bfloat16", 1),
        ("llama", "bfloat16", 2),
        ("qwen2", "bfloat16", 2),
    ],
)
def test_logits_are_those_of_the_cpu_path(model: str, dtype: str, ranks: int, tmp_path: Path) -> None:
    found = logits_of_ranks(model, dtype, ranks, tmp_path)

    reference = Rig(SMALL[model], torch.float32, "torch", weights_dtype=getattr(torch, dtype))
    expected = run_script(model, reference, decode_by_graph=False)
    distances = {kind: float((found[kind] - logits).norm() / logits.norm()) for kind, logits in expected.items()}
    assert expected.keys() == {"prefill", "chunked", "mixed", "decode"}
    print(model, dtype, ranks, {kind: f"{distance:.1e}" for kind, distance in distances.items()})
    assert {kind: distance for kind, distance in distances.items() if not distance <= TOLERANCE[dtype]} == {}
