"""The rival does exactly the work it is given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm_dist.bench.json_process import JsonProcess
from nanovllm_dist.bench.transformers_baseline import TransformersBaseline
from nanovllm_dist.bench.transformers_worker import Generator
from nanovllm_dist.bench.workloads import Workload
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError, NanoVLLMError


def tiny_config(model: Path) -> EngineConfig:
    return EngineConfig(model=str(model), load_format="dummy", device="cpu", dtype="float32", max_model_len=256)


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Iterator[Generator]:
    import torch

    threads = torch.get_num_threads()
    yield Generator(tiny_config(tiny_model))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_every_row_of_a_batch_has_as_many_tokens_as_its_longest_answer(
    generator: Generator, temperature: float
) -> None:
    answers = generator._generate([[5, 6, 7], [8], [9, 10]], 12, temperature)
    assert [len(answer) for answer in answers] == [12, 12, 12]


def test_padding_does_not_change_a_greedy_answer(generator: Generator) -> None:
    alone = generator._generate([[8, 9]], 10, 0.0)[0]
    padded = generator._generate([[8, 9], list(range(40, 60))], 10, 0.0)[0]
    assert padded == alone


@pytest.mark.slow
def test_the_process_runs_a_workload_and_leaves(tiny_model: Path) -> None:
    workload = Workload("three", (3, 9, 5), (4, 2, 6))
    with TransformersBaseline(tiny_config(tiny_model)) as rival:
        seconds = [rival.run(workload, workload.prompts(f"run {n}", 300), 0.6) for n in range(2)]
    assert all(0.0 < value < 60.0 for value in seconds)


@pytest.mark.slow
def test_a_model_it_cannot_load_is_a_readable_error(tiny_model: Path) -> None:
    config = tiny_config(tiny_model).replace(load_format="safetensors")
    with pytest.raises(NanoVLLMError, match="transformers: OSError"):
        TransformersBaseline(config)


def test_a_helper_that_ends_without_a_word_is_reported_with_its_log() -> None:
    with (
        JsonProcess("the helper", "no_such_module_of_any_kind", dict(os.environ)) as process,
        pytest.raises(NanoVLLMError, match=r"(?s)the helper ended.*no_such_module_of_any_kind"),
    ):
        process.receive()


def test_a_helpers_typed_error_arrives_with_its_type() -> None:
    with JsonProcess("the helper", "nanovllm_dist.bench.transformers_worker", dict(os.environ)) as process:
        process.send({"model": "x", "unknown": 1})
        with pytest.raises(ConfigError, match=r"the helper: .*unknown"):
            process.receive()
