"""From options given on the command line and in a YAML file to one checked Invocation. Starts nothing.

It knows which options go together. It does not know how they are written on a terminal.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from nanovllm_dist.config import EngineConfig, parse_bytes
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.sampling_params import SamplingParams

_PROMPT_MAX_TOKENS = 256  # SamplingParams' 16 is for programs; a person expects an answer
_ENGINE_FIELDS = frozenset(EngineConfig.__struct_fields__)
_SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__) - _ENGINE_FIELDS


class Mode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is run: prompts, a file of them, a chat; with none of them the engine serves until it is stopped."""

    prompt: list[str] = []
    prompts_file: str | None = None
    output: str | None = None
    chat: bool = False
    raw: bool = False

    @property
    def serves(self) -> bool:
        """Whether the engine is left to other clients."""
        return not (self.prompt or self.prompts_file or self.chat)


@dataclass(frozen=True)
class Invocation:
    """A checked command line. `sampling` holds what was set, so that a line of a prompts file can override it."""

    config: EngineConfig
    mode: Mode
    sampling: dict[str, Any]

    @property
    def params(self) -> SamplingParams:
        """Sampling parameters of every prompt that has none of its own."""
        return SamplingParams(**self.sampling)


def build_invocation(options: Mapping[str, Any]) -> Invocation:
    """Check options by name. Raises ConfigError, InvalidSamplingParamsError."""
    given = {name: value for name, value in options.items() if value is not None}
    if "model" not in given:
        raise ConfigError("no model was named: give --model, or model: in the --config file")
    mode = _mode({name: given.pop(name) for name in Mode.__struct_fields__ if name in given})
    sampling = {name: given.pop(name) for name in list(given) if name in _SAMPLING_FIELDS}
    if sampling and mode.serves:
        raise ConfigError(
            f"without --prompt, --prompts-file or --chat there is nothing for {_flags(sampling)} to apply to: "
            "clients of a running engine send their own"
        )
    if not mode.serves:
        sampling.setdefault("max_tokens", None if mode.chat else _PROMPT_MAX_TOKENS)
    invocation = Invocation(_engine_config(given), mode, sampling)
    _ = invocation.params  # raises
    return invocation


def _mode(given: dict[str, Any]) -> Mode:
    if isinstance(given.get("prompt"), str):
        given["prompt"] = [given["prompt"]]
    try:
        mode = msgspec.convert(given, Mode)
    except msgspec.ValidationError as error:
        raise ConfigError(f"options: {error}") from None
    chosen = [name for name in ("prompt", "prompts_file", "chat") if getattr(mode, name)]
    if len(chosen) > 1:
        raise ConfigError(f"{_flags(chosen)} contradict each other: give one of them")
    if mode.output and not mode.prompts_file:
        raise ConfigError("--output is for the answers to --prompts-file, which is not given")
    if mode.raw and (mode.serves or mode.chat):
        raise ConfigError("--raw is for --prompt and --prompts-file: a chat needs the model's template")
    return mode


def _engine_config(given: dict[str, Any]) -> EngineConfig:
    if isinstance(given.get("kv_cache_memory"), str):
        given["kv_cache_memory"] = parse_bytes(given["kv_cache_memory"])
    if isinstance(given.get("hf_overrides"), str):
        try:
            given["hf_overrides"] = json.loads(given["hf_overrides"])
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--hf-overrides is not JSON: {error}") from None
    return EngineConfig(**given)


def read_config_file(path: str, names: Mapping[str, str]) -> dict[str, Any]:
    """Options from a YAML mapping. `names`: every way an option may be written, without dashes, to its name.

    Raises ConfigError: the file cannot be read, or a key is no option (the message names the closest).
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"--config {path}: it is nested too deeply to be read as YAML") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected a mapping of options, such as `model: NAME`")
    options: dict[str, Any] = {}
    for key, value in (content or {}).items():
        name = names.get(_plain(key))
        if name is None:
            raise ConfigError(f"--config {path}: {key!r} is no option{_closest(_plain(key), names)}")
        if name in options:
            raise ConfigError(f"--config {path}: {key!r} sets {name} a second time")
        options[name] = value
    return options


def _plain(key: Any) -> str:
    return str(key).replace("_", "-")


def _closest(key: str, names: Mapping[str, str]) -> str:
    matches = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _flags(names: Any) -> str:
    return " and ".join("--" + name.replace("_", "-") for name in names)
