"""Architectures by the name that config.json gives them."""

from __future__ import annotations

import torch

from nanovllm_dist.errors import UnsupportedModelError
from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.layers.decoder import DecoderLM
from nanovllm_dist.models.layers.kernels import LayerKernels
from nanovllm_dist.models.llama import LlamaForCausalLM
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.models.qwen2 import Qwen2ForCausalLM
from nanovllm_dist.models.qwen3 import Qwen3ForCausalLM

_MODELS: dict[str, type[DecoderLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def model_class(architecture: str) -> type[DecoderLM]:
    """The class of that name. Raises UnsupportedModelError, which lists those there are."""
    if architecture not in _MODELS:
        raise UnsupportedModelError(f"{architecture} is not supported; supported are {', '.join(_MODELS)}")
    return _MODELS[architecture]


def build_model(
    config: ModelConfig, comm: Communicator, kernels: LayerKernels, dtype: torch.dtype, device: torch.device
) -> DecoderLM:
    """One rank's part of the model, its parameters allocated on `device` and not yet filled.

    Raises:
        UnsupportedModelError: the architecture is not known.
        ConfigError: the group has more ranks than the model can be cut for.
    """
    return model_class(config.architecture)(config, comm, kernels, dtype, device)
