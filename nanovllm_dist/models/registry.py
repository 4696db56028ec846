"""Architectures by the name that config.json gives them."""

from __future__ import annotations

import torch

from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.layers.decoder import DecoderLM
from nanovllm_dist.models.layers.kernels import LayerKernels
from nanovllm_dist.models.llama import LlamaForCausalLM
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.models.qwen2 import Qwen2ForCausalLM
from nanovllm_dist.models.qwen3 import Qwen3ForCausalLM

MODELS: dict[str, type[DecoderLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def build_model(
    config: ModelConfig, comm: Communicator, kernels: LayerKernels, dtype: torch.dtype, device: torch.device
) -> DecoderLM:
    """One rank's part of the model, its parameters allocated on `device` and not yet filled.

    Raises ConfigError when the group has more ranks than the model can be cut for.
    """
    return MODELS[config.architecture](config, comm, kernels, dtype, device)
