"""Turns a Llama-class GGUF file into a Hugging Face model directory: safetensors, configs, tokenizer.

It knows GGUF's conventions (names, permuted q/k rows, quantised blocks) and nothing of where files come from.
Weights are stored as bfloat16. A quantised weight is already off by up to half a step of its block; rounding it to
bfloat16 adds less than a tenth of that for 4-bit blocks and less than half of it for 8-bit ones. In return every
dtype loads the same values, the file is half as large, and the published checkpoint has this type too.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm_dist.errors import ConfigError, UnsupportedModelError, WeightsError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_CONTROL_TOKEN = 3
_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(source: Path, target: Path, *, progress: bool = False) -> None:
    """Write the model in the GGUF file `source` into the existing directory `target`.

    Raises:
        ConfigError: the `gguf` package is not installed.
        UnsupportedModelError: not a GGUF file, not a Llama-class model, or a tokenizer other than byte-level BPE.
        WeightsError: a tensor of the file is not one of a Llama-class model.
    """
    reader = _open(source)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(metadata, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", generation_config(metadata))
    _write_tokenizer(metadata, target)
    _write_weights(reader, config, target / "model.safetensors", progress)


def model_config(metadata: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """config.json's content from GGUF metadata. Raises UnsupportedModelError."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModelError(f"GGUF architecture {architecture!r} is not supported, only 'llama'")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise UnsupportedModelError(f"GGUF llama.rope.scaling.type={scaling!r} is not supported")
    hidden, heads = _field(metadata, "llama.embedding_length"), _field(metadata, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _field(metadata, "llama.feed_forward_length"),
        "num_hidden_layers": _field(metadata, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": hidden // heads,
        "max_position_embeddings": _field(metadata, "llama.context_length"),
        # the file holds float32: 9.999999747e-06 stands for 1e-05
        "rms_norm_eps": float(f"{_field(metadata, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata.get("llama.rope.freq_base", 10000.0)},
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": len(_field(metadata, "tokenizer.ggml.tokens")),
        **_special_ids(metadata),
    }


def generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json's content: the special token ids."""
    return _special_ids(metadata)


def unpermute_rows(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo GGUF's row order of a q or k projection `(heads * head_dim, in)`.

    GGUF interleaves the two halves of each head, as its rotary embedding turns neighbouring rows; Hugging Face
    turns row i with row i + head_dim / 2.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def hf_name(gguf_name: str) -> str:
    """The Hugging Face name of a GGUF tensor. Raises WeightsError for one that a Llama-class model has not."""
    if gguf_name in _TOP_LEVEL:
        return _TOP_LEVEL[gguf_name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match is None or match[2] not in _PER_LAYER:
        raise WeightsError(f"GGUF tensor {gguf_name!r} does not belong to a Llama-class model")
    return f"model.layers.{match[1]}.{_PER_LAYER[match[2]]}.weight"


def require_gguf() -> None:
    """Raise ConfigError if the `gguf` package is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("reading GGUF needs the package gguf: pip install 'nanovllm_dist[cpu]'")


def _open(source: Path) -> Any:
    require_gguf()
    import gguf

    try:
        return gguf.GGUFReader(source)
    except (ValueError, IndexError, KeyError) as error:
        raise UnsupportedModelError(f"{source.name} is not a readable GGUF file: {error}") from None


def _write_weights(reader: Any, config: dict[str, Any], path: Path, progress: bool) -> None:
    # torch only for its bfloat16, which numpy has not
    import torch
    from safetensors.torch import save_file

    weights = {}
    for name, values in _dequantised(reader, config, progress):
        weights[name] = torch.from_numpy(values).to(torch.bfloat16)
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # save_file leaves it to the owner alone, and a cache may be shared


def _dequantised(reader: Any, config: dict[str, Any], progress: bool) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    import numpy as np
    from gguf.quants import dequantize
    from tqdm import tqdm

    heads = {"attn_q.weight": config["num_attention_heads"], "attn_k.weight": config["num_key_value_heads"]}
    # disable=None: quiet where standard error is not a terminal
    for tensor in tqdm(reader.tensors, desc="Converting", unit=" tensors", disable=None if progress else True):
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        part = tensor.name.split(".", 2)[-1]
        if part in heads:
            values = unpermute_rows(values, heads[part])
        yield hf_name(tensor.name), np.ascontiguousarray(values)


def _write_tokenizer(metadata: dict[str, Any], target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise UnsupportedModelError(f"GGUF tokenizer {kind[0]!r} with pre-tokenizer {kind[1]!r} is not supported")
    tokens: list[str] = _field(metadata, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(metadata, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(metadata, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(target / "tokenizer.json"))
    _write_json(target / "tokenizer_config.json", _tokenizer_config(metadata, tokens, control))


def _tokenizer_config(metadata: dict[str, Any], tokens: list[str], control: list[str]) -> dict[str, Any]:
    named = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    return {
        # the class that takes tokenizer.json as it is
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": control,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _field(metadata, "llama.context_length"),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }


def _special_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{name}_token_id": metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }


def _field(metadata: dict[str, Any], key: str) -> Any:
    if key not in metadata:
        raise UnsupportedModelError(f"the GGUF file has no {key}")
    return metadata[key]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
