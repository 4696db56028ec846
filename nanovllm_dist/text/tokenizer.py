"""Tokenizer: text to token ids and back, as the model's own tokenizer files say, on the `tokenizers` library.

Opens in tens of milliseconds; transformers is imported only for chat templates, and for checkpoints without a
tokenizer.json. It knows nothing of requests; for text that comes token by token see `text.detokenizer`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

from nanovllm_dist.errors import InvalidRequestError, ModelNotFoundError, UnsupportedModelError
from nanovllm_dist.text.chat_template import ChatTemplate, special_token_texts

_SENTENCEPIECE = "tokenizer.model"


class Tokenizer:
    """A model's tokenizer. Thread-safe after construction; make one with `from_directory`."""

    def __init__(self, backend: Backend, chat_template: ChatTemplate | None = None) -> None:
        """Wrap a tokenizer of the `tokenizers` library, which is changed to never truncate or pad."""
        # a tokenizer.json may carry its training's truncation, which would shorten prompts silently
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._template = chat_template
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._pieces: dict[int, bytes | None] = {}

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Open the tokenizer in the model directory `path`.

        Raises:
            ModelNotFoundError: there are no tokenizer files.
            UnsupportedModelError: they cannot be read, or contradict each other.
        """
        directory = Path(path)
        config = _read_json(directory / "tokenizer_config.json")
        if (directory / "tokenizer.json").is_file():
            backend = _open(directory / "tokenizer.json")
            _add_declared_tokens(backend, config, directory)
        elif (directory / _SENTENCEPIECE).is_file():
            backend = _converted(directory)
        else:
            raise ModelNotFoundError(f"{directory} has neither tokenizer.json nor {_SENTENCEPIECE}")
        return cls(backend, ChatTemplate.from_directory(directory, config))

    @cached_property
    def decoder_kinds(self) -> tuple[str, ...]:
        """Names of the decoder's steps (`ByteLevel`, `ByteFallback`, ...), which say how tokens make text."""
        if self._backend.decoder is None:
            return ()
        decoder = json.loads(self._backend.decoder.__getstate__())
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        return tuple(step["type"] for step in steps)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens (BOS, say) that the model's tokenizer adds by default.

        Raises InvalidRequestError when `text` is not a string of Unicode characters.
        """
        try:
            text.encode()  # what the library says of half a character is that it "must be str"
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text cannot be tokenized: it is not valid Unicode, character {error.start} is "
                f"{text[error.start]!r}, half of a surrogate pair"
            ) from None
        except (TypeError, AttributeError):
            raise InvalidRequestError(f"the text cannot be tokenized: it is of type {type(text).__name__}") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def is_added(self, token_id: int) -> bool:
        """Whether the token was added to the vocabulary as a whole, as special tokens are."""
        return token_id in self._added

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (`Ġthe`, `<0xE4>`), or None where there is none of that id."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that a token of a byte-level vocabulary stands for; None where there is none of that id."""
        try:
            return self._pieces[token_id]
        except KeyError:
            piece = self._pieces[token_id] = _byte_level_bytes(self.token(token_id))
            return piece

    def token_text(self, token_id: int) -> str:
        """Text of one token in the middle of a text, for logprobs; part of a character gives U+FFFD."""
        if self.token(token_id) is None:
            return ""
        if self.decoder_kinds == ("ByteLevel",):
            return (self.token_bytes(token_id) or b"").decode("utf-8", errors="replace")
        # some decoders drop the first token's leading space: the second of two has it
        once = self._backend.decode([token_id], skip_special_tokens=False)
        return self._backend.decode([token_id, token_id], skip_special_tokens=False)[len(once) :]

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return self._template is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation; `kwargs` are the template's own variables. Raises as `render_chat` does."""
        return self.encode(self.render_chat(messages, tools, add_generation_prompt, **kwargs), add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Text of a conversation as the model's template writes it.

        Raises:
            InvalidRequestError: no template, messages of a wrong shape, or the template refuses them.
            UnsupportedModelError: the template is not valid Jinja.
        """
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template: send a plain prompt, or add a chat_template.jinja"
            )
        return self._template.render(messages, tools, add_generation_prompt, kwargs)


def _byte_level_alphabet() -> dict[str, int]:
    """Which character stands for which byte: printable ones for themselves, the others from U+0100 on, in order."""
    alphabet = set(ByteLevel.alphabet())
    plain = [byte for byte in range(256) if chr(byte) in alphabet]
    moved = [byte for byte in range(256) if chr(byte) not in alphabet]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + i): byte for i, byte in enumerate(moved)}}


_BYTE_OF = _byte_level_alphabet()


def _byte_level_bytes(token: str | None) -> bytes | None:
    if token is None:
        return None
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # an added token, in plain text
        return token.encode()


def _open(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        hint = ""
        with path.open("rb") as file:
            if file.read(11) == b"version htt":
                hint = ": it is a Git-LFS pointer, fetch the real file with `git lfs pull`"
        raise UnsupportedModelError(f"{path} cannot be read as a tokenizer ({error}){hint}") from None


def _add_declared_tokens(backend: Backend, config: dict[str, Any], directory: Path) -> None:
    """Add what only tokenizer_config.json declares: tokens, and that the named ones (EOS, ...) are special."""
    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder") or {}
    for token_id, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        if entry["content"] in known:
            continue
        options = {key: bool(entry[key]) for key in ("lstrip", "rstrip", "normalized", "single_word") if key in entry}
        token = AddedToken(entry["content"], special=bool(entry.get("special", False)), **options)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != int(token_id):
            raise UnsupportedModelError(
                f"{directory}: tokenizer_config.json gives {token.content!r} the id {token_id}, tokenizer.json "
                f"gives it {backend.token_to_id(token.content)}"
            )
        known[token.content] = token.special
    named = special_token_texts(config).values()
    unmarked = [text for text in named if not known.get(text) and backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in unmarked])


def _converted(directory: Path) -> Backend:
    """The tokenizer of a checkpoint that has only a SentencePiece model, converted by transformers."""
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False).backend_tokenizer
    except Exception as error:  # anything, from a missing package to a malformed file
        raise UnsupportedModelError(f"{directory / _SENTENCEPIECE} cannot be converted: {error}") from error
    if not isinstance(backend, Backend):
        raise UnsupportedModelError(f"{directory / _SENTENCEPIECE} has no fast form: add a tokenizer.json")
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UnsupportedModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path} is not a JSON object")
    return content
