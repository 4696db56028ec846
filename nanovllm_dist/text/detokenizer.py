"""IncrementalDetokenizer: the text of a request as its tokens come, never with half a character in it.

The concatenated deltas are what `tokenizer.decode` makes of prompt and output together, less the prompt's part: a
leading space that follows a prompt stays, and a character that the prompt left incomplete belongs to the output.
It knows nothing of stop strings.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.text.tokenizer import Tokenizer

_FALLBACK_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_INCOMPLETE = "\ufffd"


class IncrementalDetokenizer:
    """Text of one answer; O(1) per token, amortised. Reads `skip_special_tokens` and
    `spaces_between_special_tokens` of `params`, and of `prompt_ids` only the last tokens."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self._skipped = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        if tokenizer.decoder_kinds == ("ByteLevel",):
            self._decoder: _Decoder = _ByteLevelDecoder(tokenizer)
        else:
            self._decoder = _WindowDecoder(tokenizer, params.spaces_between_special_tokens)
        self._decoder.start_after(token for token in reversed(prompt_ids) if token not in self._skipped)

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete, possibly empty."""
        return "".join([self._decoder.feed(token) for token in token_ids if token not in self._skipped])

    def flush(self) -> str:
        """What was held back, at the end: an incomplete character becomes U+FFFD."""
        return self._decoder.flush()


def detokenize(
    tokenizer: Tokenizer, token_ids: Sequence[int], params: SamplingParams, prompt_ids: Sequence[int] = ()
) -> str:
    """Text of a whole answer: the same as its deltas, joined."""
    detokenizer = IncrementalDetokenizer(tokenizer, params, prompt_ids)
    return detokenizer.feed(token_ids) + detokenizer.flush()


class _Decoder(Protocol):
    """How tokens become text, for a family of vocabularies."""

    def start_after(self, backwards: Iterable[int]) -> None:
        """Take over the context of a prompt, given from its last token back."""

    def feed(self, token: int) -> str:
        """The text that `token` completes."""

    def flush(self) -> str:
        """What is held, at the end."""


class _ByteLevelDecoder:
    """Every token is a run of bytes, so the text is their UTF-8, with no context but an incomplete character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def start_after(self, backwards: Iterable[int]) -> None:
        tail = b""
        for token in backwards:
            tail = (self._bytes_of(token) or b"") + tail
            if len(tail) >= 4:  # no UTF-8 character is longer
                break
        # decoding may begin within a character here: what that gives is thrown away with the rest of the prompt
        self._utf8.decode(tail)

    def feed(self, token: int) -> str:
        return self._utf8.decode(self._bytes_of(token) or b"")

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """Any other decoder: decode the last complete tokens with the new ones, and hand out what is longer.

    Tokens are held while they may change: byte-fallback tokens until their run ends (one wrong byte changes the
    whole run), and, where bytes are hidden in other tokens, those that end in U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, spaces_between_added: bool) -> None:
        self._tokenizer = tokenizer
        self._byte_fallback = "ByteFallback" in tokenizer.decoder_kinds
        self._byte_level = "ByteLevel" in tokenizer.decoder_kinds
        self._spaces_between_added = spaces_between_added
        self._after_added = False
        self._context: list[int] = []  # tokens already handed out, enough for a text that is not empty
        self._held: list[int] = []

    def start_after(self, backwards: Iterable[int]) -> None:
        for token in backwards:
            if self._tokenizer.token(token) is None:
                continue
            if self._is_fallback_byte(token) and not self._context:
                self._held.insert(0, token)
                continue
            self._context.insert(0, token)
            if self._decode(self._context):
                break
        run = self._decode(self._context + self._held)[len(self._decode(self._context)) :]
        if _INCOMPLETE not in run:
            self._context, self._held = self._context + self._held, []

    def feed(self, token: int) -> str:
        if self._tokenizer.token(token) is None:
            return ""
        added, text = self._tokenizer.is_added(token), ""
        if added and self._after_added and not self._spaces_between_added:
            text = self.flush()
            self._context = []
        self._after_added = added
        # the run before this token is complete, whatever this one is: release it first, to keep windows short
        if self._held and self._byte_fallback and not self._is_fallback_byte(token):
            text += self._release(self._decode(self._context + self._held))
        self._held.append(token)
        if self._is_fallback_byte(token):
            return text
        whole = self._decode(self._context + self._held)
        if self._byte_level and whole.endswith(_INCOMPLETE):
            return text
        return text + self._release(whole)

    def flush(self) -> str:
        return self._release(self._decode(self._context + self._held)) if self._held else ""

    def _release(self, whole: str) -> str:
        text = whole[len(self._decode(self._context)) :] if self._context else whole
        # a context must have text of its own, or a decoder that trims the beginning would trim the next token
        self._context = self._held if text else self._context + self._held
        self._held = []
        return text

    def _is_fallback_byte(self, token: int) -> bool:
        return self._byte_fallback and _FALLBACK_BYTE.fullmatch(self._tokenizer.token(token) or "") is not None

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
