"""Llama, and what shares its architecture (SmolLM2, ...)."""

from __future__ import annotations

from nanovllm_dist.models.layers.decoder import DecoderLM


class LlamaForCausalLM(DecoderLM):
    """The plain decoder; biases as `attention_bias` and `mlp_bias` say."""
