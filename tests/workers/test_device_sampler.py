"""Where a device has a sampler of its own, rows that want more than a plain draw are sampled again, and only they."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.launcher.resolve import resolve_config
from nanovllm_dist.models.layers.embedding import LMHead
from nanovllm_dist.models.parallel import Communicator, SingleRank
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire.messages import NewRow, Step, pack_ints, unpack_ints
from nanovllm_dist.workers.model_runner import ModelRunner
from nanovllm_dist.workers.platform.cpu import CpuPlatform

MARK = 7  # what the stand-in answers for every row


class MarkingSampler:
    """A device sampler whose tokens tell that they are its own."""

    uniform_dtype = np.float64

    def sample(self, logits: torch.Tensor, inv_temperature: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        return torch.full((len(logits),), MARK)

    def append(self, table: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("there are no graphs here")


class MarkingPlatform(CpuPlatform):
    """The CPU with such a sampler."""

    def device_sampler(self, comm: Communicator, head: LMHead) -> MarkingSampler:
        return MarkingSampler()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    directory = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def sampled(model: Path, platform: CpuPlatform, params: list[SamplingParams]) -> list[int]:
    """The first token of rows of the same prompt with these parameters, in one step."""
    config, model_config = resolve_config(
        EngineConfig(model=str(model), device="cpu", max_num_seqs=64, max_model_len=32), progress=False
    )
    runner = ModelRunner(config, model_config, platform, SingleRank(), torch.device("cpu"))
    runner.load(lambda done, total: None)
    runner.allocate(1 + len(params))
    prompt = pack_ints([3, 1, 4, 1, 5])
    rows = [NewRow(slot, prompt, 5, 0, 0, pack_ints([1 + slot]), slot, one, []) for slot, one in enumerate(params)]
    running = runner.start(Step(0, 0, pack_ints(range(len(params))), pack_ints([5] * len(params)), b"", b"", rows))
    assert running is not None
    return unpack_ints(running.result().tokens)


def test_only_special_rows_are_taken_from_the_devices_sampler(model: Path) -> None:
    plain = SamplingParams(temperature=1.0)
    special = [
        SamplingParams(temperature=0.5, top_k=5),
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(temperature=1.0, repetition_penalty=1.5),
        SamplingParams(temperature=1.0, min_p=0.2),
        SamplingParams(temperature=0.0, min_tokens=3),
        SamplingParams(temperature=0.0, logit_bias={11: 100.0}),
    ]
    params = [one for pair in zip([plain] * len(special), special, strict=True) for one in pair]

    tokens = sampled(model, MarkingPlatform(), params)

    expected = sampled(model, CpuPlatform(), params)
    assert tokens[0::2] == [MARK] * len(special)
    assert tokens[1::2] == expected[1::2]
    assert tokens[11] == 11


def test_more_special_rows_than_are_sampled_at_a_time(model: Path) -> None:
    params = [SamplingParams(temperature=1.0, top_k=20)] * 50

    tokens = sampled(model, MarkingPlatform(), params)

    assert tokens == sampled(model, CpuPlatform(), params)
    assert len(np.unique(tokens)) > 5
