"""Logits and greedy tokens equal those of transformers, per model, RoPE kind and tensor-parallel degree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import PagedModel, Sequence, run_ranks
from tiny import CONFIGS, make_reference, random_tokens, reference_logits

from nanovllm_dist.models.parallel import Communicator, SingleRank

TOKENS = random_tokens(41)
UNEVEN = [("llama_9_3", 2), ("llama_9_3", 3), ("llama_9_3", 5), ("llama_one_kv_head", 3), ("qwen3_biased_tied", 3)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def assert_parity(name: str, world_size: int, directory: Path) -> None:
    expected = reference_logits(make_reference(name, directory), TOKENS)

    def work(comm: Communicator) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return PagedModel(directory, comm).logits(TOKENS), PagedModel(directory, comm).logits(TOKENS, chunk=7)

    (whole, chunked), *others = run_ranks(world_size, work)
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(chunked, expected, atol=1e-4, rtol=0)
    assert others == [(None, None)] * (world_size - 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_on_one_rank(name: str, tmp_path: Path) -> None:
    assert_parity(name, 1, tmp_path)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", ["llama", "llama_biases", "qwen2", "qwen2_tied", "qwen3", "qwen3_biased_tied"])
def test_logits_equal_transformers_on_several_ranks(name: str, world_size: int, tmp_path: Path) -> None:
    assert_parity(name, world_size, tmp_path)


@pytest.mark.parametrize(("name", "world_size"), UNEVEN)
def test_logits_equal_transformers_when_heads_do_not_divide(name: str, world_size: int, tmp_path: Path) -> None:
    assert_parity(name, world_size, tmp_path)


@pytest.mark.parametrize(("name", "world_size"), [("llama_9_3", 1), ("llama_9_3", 2), ("qwen2", 1), ("qwen3", 2)])
def test_greedy_tokens_of_mixed_steps_equal_generate(name: str, world_size: int, tmp_path: Path) -> None:
    """Prompts of several lengths enter while others decode; one of them in chunks."""
    reference = make_reference(name, tmp_path)
    prompts = [random_tokens(length, seed=length) for length in (3, 8, 17, 30)]
    expected = [
        reference.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0].tolist() for prompt in prompts
    ]

    outputs = run_ranks(world_size, lambda comm: greedy_mixed(PagedModel(tmp_path, comm), prompts, expected))

    assert outputs[0] == expected


def greedy_mixed(model: PagedModel, prompts: list[list[int]], expected: list[list[int]]) -> list[list[int]]:
    """Every second step a prompt enters, at most 7 tokens at a time; steps are padded by 0 to 2 tokens.

    Ranks other than 0 see no logits: as workers would be, they are told the tokens (here the expected ones).
    """
    sequences = [Sequence(list(prompt)) for prompt in prompts]
    wanted = {id(sequence): tokens for sequence, tokens in zip(sequences, expected, strict=True)}
    for step in range(30):
        running = [s for s in sequences[: 1 + step // 2] if len(s.tokens) < len(wanted[id(s)])]
        rows = sorted(((s, min(7, len(s.tokens) - s.computed)) for s in running), key=lambda row: row[1] > 1)
        if not rows:
            break
        outputs = model.step(rows, padding=step % 3)
        for index, (sequence, _) in enumerate(rows):
            if sequence.computed == len(sequence.tokens):
                known = wanted[id(sequence)][len(sequence.tokens)]
                sequence.tokens.append(known if outputs is None else int(outputs[index][-1].argmax()))
    return [sequence.tokens for sequence in sequences]


def test_a_row_computes_the_same_alone_and_beside_others(tmp_path: Path) -> None:
    """Rows of a mixed step are independent: one-token rows of many lengths, chunks with and without a prefix."""
    make_reference("llama", tmp_path)
    prompts = [random_tokens(length, seed=length) for length in (2, 5, 9, 14, 23, 31)]
    alone = [PagedModel(tmp_path, SingleRank()).logits(prompt) for prompt in prompts]
    model = PagedModel(tmp_path, SingleRank())
    sequences = [Sequence(prompt) for prompt in prompts]
    for sequence, left in zip(sequences, (1, 1, 1, 14, 6, 11), strict=True):
        if left < len(sequence.tokens):
            model.step([(sequence, len(sequence.tokens) - left)])

    outputs = model.step([(s, len(s.tokens) - s.computed) for s in sequences])

    assert outputs is not None
    for got, want in zip(outputs, alone, strict=True):
        torch.testing.assert_close(got, want[-len(got) :], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama_9_3", "qwen3"])
def test_bfloat16_stays_close_to_the_fp32_reference(name: str, tmp_path: Path) -> None:
    expected = reference_logits(make_reference(name, tmp_path), TOKENS)
    outputs = run_ranks(2, lambda comm: PagedModel(tmp_path, comm, dtype=torch.bfloat16).logits(TOKENS, chunk=20))
    assert outputs[0] is not None
    assert outputs[0].dtype == torch.float32
    torch.testing.assert_close(outputs[0], expected, atol=0.12, rtol=0)


def test_repacked_weights_give_the_logits_of_plain_ones(tmp_path: Path) -> None:
    make_reference("llama_biases", tmp_path)
    plain, packed = (
        run_ranks(1, lambda comm, finalize=finalize: PagedModel(tmp_path, comm, finalize=finalize).logits(TOKENS))[0]
        for finalize in (False, True)
    )
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=0)
