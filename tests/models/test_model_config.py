"""What the engine reads from config.json and generation_config.json, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm_dist.errors import ModelNotFoundError, UnsupportedModelError
from nanovllm_dist.models.config import ModelConfig, parse_model_config, read_model_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def parse(**changes: Any) -> ModelConfig:
    return parse_model_config({**BASE, **changes})


def test_reading_a_config_does_not_import_torch() -> None:
    code = "import sys, nanovllm_dist.models.config, nanovllm_dist.models.partition; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_plain_config_gets_the_defaults_of_transformers() -> None:
    config = parse()
    assert (config.head_dim, config.rms_norm_eps, config.dtype) == (16, 1e-6, "")
    assert (config.tie_word_embeddings, config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False, False)
    assert (config.rope.kind, config.rope.theta, config.rope.params) == ("default", 10000.0, {})


def test_key_value_heads_default_to_query_heads() -> None:
    assert parse(num_key_value_heads=None).num_kv_heads == 4


def test_qwen2_always_has_biases_on_queries_keys_and_values_only() -> None:
    config = parse(architectures=["Qwen2ForCausalLM"])
    assert (config.qkv_bias, config.o_bias) == (True, False)


def test_qwen3_without_head_dim_has_heads_of_128() -> None:
    assert parse(architectures=["Qwen3ForCausalLM"]).head_dim == 128


@pytest.mark.parametrize("dtype_key", ["dtype", "torch_dtype"])
def test_dtype_is_read_in_the_form_of_transformers_4_and_5(dtype_key: str) -> None:
    assert parse(**{dtype_key: "bfloat16"}).dtype == "bfloat16"


@pytest.mark.parametrize(
    "form",
    [
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_scaling": LLAMA3, "rope_theta": 5e5},
        {
            "rope_scaling": {**{k: v for k, v in LLAMA3.items() if k != "rope_type"}, "type": "llama3"},
            "rope_theta": 5e5,
        },
    ],
    ids=["rope_parameters", "rope_scaling", "rope_scaling with type"],
)
def test_rope_is_read_in_every_form(form: dict[str, Any]) -> None:
    rope = parse(**form).rope
    assert (rope.kind, rope.theta) == ("llama3", 5e5)
    assert rope.params == {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }


def test_trained_length_beside_the_rope_block_wins_as_in_transformers() -> None:
    rope = parse(
        original_max_position_embeddings=16, rope_scaling={**LLAMA3, "original_max_position_embeddings": 32}
    ).rope
    assert rope.params["original_max_position_embeddings"] == 16


def test_yarn_factor_null_is_the_ratio_of_the_lengths() -> None:
    block = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}
    assert parse(rope_parameters=block).rope.params["factor"] == 4.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": []}, "architectures"),
        ({"architectures": ["A", "B"]}, "architectures"),
        ({"architectures": 3}, "architectures"),
        ({"architectures": ["MambaForCausalLM"]}, r"MambaForCausalLM.*LlamaForCausalLM.*Qwen3ForCausalLM"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rope_theta": "abc"}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": "x"}},
            "original_max_position_embeddings",
        ),
        ({"eos_token_id": 2**70}, "eos_token_id"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"layer_types": 3}, "layer_types"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 66}, "head_dim"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "sections"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "layer type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": None}}, "high_freq_factor"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        parse(**changes)


def write(directory: Path, **files: Any) -> None:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_end_of_sequence_ids_of_both_files_are_joined_in_order(tmp_path: Path) -> None:
    write(tmp_path, config={**BASE, "eos_token_id": [2, 5]}, generation_config={"eos_token_id": [7, 2]})
    assert read_model_config(tmp_path).eos_token_ids == (7, 2, 5)


def test_overrides_replace_keys_and_merge_nested_ones(tmp_path: Path) -> None:
    write(tmp_path, config={**BASE, "rope_scaling": LLAMA3})
    config = read_model_config(tmp_path, {"max_position_embeddings": 64, "rope_scaling": {"factor": 2.0}})
    assert config.max_position_embeddings == 64
    assert (config.rope.kind, config.rope.params["factor"]) == ("llama3", 2.0)


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        read_model_config(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    write(tmp_path, config=content)
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        read_model_config(tmp_path)
