"""An engine with weights rounded to int8 on the CPU answers as the model does."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm_dist import LLM, SamplingParams
from nanovllm_dist.errors import ConfigError


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_smollm2_still_knows_capitals(smollm2: Path, tensor_parallel_size: int) -> None:
    with LLM(
        str(smollm2),
        device="cpu",
        dtype="bfloat16",
        weight_format="int8",
        tensor_parallel_size=tensor_parallel_size,
        launcher="local",
        progress=False,
    ) as llm:
        prompts = ["The capital of France is", "The capital of Japan is"] * 9  # enough for the way of many rows
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    for output, answer in zip(outputs, ["Paris", "Tokyo"] * 9, strict=True):
        assert answer in output.text


def test_float32_is_refused_before_anything_starts(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="weight_format=int8 is for dtype=bfloat16"):
        LLM(str(tiny_model), device="cpu", dtype="float32", weight_format="int8", load_format="dummy")
