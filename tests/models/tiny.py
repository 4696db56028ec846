"""Tiny random Hugging Face models: the reference that ours is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

VOCAB = 101

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_HEADS_9_3 = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_SHAPE),
    "llama_tied": LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "llama_biases": LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True),
    "llama_head_dim": LlamaConfig(**_SHAPE, head_dim=24),
    "llama_9_3": LlamaConfig(**{**_SHAPE, **_HEADS_9_3}, tie_word_embeddings=True),
    "llama_one_kv_head": LlamaConfig(**{**_SHAPE, "num_key_value_heads": 1}),
    "llama_linear": LlamaConfig(
        **_SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "llama_llama3": LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3),
    "llama_yarn": LlamaConfig(**_SHAPE, rope_parameters=_YARN),
    "llama_yarn_untruncated": LlamaConfig(**_SHAPE, rope_parameters=dict(_YARN, truncate=False, beta_fast=16)),
    "llama_yarn_mscale": LlamaConfig(**_SHAPE, rope_parameters=dict(_YARN, mscale=0.7, mscale_all_dim=1.3)),
    "llama_yarn_factor": LlamaConfig(**_SHAPE, rope_parameters=dict(_YARN, attention_factor=0.9)),
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen2_tied": Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=32),
    "qwen3_biased_tied": Qwen3Config(**_SHAPE, head_dim=16, attention_bias=True, tie_word_embeddings=True),
}


def make_reference(name: str, directory: Path, max_shard_size: str = "5GB") -> PreTrainedModel:
    """The random fp32 model of `CONFIGS[name]`, saved in `directory` as well."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initialisers leave norms at 1 and biases at 0, which hides mistakes
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def reference_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Logits [len(tokens), vocab] of every position, from transformers."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def random_tokens(count: int, seed: int = 1) -> list[int]:
    """`count` token ids of the tiny vocabulary."""
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
