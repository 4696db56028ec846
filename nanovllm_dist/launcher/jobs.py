"""Prompts of a command line, or of a JSONL file, as checked jobs. It runs nothing and knows no engine."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm_dist.errors import ConfigError, InvalidSamplingParamsError
from nanovllm_dist.launcher.invocation import Invocation
from nanovllm_dist.sampling_params import SamplingParams

_INPUTS = ("prompt", "messages")
_KEYS = (*_INPUTS, "id", *SamplingParams.__struct_fields__)


@dataclass(frozen=True)
class Job:
    """One thing to answer: a prompt (text or token ids), or else a conversation (a list of {"role", "content"})."""

    params: SamplingParams
    prompt: str | list[int] = ""
    messages: list[dict[str, Any]] | None = None
    id: str | int | None = None


def read_jobs(invocation: Invocation) -> list[Job]:
    """The jobs of an invocation; none when it serves or chats. Raises ConfigError with the number of a bad line."""
    mode = invocation.mode
    if mode.output is not None:
        try:
            _check_output(mode.output)
        except (OSError, RuntimeError) as error:  # no name that a file can have, links in a circle
            raise ConfigError(f"--output {mode.output}: {error}") from None
    if mode.prompts_file:
        return list(_read_file(mode.prompts_file, invocation.sampling))
    if not all(mode.prompt):
        raise ConfigError("--prompt is empty")
    return [Job(invocation.params, prompt) for prompt in mode.prompt]


def _check_output(output: str) -> None:
    if not output:
        raise ConfigError("--output is empty: give the name of a file")
    target = Path(output).resolve()  # what a link leads to is written, and the link stays
    partial = Path(f"{target}.part")
    if target.exists() and not target.is_file():
        raise ConfigError(f"--output {output}: it is a directory or a device, and answers go into a file")
    if not target.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no such directory")
    if not os.access(target.parent, os.W_OK):
        raise ConfigError(f"--output {output}: nothing may be written into that directory")
    if partial.exists():
        raise ConfigError(
            f"--output {output}: {partial} is there, the answers of a run that was interrupted: move or delete it first"
        )


def _read_file(path: str, defaults: dict[str, Any]) -> Iterator[Job]:
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")  # JSON text may hold what else ends lines
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts-file {path}: {error}") from None
    if not any(line.strip() for line in lines):
        raise ConfigError(f"--prompts-file {path}: the file is empty")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _job(json.loads(line), defaults)
            except (ValueError, TypeError, RecursionError) as error:  # our own errors are ValueErrors too
                raise ConfigError(f"--prompts-file {path}, line {number}: {error}") from None


def _job(record: Any, defaults: dict[str, Any]) -> Job:
    if not isinstance(record, dict):
        raise ConfigError('expected an object such as {"prompt": "..."}')
    for key in record:
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1)
            raise ConfigError(f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    given = [key for key in _INPUTS if key in record]
    if len(given) != 1:
        raise ConfigError("expected one of `prompt` and `messages`")
    prompt, messages, identifier = (record.pop(key, None) for key in (*_INPUTS, "id"))
    if given == ["prompt"]:
        _check_prompt(prompt)
    else:
        _check_messages(messages)
    if identifier is not None and not isinstance(identifier, str | int):
        raise ConfigError("id is neither a string nor an integer")
    return Job(_params({**defaults, **record}), prompt or "", messages, identifier)


def _check_prompt(prompt: Any) -> None:
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not prompt or not (isinstance(prompt, str) or is_ids):
        raise ConfigError("prompt is neither a text nor a list of token ids, or it is empty")


def _check_messages(messages: Any) -> None:
    def is_message(message: Any) -> bool:
        return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message

    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        raise ConfigError('messages is not a list of {"role": ..., "content": ...}')


def _params(fields: dict[str, Any]) -> SamplingParams:
    bias = fields.get("logit_bias")
    if isinstance(bias, dict):  # JSON has no integer keys
        fields["logit_bias"] = {int(token): value for token, value in bias.items()}
    try:
        return SamplingParams(**fields)
    except InvalidSamplingParamsError as error:
        raise ConfigError(str(error)) from None
