"""How often torchair compiles: once for each size, whatever the lengths, and in a second process not at all.

A graph that was compiled for something else, or whose file is broken, is compiled anew: the tokens are always right.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_process import PROMPT, STEPS, decode, recorder_of
from npu_rig import SMALL, Rig, Sequence

pytestmark = pytest.mark.npu
SIZE = 4
LONG = 100


@pytest.fixture(scope="module")
def right_tokens() -> list[int]:
    """What the CPU path gives."""
    return greedy(Rig(SMALL["qwen3"], torch.float32, "torch"), LONG)


def greedy(rig: Rig, count: int) -> list[int]:
    sequence = Sequence(list(PROMPT), 0)
    rig.step([(sequence, len(PROMPT) - 1)])
    for _ in range(count):
        sequence.tokens.append(int(rig.step([(sequence, 1)]).argmax()))
    return sequence.tokens[len(PROMPT) :]


def run_process(graphs: Path, size: int = SIZE, block_rows: int = 8) -> dict[str, Any]:
    """What a process of its own found."""
    script = Path(__file__).with_name("graph_process.py")
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(script.parent), str(script.parents[2])])
    done = subprocess.run(
        [sys.executable, str(script), str(graphs), str(size), str(block_rows)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def entries(graphs: Path) -> list[Path]:
    return sorted(graphs.rglob("compiled_module"))


@torch.inference_mode()
def test_a_hundred_steps_of_growing_lengths_compile_once_and_another_size_once_more(
    tmp_path: Path, right_tokens: list[int]
) -> None:
    from standin import lowering

    rig = Rig(SMALL["qwen3"], torch.float32, graph_cache_dir=tmp_path)
    recorder, step = recorder_of(rig), rig.decode_step()
    with lowering.capture() as lowered:
        for number, size in enumerate((SIZE, 8), start=1):
            inputs = rig.decode_inputs([], size)
            replay = recorder.record(size, step.forward, inputs, [1] * size)
            assert decode(rig, replay, inputs, size, LONG) == right_tokens
            assert len(lowered.graphs) == number


@torch.inference_mode()
def test_weights_and_caches_are_at_addresses_that_the_engine_may_keep(tmp_path: Path) -> None:
    device = torch.device("npu", 0)
    torch.npu.set_device(device)
    rig = Rig(SMALL["qwen3"], torch.bfloat16, graph_cache_dir=tmp_path, device=device)
    recorder_of(rig).record(SIZE, rig.decode_step().forward, rig.decode_inputs([], SIZE), [1] * SIZE)

    (entry,) = entries(tmp_path)
    flags = re.search(rb'"frozenInput"\] = "([01,]+)"', entry.read_bytes())
    assert flags is not None
    weights_of_layer, caches_of_layer, shared = 8, 2, 2
    assert flags[1].count(b"1") == (weights_of_layer + caches_of_layer) * rig.model.num_layers + shared


def test_a_second_process_compiles_nothing(tmp_path: Path, right_tokens: list[int]) -> None:
    first, second = run_process(tmp_path), run_process(tmp_path)

    assert (first["lowered"], second["lowered"]) == (1, 0)
    assert first["tokens"] == second["tokens"] == right_tokens[:STEPS]


def test_another_cache_size_or_number_of_rows_is_compiled_for_itself(tmp_path: Path, right_tokens: list[int]) -> None:
    run_process(tmp_path)

    for changed in (run_process(tmp_path, block_rows=9), run_process(tmp_path, size=8)):
        assert changed["lowered"] == 1
        assert changed["tokens"] == right_tokens[:STEPS]
    assert len(entries(tmp_path)) == 3


@torch.inference_mode()
def test_another_version_of_anything_is_compiled_for_itself(
    tmp_path: Path, right_tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from standin import lowering

    from nanovllm_dist.workers.platform import npu_torchair

    rig = Rig(SMALL["qwen3"], torch.float32, graph_cache_dir=tmp_path)
    inputs = rig.decode_inputs([], SIZE)
    changes: list[tuple[Any, str, Any]] = [
        (npu_torchair, "__version__", "0.0.0"),
        (torch.npu.utils, "get_cann_version", lambda: "9.9.9"),
        (torch.npu, "get_device_name", lambda: "Ascend999"),
    ]
    with lowering.capture() as lowered:
        recorder_of(rig).record(SIZE, rig.decode_step().forward, inputs, [1] * SIZE)
        for number, change in enumerate(changes, start=2):
            monkeypatch.setattr(*change)
            replay = recorder_of(rig).record(SIZE, rig.decode_step().forward, inputs, [1] * SIZE)
            assert len(lowered.graphs) == number
            assert decode(rig, replay, inputs, SIZE, STEPS) == right_tokens[:STEPS]


def test_engines_that_start_at_once_compile_one_after_the_other(tmp_path: Path, right_tokens: list[int]) -> None:
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(run_process, [tmp_path, tmp_path]))

    assert sorted(one["lowered"] for one in found) == [0, 1]
    assert [one["tokens"] for one in found] == [right_tokens[:STEPS]] * 2


@pytest.mark.parametrize("harm", ["truncated", "garbage", "empty"])
def test_a_broken_entry_is_compiled_anew(harm: str, tmp_path: Path, right_tokens: list[int]) -> None:
    run_process(tmp_path)
    (entry,) = entries(tmp_path)
    content = entry.read_bytes()
    entry.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"\x80garbage", "empty": b""}[harm])

    again = run_process(tmp_path)

    assert again == {"lowered": 1, "tokens": right_tokens[:STEPS]}
    assert run_process(tmp_path)["lowered"] == 0
