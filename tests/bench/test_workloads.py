"""Workloads: fixed lengths, fresh tokens, no influence from outside."""

from __future__ import annotations

import json
import random
import zlib

import pytest

from nanovllm_dist.bench.workloads import make_workload, workload_names
from nanovllm_dist.errors import ConfigError

# name -> requests, prompt tokens, output tokens, first prompt lengths, first output lengths
KNOWN = {
    "upstream_seed0": (256, 142_827, 133_966, (964, 724, 484, 508, 316), (845, 312, 607, 843, 500)),
    "upstream_seed1": (256, 149_935, 156_222, (237, 616, 719, 361, 115), (419, 255, 100, 243, 446)),
    "upstream_seed2": (256, 147_434, 140_460, (983, 973, 637, 984, 488), (526, 184, 967, 997, 569)),
    "ascend_143770": (256, 141_919, 143_770, (407, 1011, 977, 110, 471), (768, 729, 273, 250, 340)),
    "c1": (64, 9_768, 9_790, (248, 111, 192, 97, 37), (244, 253, 232, 112, 86)),
    "c2": (1, 128, 128, (128,), (128,)),
    "single": (1, 128, 512, (128,), (512,)),
}
# name -> CRC-32 of [prompt lengths, output lengths] as compact JSON, over all 256 requests of the published draws
CHECKSUMS = {
    "upstream_seed0": 2377964446,
    "upstream_seed1": 3415232516,
    "upstream_seed2": 2232005791,
    "ascend_143770": 727885046,
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_named_workload_has_the_published_sums_and_lengths(name: str) -> None:
    requests, prompt_tokens, output_tokens, first_prompts, first_outputs = KNOWN[name]
    workload = make_workload(name)
    assert (workload.num_requests, workload.prompt_tokens, workload.output_tokens) == (
        requests,
        prompt_tokens,
        output_tokens,
    )
    assert workload.prompt_lens[: len(first_prompts)] == first_prompts
    assert workload.output_lens[: len(first_outputs)] == first_outputs
    assert len(workload.output_lens) == requests


@pytest.mark.parametrize("name", CHECKSUMS)
def test_every_length_of_a_published_workload_is_as_published(name: str) -> None:
    workload = make_workload(name)
    lengths = json.dumps([workload.prompt_lens, workload.output_lens], separators=(",", ":"))
    assert zlib.crc32(lengths.encode()) == CHECKSUMS[name]


@pytest.mark.parametrize("name", ["c1", "upstream_seed0", "random"])
def test_the_same_repetition_has_the_same_prompts_and_every_other_has_none_of_them(name: str) -> None:
    workload = make_workload(name)
    first, again = workload.prompts("run 1", 49152), workload.prompts("run 1", 49152)
    other = workload.prompts("run 2", 49152)
    assert first == again
    # nothing for a prefix cache: not even the first tokens of any two prompts agree
    assert len({tuple(prompt[:8]) for prompt in [*first, *other]}) == 2 * workload.num_requests


def test_two_workloads_share_no_prompt() -> None:
    first = make_workload("upstream_seed0").prompts("run 1", 49152)
    second = make_workload("upstream_seed1").prompts("run 1", 49152)
    assert {tuple(prompt[:8]) for prompt in first}.isdisjoint(tuple(prompt[:8]) for prompt in second)


def test_prompts_are_as_long_as_stated() -> None:
    workload = make_workload("c1")
    assert tuple(map(len, workload.prompts("run 1", 100))) == workload.prompt_lens


def test_the_callers_random_state_neither_changes_a_workload_nor_is_changed() -> None:
    random.seed(1)
    before = random.getstate()
    first = make_workload("ascend_143770"), make_workload("c1").prompts("run 1", 1000)
    assert random.getstate() == before
    random.seed(2)
    assert (make_workload("ascend_143770"), make_workload("c1").prompts("run 1", 1000)) == first


def test_token_ids_cover_the_vocabulary_and_stay_inside() -> None:
    ids = {token for prompt in make_workload("c1").prompts("run 1", 50) for token in prompt}
    assert ids == set(range(50))


def test_upstream_ids_end_at_10000_or_with_a_smaller_vocabulary() -> None:
    workload = make_workload("upstream_seed0")
    large = {token for prompt in workload.prompts("run 1", 151936) for token in prompt}
    assert max(large) == 10000
    assert min(large) == 0
    assert max(token for prompt in workload.prompts("run 1", 300) for token in prompt) == 299


def test_random_without_a_ratio_has_exact_lengths() -> None:
    workload = make_workload("random", num_requests=3, input_len=5, output_len=7)
    assert (workload.prompt_lens, workload.output_lens) == ((5, 5, 5), (7, 7, 7))


def test_random_with_a_ratio_fills_the_range_around_the_length() -> None:
    workload = make_workload("random", num_requests=1000, input_len=100, output_len=10, range_ratio=0.33)
    assert (min(workload.prompt_lens), max(workload.prompt_lens)) == (67, 133)
    assert (min(workload.output_lens), max(workload.output_lens)) == (7, 13)


def test_random_never_draws_an_empty_prompt() -> None:
    workload = make_workload("random", num_requests=200, input_len=1, output_len=1, range_ratio=0.9)
    assert min(workload.prompt_lens) >= 1
    assert min(workload.output_lens) >= 1


def test_a_shortened_workload_keeps_prompts_and_caps_answers() -> None:
    workload = make_workload("c1")
    short = workload.shortened(40)
    assert short.prompt_lens == workload.prompt_lens
    assert max(short.output_lens) == 40
    assert min(short.output_lens) == min(workload.output_lens)


def test_a_shortened_workload_may_have_fewer_requests() -> None:
    workload = make_workload("c1")
    short = workload.shortened(1000, 5)
    assert (short.prompt_lens, short.output_lens) == (workload.prompt_lens[:5], workload.output_lens[:5])
    assert short.prompts("run 1", 300) == workload.prompts("run 1", 300)[:5]


def test_the_longest_request_counts_prompt_and_answer_together() -> None:
    assert make_workload("c2").longest == 256


def test_an_unknown_name_lists_the_known_ones_and_the_closest() -> None:
    with pytest.raises(ConfigError) as error:
        make_workload("upstream_sed0")
    assert all(name in str(error.value) for name in workload_names())
    assert "did you mean 'upstream_seed0'" in str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "flag"),
    [
        ("num_requests", 0, "--num-requests"),
        ("input_len", 0, "--input-len"),
        ("output_len", -1, "--output-len"),
        ("range_ratio", 1.0, "--range-ratio"),
        ("range_ratio", -0.1, "--range-ratio"),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_flag(option: str, value: float, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        make_workload("random", **{option: value})  # type: ignore[arg-type]
