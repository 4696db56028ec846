"""ChatTemplate: renders conversations with the model's Jinja template, in the sandbox of transformers.

The rendering is transformers' own, so that templates see what their authors tested. It does not know tokens, and
it sets no time limit: a server renders off its event loop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovllm_dist.errors import InvalidRequestError, UnsupportedModelError

# arguments of the renderer itself: as variables from a request they could replace the template
_RESERVED = {
    "conversations",
    "messages",
    "tools",
    "add_generation_prompt",
    "chat_template",
    "return_assistant_tokens_mask",
    "tokenize",
}


class ChatTemplate:
    """The template or templates of one model: `default`, and perhaps `tool_use` and others by name."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_directory(cls, directory: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
        """The model's template, from chat_template.jinja, tokenizer_config.json or chat_template.json, or None.

        Raises UnsupportedModelError when a file is there but is not a template.
        """
        templates = _find(directory, tokenizer_config)
        return cls(templates, special_token_texts(tokenizer_config)) if templates else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The conversation as text. Raises InvalidRequestError, or UnsupportedModelError for a broken template."""
        _check_messages(messages)
        _check_tools(tools)
        if reserved := sorted(_RESERVED & set(variables)):
            raise InvalidRequestError(f"chat template variables may not be named {', '.join(reserved)}")
        template = self._choose(bool(tools))
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=[dict(tool) for tool in tools] if tools else None,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **variables},
            )
        except TemplateSyntaxError as error:
            raise UnsupportedModelError(f"the chat template is not valid Jinja: line {error.lineno}: {error}") from None
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}") from error
        return str(rendered[0])

    def _choose(self, with_tools: bool) -> str:
        if with_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise UnsupportedModelError(f"no default chat template, only {', '.join(sorted(self._templates))}")
        return self._templates["default"]


def special_token_texts(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... of a tokenizer_config.json, each as plain text."""
    texts = {}
    for key, value in tokenizer_config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            texts[key] = text
    return texts


def _find(directory: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    if (directory / "chat_template.jinja").is_file():
        files = {"default": directory / "chat_template.jinja"}
        files |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
        return {name: _read(path) for name, path in files.items()}
    declared = tokenizer_config.get("chat_template")
    where = "tokenizer_config.json"
    if declared is None and (directory / "chat_template.json").is_file():
        where = "chat_template.json"
        try:
            declared = json.loads(_read(directory / where))["chat_template"]
        except (ValueError, KeyError, TypeError):
            raise UnsupportedModelError(f"{directory / where} holds no chat_template") from None
    if declared is None:
        return {}
    if isinstance(declared, str):
        return {"default": declared}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in declared}
    except (KeyError, TypeError):
        raise UnsupportedModelError(f"{directory / where}: chat_template is neither text nor a list of them") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error}") from None


def _check_messages(messages: Any) -> None:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError('messages must be a non-empty list of {"role": ..., "content": ...}')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequestError(
                f"messages[{index}] is of type {type(message).__name__}, not an object with a role"
            )
        if not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"messages[{index}].role is {message.get('role')!r}, not a string")
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list, tuple)):
            raise InvalidRequestError(
                f"messages[{index}].content is of type {type(content).__name__}, not text or parts"
            )


def _check_tools(tools: Any) -> None:
    if tools is None:
        return
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise InvalidRequestError("tools must be a list of JSON-schema objects")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidRequestError(f"tools[{index}] is of type {type(tool).__name__}, not a JSON-schema object")
