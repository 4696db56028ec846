"""Qwen2 and Qwen2.5 (dense)."""

from __future__ import annotations

from nanovllm_dist.models.layers.decoder import DecoderLM


class Qwen2ForCausalLM(DecoderLM):
    """The plain decoder; its config always has biases on queries, keys and values, and none on the output."""
