"""A worker process of the torchair mode in small: records a decode, decodes a text, and tells what it took.

    python graph_process.py GRAPHS ROWS BLOCK_ROWS

GRAPHS is where compiled graphs are kept; BLOCK_ROWS rows of blocks make the size of the cache.
"""

from __future__ import annotations

# ruff: noqa: T201
import json
import sys
from typing import Any

import torch
from npu_rig import SMALL, Rig, Sequence

STEPS = 6
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def decode(rig: Rig, replay: Any, inputs: list[torch.Tensor], size: int, steps: int) -> list[int]:
    """Greedy tokens that follow PROMPT."""
    sequence = Sequence(list(PROMPT), 0)
    rig.step([(sequence, len(PROMPT) - 1)])
    for _ in range(steps):
        for kept, new in zip(inputs, rig.decode_inputs([sequence], size), strict=True):
            kept.copy_(new)
        tokens, _logits = replay([sequence.computed + 1] + [1] * (size - 1))
        sequence.computed += 1
        sequence.tokens.append(int(tokens[0]))
    return sequence.tokens[len(PROMPT) :]


def recorder_of(rig: Rig) -> Any:
    """The recorder of torchair graphs for that rig."""
    from nanovllm_dist.workers.platform.npu_torchair import TorchairRecorder

    return TorchairRecorder(rig.config, rig.model_config, rig.layers, rig.comm)  # type: ignore[arg-type]


def main() -> None:
    import torch_npu  # noqa: F401
    from standin import lowering

    graphs, size, block_rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rig = Rig(SMALL["qwen3"], torch.float32, rows=block_rows, graph_cache_dir=graphs)
    inputs = rig.decode_inputs([], size)
    with lowering.capture() as lowered, torch.inference_mode():
        replay = recorder_of(rig).record(size, rig.decode_step().forward, inputs, [1] * size)
        tokens = decode(rig, replay, inputs, size, STEPS)
    print(json.dumps({"lowered": len(lowered.graphs), "tokens": tokens}))


if __name__ == "__main__":
    main()
