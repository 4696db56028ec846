"""Greedy output equals transformers, token for token, on a real model in fp32, at any tensor-parallel degree.

One forward of transformers over prompt and output shows what its greedy search would have chosen at every
position: if each choice is the token that stands there, the two searches are equal by induction.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from prompts import PROMPTS
from transformers import AutoModelForCausalLM

from nanovllm_dist import LLM, SamplingParams

TOKENS = 64


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> AutoModelForCausalLM:
    """The same weights in transformers."""
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel_size", [1, 2, 3])
def test_greedy_tokens_equal_transformers(
    smollm2: Path, reference: AutoModelForCausalLM, tensor_parallel_size: int
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    with LLM(
        str(smollm2), tensor_parallel_size=tensor_parallel_size, dtype="float32", launcher="local", progress=False
    ) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for output in outputs:
        assert len(output.token_ids) == TOKENS
        sequence = torch.tensor([output.prompt_token_ids + output.token_ids])
        with torch.inference_mode():
            choices = reference(sequence).logits[0].argmax(-1)
        start = len(output.prompt_token_ids) - 1
        assert output.token_ids == choices[start:-1].tolist(), output.prompt
