"""Text that comes token by token is the text of all tokens, and never shows part of a character."""

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from small_tokenizers import BACKENDS

from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.text.detokenizer import IncrementalDetokenizer, detokenize
from nanovllm_dist.text.tokenizer import Tokenizer

TEXTS = ["the quick fox", "नमस्ते दुनिया", "日本語, 日日", "👩‍👩‍👧‍👦🏳️‍🌈", " a  the\n\tend ", "naïve café"]
IDS = st.lists(st.integers(0, 350), max_size=60)  # some above every vocabulary here
SHARED_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)


def deltas(tokenizer, ids, prompt=(), **params):
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(**params), prompt)
    return [*(detokenizer.feed([token]) for token in ids), detokenizer.flush()]


def decode_without_spaces(tokenizer, ids, skip):
    """The full decode without what the decoder puts between neighbouring added tokens."""
    kept = [i for i in ids if not (skip and i in tokenizer.special_ids) and tokenizer.token(i) is not None]
    cuts = [at for at in range(1, len(kept)) if tokenizer.is_added(kept[at - 1]) and tokenizer.is_added(kept[at])]
    return "".join(tokenizer.decode(kept[start:end], False) for start, end in pairwise([0, *cuts, len(kept)]))


@SHARED_FIXTURE
@given(ids=IDS, skip=st.booleans(), spaces=st.booleans())
def test_deltas_of_any_ids_make_the_full_decode(tokenizer, ids, skip, spaces):
    pieces = deltas(tokenizer, ids, skip_special_tokens=skip, spaces_between_special_tokens=spaces)

    expected = tokenizer.decode(ids, skip) if spaces else decode_without_spaces(tokenizer, ids, skip)
    assert "".join(pieces) == expected


@SHARED_FIXTURE
@given(prompt=IDS, ids=IDS, skip=st.booleans())
def test_after_a_prompt_deltas_make_what_the_output_adds_to_its_text(tokenizer, prompt, ids, skip):
    before = tokenizer.decode(prompt, skip)
    assume(not before.endswith("\ufffd"))

    pieces = deltas(tokenizer, ids, prompt, skip_special_tokens=skip)

    assert "".join(pieces) == tokenizer.decode([*prompt, *ids], skip)[len(before) :]


@SHARED_FIXTURE
@given(ids=st.lists(st.integers(3, 258), max_size=40), prompt=st.lists(st.integers(3, 258), max_size=8))
def test_random_byte_fallback_runs_make_the_full_decode(byte_fallback, ids, prompt):
    assume(not byte_fallback.decode(prompt).endswith("\ufffd"))

    pieces = deltas(byte_fallback, ids, prompt)

    assert "".join(pieces) == byte_fallback.decode([*prompt, *ids])[len(byte_fallback.decode(prompt)) :]


@SHARED_FIXTURE
@given(ids=IDS, cuts=st.lists(st.integers(1, 7), min_size=1))
def test_how_many_tokens_come_at_once_does_not_matter(tokenizer, ids, cuts):
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams())
    text, at = "", 0
    while at < len(ids):
        size = cuts[at % len(cuts)]
        text += detokenizer.feed(ids[at : at + size])
        at += size

    assert text + detokenizer.flush() == detokenize(tokenizer, ids, SamplingParams())


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_no_delta_holds_part_of_a_character(kind, text, request):
    tokenizer: Tokenizer = request.getfixturevalue(kind)

    pieces = deltas(tokenizer, tokenizer.encode(text))

    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_four_tokens_comes_with_its_last_one(byte_level):
    ids = [byte_level.encode("a")[0], *single_bytes(byte_level, "😀")]

    assert deltas(byte_level, ids) == ["a", "", "", "", "😀", ""]


def test_a_byte_fallback_run_comes_when_it_ends(byte_fallback):
    ids = [*(3 + byte for byte in "é".encode()), byte_fallback.encode("a")[0]]

    assert deltas(byte_fallback, ids) == ["", "", "é a", ""]


def test_an_incomplete_character_becomes_a_replacement_at_the_end(byte_level):
    assert deltas(byte_level, single_bytes(byte_level, "😀")[:2]) == ["", "", "\ufffd"]


def test_a_replacement_character_in_the_vocabulary_is_shown_at_once(byte_fallback):
    assert deltas(byte_fallback, byte_fallback.encode("\ufffd")[1:]) == ["\ufffd", ""]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_that_the_prompt_left_incomplete_belongs_to_the_output(kind, request):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    first, *rest = single_bytes(tokenizer, "日") if kind == "byte_level" else [3 + byte for byte in "語".encode()]
    prompt = [*tokenizer.encode("the"), first]

    assert "".join(deltas(tokenizer, rest, prompt)) == ("日" if kind == "byte_level" else "語")


def test_the_space_after_a_prompt_stays_and_the_one_that_starts_a_text_does_not(byte_fallback):
    word = byte_fallback.encode("the")

    assert "".join(deltas(byte_fallback, word, prompt=word)) == " the"
    assert "".join(deltas(byte_fallback, word)) == "the"


def test_special_tokens_are_left_out_unless_asked_for(byte_level):
    ids = [*byte_level.encode("a"), 1]

    assert "".join(deltas(byte_level, ids)) == "a"
    assert "".join(deltas(byte_level, ids, skip_special_tokens=False)) == "a<|end|>"


@pytest.mark.parametrize(("spaces", "text"), [(True, "the <s> </s> quick"), (False, "the <s></s> quick")])
def test_spaces_between_added_tokens_can_be_dropped(spaces, text):
    options = {"skip_special_tokens": False, "spaces_between_special_tokens": spaces}

    assert "".join(deltas(Tokenizer(BACKENDS["word"]), [2, 0, 1, 3], **options)) == text


def test_ids_without_a_token_give_no_text(tokenizer):
    assert "".join(deltas(tokenizer, [2**31 - 1, -1, tokenizer._backend.get_vocab_size()])) == ""


class Counting(Tokenizer):
    """Counts the ids that it decodes."""

    decoded = 0

    def decode(self, ids, *args, **kwargs):
        self.decoded += len(ids)
        return super().decode(ids, *args, **kwargs)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", ["the quick fox " * 200, "é" * 1000, "\x00" * 2000])
def test_work_grows_with_the_number_of_tokens_not_with_its_square(kind, text, request):
    counting = Counting(request.getfixturevalue(kind)._backend)
    ids = counting.encode(text)

    assert "".join(deltas(counting, ids)) == text
    assert counting.decoded <= 6 * len(ids)


def single_bytes(tokenizer, text):
    """Ids of the tokens that stand for single bytes of `text`."""
    of_byte = {tokenizer.token_bytes(token): token for token in range(tokenizer._backend.get_vocab_size())}
    return [of_byte[bytes([byte])] for byte in text.encode()]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 49200), max_size=60), skip=st.booleans())
def test_deltas_of_random_smollm2_ids_make_the_full_decode(smollm2, ids, skip):
    assert "".join(deltas(smollm2, ids, skip_special_tokens=skip)) == smollm2.decode(ids, skip)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_deltas_hold_no_part_of_a_character(smollm2, text):
    pieces = deltas(smollm2, smollm2.encode(text), smollm2.encode("the"))

    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
