"""A bad word is banned as it begins a text and as it follows a space."""

import pytest

from nanovllm_dist.errors import InvalidSamplingParamsError
from nanovllm_dist.text.bad_words import bad_words_ids


def test_both_forms_of_a_word_are_banned(byte_level):
    forms = [byte_level.decode(ids) for ids in bad_words_ids(byte_level, ["quick"])]

    assert forms == ["quick", " quick"]


def test_a_leading_space_in_the_word_makes_no_difference(byte_level):
    assert bad_words_ids(byte_level, [" quick"]) == bad_words_ids(byte_level, ["quick"])


def test_a_word_given_twice_is_banned_once(byte_level):
    assert bad_words_ids(byte_level, ["fox", " fox", "fox"]) == bad_words_ids(byte_level, ["fox"])


def test_special_tokens_are_not_added_to_a_word(byte_fallback):
    assert all(not byte_fallback.special_ids.intersection(ids) for ids in bad_words_ids(byte_fallback, ["the"]))


def test_white_space_itself_can_be_banned(byte_level):
    assert [byte_level.decode(ids) for ids in bad_words_ids(byte_level, ["\n"])] == ["\n", " \n"]
    assert [byte_level.decode(ids) for ids in bad_words_ids(byte_level, [" "])] == [" "]


def test_no_words_need_no_tokenizer():
    assert bad_words_ids(None, []) == []


def test_words_without_a_tokenizer_are_refused():
    with pytest.raises(InvalidSamplingParamsError, match="needs a tokenizer"):
        bad_words_ids(None, ["fox"])


def test_a_word_that_no_token_can_spell_is_refused(byte_level):
    with pytest.raises(InvalidSamplingParamsError, match="no tokens"):
        bad_words_ids(byte_level, [""])


def test_a_word_of_too_many_tokens_is_named_with_the_limit(byte_level):
    with pytest.raises(InvalidSamplingParamsError, match=r"'zqzq.*' is \d+ tokens long, .* at most 128"):
        bad_words_ids(byte_level, ["fox", "zq" * 1000])


@pytest.mark.slow
def test_smollm2_words_are_banned_as_their_single_tokens(smollm2):
    assert bad_words_ids(smollm2, ["Paris"])[-1] == smollm2.encode(" Paris")
    assert len(bad_words_ids(smollm2, ["Paris"])[-1]) == 1
