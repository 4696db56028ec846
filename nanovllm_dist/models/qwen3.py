"""Qwen3 (dense)."""

from __future__ import annotations

from nanovllm_dist.models.layers.decoder import DecoderLM


class Qwen3ForCausalLM(DecoderLM):
    """The plain decoder with a norm on each query and key head before the rotation."""

    qk_norm = True
