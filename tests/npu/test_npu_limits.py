"""Uses of the Ascend operators at and beyond each documented limit, each judged right; free of torch_npu."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.models.config import ModelConfig, parse_model_config
from nanovllm_dist.workers.platform.npu_limits import Use, check, judge

DECODE = Use("bfloat16", 128, 16, 2, 128, 256, 40960, "BNSD", decode=True)
PREFILL = replace(DECODE, decode=False)
PACKED = replace(PREFILL, layout="TND")
TOKENS = replace(DECODE, layout="BSH", cache="tokens")

LEGAL: list[tuple[Use, dict[str, Any]]] = [
    (DECODE, {}),
    (PREFILL, {}),
    (PACKED, {}),
    (TOKENS, {}),
    (DECODE, {"dtype": "float16"}),
    (DECODE, {"head_dim": 64}),
    (DECODE, {"head_dim": 512}),
    (PREFILL, {"head_dim": 96}),
    (PACKED, {"head_dim": 192}),
    (DECODE, {"num_heads": 256, "num_kv_heads": 4}),
    (DECODE, {"num_heads": 64, "num_kv_heads": 1}),
    (DECODE, {"num_heads": 5, "num_kv_heads": 5}),
    (DECODE, {"block_size": 16}),
    (DECODE, {"block_size": 512}),
    (PREFILL, {"block_size": 384}),
    (PREFILL, {"block_size": 512}),
    (PACKED, {"block_size": 16}),
    (PACKED, {"block_size": 1024}),
    (PACKED, {"rows": 4096}),
    (DECODE, {"rows": 65536}),
    (DECODE, {"length": 262144}),
    (PREFILL, {"length": 262145}),
    (TOKENS, {"layout": "BSND"}),
    (TOKENS, {"num_heads": 255, "num_kv_heads": 255, "head_dim": 256, "layout": "BNSD"}),
    (DECODE, {"num_heads": 256, "num_kv_heads": 256, "head_dim": 512}),
]
ILLEGAL: list[tuple[Use, dict[str, Any], str]] = [
    (DECODE, {"dtype": "float32"}, "change dtype"),
    (PACKED, {"dtype": "float32"}, "change dtype"),
    (DECODE, {"head_dim": 514}, "another device"),
    (PREFILL, {"head_dim": 576}, "another device"),
    (DECODE, {"head_dim": 65}, "another device"),
    (PACKED, {"head_dim": 64}, "another device"),
    (PACKED, {"head_dim": 96}, "another device"),
    (DECODE, {"num_heads": 257, "num_kv_heads": 257}, "change tensor_parallel_size"),
    (DECODE, {"num_heads": 65, "num_kv_heads": 1}, "change tensor_parallel_size"),
    (DECODE, {"num_heads": 9, "num_kv_heads": 2}, "change tensor_parallel_size"),
    (DECODE, {"block_size": 100}, "change block_size"),
    (DECODE, {"block_size": 8}, "change block_size"),
    (DECODE, {"block_size": 528}, "change block_size"),
    (DECODE, {"block_size": 0}, "change block_size"),
    (PREFILL, {"block_size": 64}, "change block_size"),
    (PREFILL, {"block_size": 192}, "change block_size"),
    (PREFILL, {"block_size": 640}, "change block_size"),
    (PACKED, {"block_size": 24}, "change block_size"),
    (PACKED, {"block_size": 1040}, "change block_size"),
    (PACKED, {"rows": 4097}, "change max_num_seqs"),
    (DECODE, {"rows": 65537}, "change max_num_seqs"),
    (DECODE, {"length": 262145}, "change max_model_len"),
    (TOKENS, {"num_heads": 256, "num_kv_heads": 256, "head_dim": 256}, "change tensor_parallel_size"),
    (DECODE, {"layout": "BSH"}, "layout"),
    (PREFILL, {"layout": "BSND"}, "layout"),
]
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
}
QWEN3_32B = {
    **SMOLLM2,
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 5120,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}


@pytest.mark.parametrize(("base", "changes"), LEGAL)
def test_what_the_operators_take_passes(base: Use, changes: dict[str, Any]) -> None:
    judge(replace(base, **changes))


@pytest.mark.parametrize(("base", "changes", "remedy"), ILLEGAL)
def test_what_they_do_not_take_is_refused_with_the_option_to_change(
    base: Use, changes: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        judge(replace(base, **changes))
    assert "npu_" in str(caught.value)


def resolved(**changes: Any) -> EngineConfig:
    limits = {"max_num_seqs": 256, "max_model_len": 8192, "max_num_batched_tokens": 8192, "block_size": 128}
    return EngineConfig(**{"model": "m", "device": "npu", "dtype": "bfloat16", **limits, **changes})


def model(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return parse_model_config({**raw, **changes})


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("raw", [SMOLLM2, QWEN3_32B])
def test_models_as_they_are_run_by_default_are_legal_on_any_number_of_ranks(raw: dict[str, Any], ranks: int) -> None:
    check(resolved(tensor_parallel_size=ranks), model(raw))


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"block_size": 64}, "block_size"),
        ({"block_size": 32}, "block_size"),
        ({"max_model_len": 262145}, "max_model_len"),
    ],
)
def test_an_illegal_option_is_named_at_load(changes: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError, match=f"change {option}"):
        check(resolved(**changes), model(SMOLLM2))


def test_packed_rows_of_heads_of_128_allow_blocks_that_padded_ones_do_not() -> None:
    check(resolved(block_size=64), model(QWEN3_32B))
    with pytest.raises(ConfigError, match="change max_num_seqs"):
        check(resolved(max_num_seqs=5000), model(QWEN3_32B))


def test_heads_that_no_split_can_make_legal_are_refused() -> None:
    wide = model(QWEN3_32B, num_attention_heads=80, num_key_value_heads=1)
    with pytest.raises(ConfigError, match="change tensor_parallel_size"):
        check(resolved(), wide)
    check(resolved(tensor_parallel_size=2), wide)
