"""Bad words: the token sequences that must not be generated so that a word does not appear.

It knows the tokenizer; the sampler, which knows only ids, bans the last token of a sequence after the others.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

from nanovllm_dist.errors import InvalidSamplingParamsError
from nanovllm_dist.sampling_params import MAX_BAD_WORD_TOKENS
from nanovllm_dist.text.tokenizer import Tokenizer


def bad_words_ids(tokenizer: Tokenizer | None, words: Sequence[str]) -> list[list[int]]:
    """Token sequences of each word, as it begins a text and as it follows a space, without duplicates.

    vLLM bans the second form only where it has as many tokens as the first; here it is always banned.
    Raises InvalidSamplingParamsError for a word without tokens or with too many, or words without a tokenizer.
    """
    if not words:
        return []
    if tokenizer is None:
        raise InvalidSamplingParamsError("bad_words needs a tokenizer: set detokenize=True")
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ")
        forms = [bare, f" {bare}"] if bare else [word]
        for form in forms:
            ids = tokenizer.encode(form, add_special_tokens=False)
            if not ids:
                raise InvalidSamplingParamsError(f"bad_words: {word!r} has no tokens in this model's vocabulary")
            if len(ids) > MAX_BAD_WORD_TOKENS:
                raise InvalidSamplingParamsError(
                    f"bad_words: {reprlib.repr(word)} is {len(ids)} tokens long, and a bad word has at most "
                    f"{MAX_BAD_WORD_TOKENS}: ban a shorter part of it"
                )
            sequences[tuple(ids)] = None
    return [list(ids) for ids in sequences]
