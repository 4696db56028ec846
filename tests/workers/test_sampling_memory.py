"""What sampling parameters take on the device is not measured before the cache takes the rest: so it has a bound."""

from __future__ import annotations

import pytest
from torch import Tensor

from nanovllm_dist.errors import InvalidSamplingParamsError
from nanovllm_dist.sampling_params import MAX_LIST, SamplingParams
from nanovllm_dist.workers.sampling_table import BannedSequences, SamplingTable

VOCAB = 151_936


def bytes_kept(table: SamplingTable, slot: int) -> int:
    """Bytes of all tensors of a slot's edits."""
    edits = table.edits[slot]
    assert edits is not None
    fields = [getattr(edits, name) for name in edits.__dataclass_fields__]
    for banned in [field for field in fields if isinstance(field, BannedSequences)]:
        fields += [banned.last, banned.prefixes]
    return sum(field.untyped_storage().nbytes() for field in fields if isinstance(field, Tensor))


@pytest.mark.parametrize("lengths", [(16,) * 8192, (128,) * 1024], ids=max)
def test_the_most_that_a_request_may_ask_for_keeps_less_than_a_megabyte(lengths: tuple[int, ...]) -> None:
    table = SamplingTable(1, VOCAB, eos_token_ids=[7], device="cpu")
    params = SamplingParams(
        allowed_token_ids=list(range(VOCAB)),
        logit_bias=dict.fromkeys(range(MAX_LIST), 1.0),
        stop_token_ids=list(range(MAX_LIST)),
        min_tokens=8,
    )

    table.set(0, params, seed=0, prompt_len=1, bad_words=[range(length) for length in lengths])

    assert 500_000 < bytes_kept(table, 0) < 1_000_000


def test_a_longer_bias_than_the_lists_of_other_options_is_refused() -> None:
    with pytest.raises(InvalidSamplingParamsError, match="logit_bias has 4097 entries: at most 4096 are taken"):
        SamplingParams(logit_bias=dict.fromkeys(range(MAX_LIST + 1), 1.0))
