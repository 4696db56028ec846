"""Captured decodes on a simulated NPU: every size, changing lengths, two steps under way; equal to eager steps.

The simulated device does not execute what is being captured, waits where a captured event says so, and can hold work
back until somebody waits for it. That lengths have to be updated, and only after the replay before, is shown by leaving
it out.
"""

from __future__ import annotations

# ruff: noqa: T201
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from npu_rig import MAX_LEN, SMALL, Rig, Sequence, random_sequences

from nanovllm_dist.workers.platform.npu_graphs import decode_sizes

pytestmark = pytest.mark.npu
ROWS = 8
SIZES = decode_sizes(ROWS)
LENGTHS = [130, 3, 1, 257, 128, 40, 127, 5]
STEPS = 4


@pytest.fixture(autouse=True)
def first_device() -> Iterator[None]:
    torch.npu.set_device(0)
    yield
    torch.npu.synchronize()


def make_rig(model: str = "qwen3") -> Rig:
    return Rig(SMALL[model], torch.float32, rows=ROWS, device=torch.device("npu", 0))


class Captured:
    """A rig whose decodes are graphs, all of them recorded."""

    def __init__(self, model: str = "qwen3") -> None:
        from nanovllm_dist.workers.platform.npu_aclgraph import AclGraphRecorder

        self.rig = make_rig(model)
        self.recorder = AclGraphRecorder(self.rig.layers)  # type: ignore[arg-type]
        self.step = self.rig.decode_step()
        self.inputs = {size: self.rig.decode_inputs([], size) for size in SIZES}
        with torch.inference_mode():
            self.replays = {
                size: self.recorder.record(size, self.step.forward, self.inputs[size], [1] * size) for size in SIZES
            }

    def launch(self, sequences: list[Sequence], size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, logits) of a step, not waited for; what a graph overwrites is copied in the device's order."""
        for kept, new in zip(self.inputs[size], self.rig.decode_inputs(sequences, size), strict=True):
            kept.copy_(new, non_blocking=True)
        lengths = [sequence.computed + 1 for sequence in sequences]
        tokens, logits = self.replays[size](lengths + [1] * (size - len(sequences)))
        return tokens.clone(), logits.clone()


def prefilled(rig: Rig, count: int, seed: int = 3) -> list[Sequence]:
    """Sequences of which all but the last token is in the cache."""
    sequences = random_sequences(LENGTHS[:count], rig.model_config.vocab_size, seed)
    rows = sorted(((one, len(one.tokens) - 1) for one in sequences if len(one.tokens) > 1), key=lambda row: row[1] > 1)
    rig.step(rows)
    return sequences


def advance(sequences: list[Sequence], tokens: torch.Tensor) -> None:
    for sequence, token in zip(sequences, tokens.tolist(), strict=False):
        sequence.computed += 1
        sequence.tokens.append(token)


@torch.inference_mode()
def eager_tokens(count: int, model: str = "qwen3") -> list[list[int]]:
    """Greedy tokens of each sequence, step by step without graphs."""
    rig = make_rig(model)
    step, sequences = rig.decode_step(), prefilled(rig, count)
    for _ in range(STEPS):
        lengths = [sequence.computed + 1 for sequence in sequences]
        tokens, _logits = step.forward(rig.decode_inputs(sequences, count), lengths)
        advance(sequences, tokens)
    return [sequence.tokens[-STEPS:] for sequence in sequences]


@pytest.mark.parametrize("model", ["qwen3", "llama"])
@torch.inference_mode()
def test_every_size_and_padded_ones_give_the_tokens_of_eager_steps(model: str) -> None:
    captured = Captured(model)
    for count in range(1, ROWS + 1):
        size = next(size for size in SIZES if size >= count)
        sequences = prefilled(captured.rig, count)
        for _ in range(STEPS):
            tokens, _logits = captured.launch(sequences, size)
            advance(sequences, tokens)

        assert [one.tokens[-STEPS:] for one in sequences] == eager_tokens(count, model), f"{count} rows"


@torch.inference_mode()
def two_steps_at_once(captured: Captured) -> list[torch.Tensor]:
    """Logits of a short step and a long one of the same size, launched while nothing is executed yet."""
    from standin import runtime

    sequences = prefilled(captured.rig, 4)
    short = [Sequence(one.tokens, one.row, min(1, one.computed)) for one in sequences]
    torch.npu.synchronize()
    with runtime.held_back():
        first, second = captured.launch(short, 4)[1], captured.launch(sequences, 4)[1]
        return [first.cpu(), second.cpu()]


@torch.inference_mode()
def one_after_the_other() -> list[torch.Tensor]:
    captured = Captured()
    sequences = prefilled(captured.rig, 4)
    short = [Sequence(one.tokens, one.row, min(1, one.computed)) for one in sequences]
    return [captured.launch(rows, 4)[1].cpu() for rows in (short, sequences)]


def test_a_step_that_is_launched_early_does_not_change_the_lengths_of_the_one_before() -> None:
    for found, expected in zip(two_steps_at_once(Captured()), one_after_the_other(), strict=True):
        assert torch.equal(found, expected)


def launch_broken(leave_out: str) -> None:
    """Says what came of it and ends the process, which must be one of its own: its device may wait for ever."""
    import torch_npu  # noqa: F401

    from nanovllm_dist.workers.platform.npu_aclgraph import AttentionTasks

    torch.npu.set_device(0)
    expected, update = one_after_the_other(), AttentionTasks.update
    captured = Captured()
    if leave_out == "waiting":
        type(captured.recorder._update_stream).wait_event = lambda self, event: None
    elif leave_out == "updating":
        AttentionTasks.update = lambda self, lengths, stream: None  # type: ignore[method-assign]
    elif leave_out == "lengths":
        AttentionTasks.update = (  # type: ignore[method-assign]
            lambda self, lengths, stream: update(self, [1] * len(lengths), stream)
        )
    try:
        found = two_steps_at_once(captured)
        print("equal:", all(torch.equal(*pair) for pair in zip(found, expected, strict=True)), flush=True)
    except RuntimeError as error:
        print("stopped:", error, flush=True)
    os._exit(0)


@pytest.mark.parametrize(
    ("leave_out", "outcome"),
    [
        ("nothing", "equal: True"),
        ("lengths", "equal: False"),  # those of the capture are not those of the step
        ("updating", "stopped: "),  # a replay waits for what never comes
        ("waiting", "(equal: False|stopped: )"),  # the update of the next step comes while this one waits for its own
    ],
)
def test_a_replay_needs_its_own_lengths_after_the_replay_before(leave_out: str, outcome: str) -> None:
    script = f"import test_aclgraph; test_aclgraph.launch_broken({leave_out!r})"
    here = Path(__file__).parent
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(here), str(here.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
    print(leave_out, "->", done.stdout[:200])
    assert re.search(f"^{outcome}", done.stdout, re.MULTILINE), done.stdout + done.stderr[-2000:]


def test_the_sizes_are_few_and_hold_every_number_of_rows() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(8) == [1, 2, 4, 8]
    assert decode_sizes(100) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert max(LENGTHS) + STEPS < MAX_LEN
