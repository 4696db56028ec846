"""Small random checkpoints in fp32, with a tokenizer, and what transformers makes of a text.

Their weights are drawn so that the next token depends on far-away tokens too, and so that nearly all probability is
on more than one token: a wrong key or a wrong row changes what is generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.workers.sampling_random import uniform

VOCAB = 1003  # no multiple of anything: ranks and kernels get uneven parts
# In fp32, sums in another order move logits of about 3 by some 1e-5, and the edges between the tokens' shares of [0, 1)
# by some 1e-6: what is nearer to another token than this has no right answer
NEAR_LOGIT = 2e-4
NEAR_EDGE = 5e-6

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "bos_token_id": None,
}


def _heads(num_heads: int, num_kv_heads: int) -> dict[str, int]:
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}


# Groups of three, one and two query heads; heads of 64, 80 and 128
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_SHAPE, **_heads(9, 3), hidden_size=288, intermediate_size=416, head_dim=64),
    "qwen2": Qwen2Config(**_SHAPE, **_heads(4, 4), hidden_size=320, intermediate_size=480),
    "qwen3": Qwen3Config(
        **_SHAPE, **_heads(4, 2), hidden_size=256, intermediate_size=512, head_dim=128, tie_word_embeddings=True
    ),
}
# With so few tokens near ties are rare enough not to look for them
SMALL_VOCAB = 97
_SMALL = Qwen3Config(
    **(_SHAPE | {"vocab_size": SMALL_VOCAB}), **_heads(6, 2), hidden_size=192, intermediate_size=320, head_dim=96
)


@dataclass(frozen=True)
class Checkpoint:
    """A directory that an engine can serve, and the same model in transformers, on the CPU."""

    directory: Path
    reference: PreTrainedModel

    def text(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], bool]:
        """The `max_tokens` tokens that follow `prompt`, and whether each was far from being another one.

        Greedy, or drawn with the engine's uniforms of (seed, position) from the plain distribution, in float64.
        """
        tokens: list[int] = []
        clear, past, new = True, None, prompt
        with torch.inference_mode():
            for position in range(len(prompt), len(prompt) + params.max_tokens):
                output = self.reference(torch.tensor([new]), past_key_values=past, use_cache=True)
                past = output.past_key_values
                token, is_clear = _choose(output.logits[0, -1].double(), params, position)
                tokens, new, clear = [*tokens, token], [token], clear and is_clear
        return tokens, clear

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Log-probabilities [len(tokens), vocabulary] of what follows each token."""
        with torch.inference_mode():
            return torch.log_softmax(self.reference(torch.tensor([tokens])).logits[0], -1)


def _choose(logits: torch.Tensor, params: SamplingParams, position: int) -> tuple[int, bool]:
    if params.greedy:
        best = logits.topk(2)
        return int(best.indices[0]), bool(best.values[0] - best.values[1] > NEAR_LOGIT)
    edges = torch.softmax(logits / params.temperature, -1).cumsum(0)
    [number] = uniform(np.array([params.seed], dtype=np.uint64), np.array([position]))
    return int((edges <= number).sum()), bool((edges - number).abs().min() > NEAR_EDGE)


def make_small_checkpoint(directory: Path) -> Checkpoint:
    """One of SMALL_VOCAB tokens."""
    return make_checkpoint(_SMALL, directory)


def make_checkpoint(config: Any, directory: Path) -> Checkpoint:
    """A random model of this transformers config: always the same weights, whatever transformers initialises with."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            mean, spread = _distribution(key, parameter, config.tie_word_embeddings)
            parameter.copy_(mean + spread * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    backend = Tokenizer(models.WordLevel({f"w{token}": token for token in range(config.vocab_size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(directory / "tokenizer.json"))
    return Checkpoint(directory, model)


def random_tokens(count: int, seed: int, vocab: int = VOCAB) -> list[int]:
    """`count` token ids, the same on every machine."""
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _distribution(key: str, parameter: torch.Tensor, tied: bool) -> tuple[float, float]:
    """(mean, standard deviation) of a parameter's values."""
    if key.endswith(("q_norm.weight", "k_norm.weight")):
        return 1.6, 0.3
    if key.endswith("norm.weight"):
        return 1.0, 0.2
    if key.endswith("bias"):
        return 0.0, 0.3
    if "embed_tokens" in key:  # a tied one that is not small would repeat the token it has just read
        return 0.0, 0.12 if tied else 1.0
    gain = 1.6 if key.endswith(("q_proj.weight", "k_proj.weight")) else 3.0 if "lm_head" in key else 1.0
    return 0.0, gain * parameter.shape[1] ** -0.5
