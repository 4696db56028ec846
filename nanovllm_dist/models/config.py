"""ModelConfig: what the engine needs of a checkpoint's config.json and generation_config.json, typed and checked.

Free of torch, so that the launcher and the coordinator can read it. It does not know weights or devices.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nanovllm_dist.errors import ModelNotFoundError, UnsupportedModelError

_T = TypeVar("_T", list[Any], dict[str, Any])
SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")  # `registry` has their classes
_IGNORED_ROPE_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_REQUIRED_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL_ROPE_NUMBERS = ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")
_DEFAULT_HEAD_DIM = {"Qwen3ForCausalLM": 128}  # of configs that do not state one; others divide hidden_size


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `kind` default, linear, llama3 or yarn; `params` are that kind's own numbers."""

    kind: str
    theta: float
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a decoder-only model, named as in Hugging Face configs; `dtype` is "" if none is stated."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: str
    eos_token_ids: tuple[int, ...]


def read_model_config(model_dir: str | Path, overrides: dict[str, Any] | None = None) -> ModelConfig:
    """Read and check the configs in `model_dir`; `overrides` replace keys of config.json (nested ones merge).

    Raises:
        ModelNotFoundError: there is no config.json.
        UnsupportedModelError: it is not JSON, lacks a key, or asks for something this engine does not do.
    """
    directory = Path(model_dir)
    if not (directory / "config.json").is_file():
        raise ModelNotFoundError(f"{directory} has no config.json: it is not a model directory")
    raw = _merge(_read_json(directory / "config.json"), overrides or {})
    generation: dict[str, Any] = {}
    if (directory / "generation_config.json").is_file():
        generation = _read_json(directory / "generation_config.json")
    return parse_model_config(raw, generation)


def parse_model_config(raw: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    """The typed form of config.json's and generation_config.json's content. Raises UnsupportedModelError."""
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise UnsupportedModelError(f"config.json: architectures={architectures!r}: expected exactly one name")
    architecture = str(architectures[0])
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModelError(
            f"{architecture} is not supported; supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    _refuse_unsupported(raw)
    num_heads = _integer(raw, "num_attention_heads")
    num_kv_heads = _integer(raw, "num_key_value_heads", num_heads)
    hidden_size = _integer(raw, "hidden_size")
    if num_heads % num_kv_heads:
        raise UnsupportedModelError(
            f"config.json: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
        )
    if raw.get("head_dim") is None and architecture not in _DEFAULT_HEAD_DIM and hidden_size % num_heads:
        raise UnsupportedModelError(
            f"config.json: no head_dim, and hidden_size={hidden_size} / {num_heads} heads is no integer"
        )
    bias = bool(raw.get("attention_bias", False))
    max_positions = _integer(raw, "max_position_embeddings", 2048)
    head_dim = _integer(raw, "head_dim", _DEFAULT_HEAD_DIM.get(architecture, hidden_size // num_heads))
    if head_dim % 2:
        raise UnsupportedModelError(f"config.json: head_dim={head_dim} is odd: rotary embedding needs pairs")
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_layers=_integer(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_integer(raw, "vocab_size"),
        rms_norm_eps=_positive(raw, "rms_norm_eps", 1e-6),
        rope=_rope(raw, max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        o_bias=bias and architecture != "Qwen2ForCausalLM",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "").removeprefix("torch."),
        eos_token_ids=_eos(raw, generation or {}),
    )


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"config.json: hidden_act={activation!r} is not supported, only 'silu'")
    if raw.get("use_sliding_window"):
        raise UnsupportedModelError("config.json: use_sliding_window=true is not supported")
    if any(kind != "full_attention" for kind in _of_type(raw, "layer_types", list) or []):
        raise UnsupportedModelError("config.json: layer_types other than full_attention are not supported")
    if raw.get("quantization_config"):
        raise UnsupportedModelError("config.json: quantization_config: quantized checkpoints are not supported")


def _rope(raw: dict[str, Any], max_positions: int) -> RopeConfig:
    # transformers 5 writes rope_parameters; earlier versions rope_theta and rope_scaling
    block = {**(_of_type(raw, "rope_scaling", dict) or {}), **(_of_type(raw, "rope_parameters", dict) or {})}
    kind = str(block.get("rope_type") or block.get("type") or "default")
    if kind not in _REQUIRED_ROPE_KEYS:
        raise UnsupportedModelError(
            f"config.json: rope_type={kind!r} is not supported; supported are {', '.join(_REQUIRED_ROPE_KEYS)}"
        )
    if "mrope_section" in block or any(isinstance(value, dict) for value in block.values()):
        raise UnsupportedModelError("config.json: RoPE by sections or by layer type is not supported")
    if _positive(block, "partial_rotary_factor", _positive(raw, "partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModelError("config.json: partial_rotary_factor other than 1 is not supported")
    theta = _positive(block, "rope_theta", _positive(raw, "rope_theta", 10000.0))
    params = {key: value for key, value in block.items() if key not in _IGNORED_ROPE_KEYS}
    if kind in ("llama3", "yarn"):
        trained_length = raw.get("original_max_position_embeddings") or params.get("original_max_position_embeddings")
        params["original_max_position_embeddings"] = trained_length or max_positions
    if kind == "yarn" and "factor" in params and params["factor"] is None:
        params["factor"] = max_positions / _positive(params, "original_max_position_embeddings", max_positions)
    for key in (*_REQUIRED_ROPE_KEYS[kind], *(key for key in _OPTIONAL_ROPE_NUMBERS if params.get(key) is not None)):
        if not _is_positive(params.get(key)):
            raise UnsupportedModelError(f"config.json: RoPE {kind} needs a positive {key}, not {params.get(key)!r}")
    if kind == "llama3" and params["low_freq_factor"] >= params["high_freq_factor"]:
        raise UnsupportedModelError("config.json: RoPE llama3 needs a low_freq_factor below its high_freq_factor")
    return RopeConfig(kind, theta, params)


def _eos(raw: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    ids: list[int] = []
    for source in (generation.get("eos_token_id"), raw.get("eos_token_id")):
        if source is None:
            continue
        for token in source if isinstance(source, list) else [source]:
            if isinstance(token, bool) or not isinstance(token, int) or not -(2**31) <= token < 2**31:
                raise UnsupportedModelError(f"config.json or generation_config.json: eos_token_id={source!r} is no id")
            if token not in ids:
                ids.append(token)
    return tuple(ids)


def _of_type(raw: dict[str, Any], key: str, kind: type[_T]) -> _T | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, kind):
        raise UnsupportedModelError(f"config.json: {key}={value!r} is no JSON {'list' if kind is list else 'object'}")
    return value


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _positive(raw: dict[str, Any], key: str, default: float) -> float:
    value = raw.get(key)
    if value is None:
        return default
    if not _is_positive(value):
        raise UnsupportedModelError(f"config.json: {key}={value!r} is not a positive number")
    return float(value)


def _integer(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        if default is None:
            raise UnsupportedModelError(f"config.json has no {key}")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(f"config.json: {key}={value!r} is not a positive integer")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UnsupportedModelError(f"{path.name} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path.name} is not a JSON object")
    return content


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
