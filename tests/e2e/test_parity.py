"""Greedy output equals transformers, token for token, on a real model in fp32, at any tensor-parallel degree."""

from __future__ import annotations

from pathlib import Path

import pytest
from prompts import PROMPTS

from nanovllm_dist import LLM, SamplingParams

TOKENS = 64


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> list[list[int]]:
    """What transformers generates."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    outputs = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        generated = model.generate(
            **ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        outputs.append(generated[0, ids["input_ids"].shape[1] :].tolist())
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel_size", [1, 2, 3])
def test_greedy_tokens_equal_transformers(smollm2: Path, reference: list[list[int]], tensor_parallel_size: int) -> None:
    # min_new_tokens of transformers masks every EOS, as min_tokens does here
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, min_tokens=TOKENS)
    with LLM(
        str(smollm2), tensor_parallel_size=tensor_parallel_size, dtype="float32", launcher="local", progress=False
    ) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, output, expected in zip(PROMPTS, outputs, reference, strict=True):
        assert output.token_ids == expected, prompt
