"""What the Ascend operators in use take, as one table, checked before a model is loaded.

Neither tracing nor lowering nor torch_npu catches a call beyond these limits: a card does, in the middle of a step, or
it computes something else. They are those of the operators' documentation for A2 and A3. Free of torch; knows no
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.partition import split_heads

Layout = Literal["BSH", "BSND", "BNSD", "TND"]
# How a block of the cache lies: whole tokens one after the other, or all tokens of a head after those of another
CacheOrder = Literal["tokens", "heads"]

ATTENTION_DTYPES = ("bfloat16", "float16")
# Head sizes whose rows may be packed one behind the other (TND)
PACKED_HEAD_DIMS = (128, 192)
# Rows and columns of the causal mask, and the mode in which it is moved to the end of each row's context
MASK_SIZE = 2048
SPARSE_CAUSAL = 3

_ATTENTION = "npu_fused_infer_attention_score"
_ROTARY = "npu_rotary_mul"
_NO_OPTION = "the model"


@dataclass(frozen=True)
class Use:
    """How one rank uses the operators: its heads, `rows` and `length` at most, `decode` for one token each."""

    dtype: str
    head_dim: int
    num_heads: int
    num_kv_heads: int
    block_size: int
    rows: int
    length: int
    layout: Layout
    decode: bool
    cache: CacheOrder = "heads"


@dataclass(frozen=True)
class _Rule:
    """`fails` on a use that `operator` does not take; `wanted` is what it takes, `option` what a user can change."""

    operator: str
    option: str
    value: Callable[[Use], object]
    wanted: str
    fails: Callable[[Use], bool]


_RULES = (
    _Rule(
        _ATTENTION,
        "dtype",
        lambda use: use.dtype,
        f"{' or '.join(ATTENTION_DTYPES)}",
        lambda use: use.dtype not in ATTENTION_DTYPES,
    ),
    _Rule(
        _ATTENTION, _NO_OPTION, lambda use: use.head_dim, "a head_dim of at most 512", lambda use: use.head_dim > 512
    ),
    _Rule(
        _ATTENTION,
        _NO_OPTION,
        lambda use: use.head_dim,
        f"a head_dim of {' or '.join(map(str, PACKED_HEAD_DIMS))} with packed rows",
        lambda use: use.layout == "TND" and use.head_dim not in PACKED_HEAD_DIMS,
    ),
    _Rule(
        _ROTARY,
        _NO_OPTION,
        lambda use: use.head_dim,
        "an even head_dim below 896",
        lambda use: use.head_dim % 2 != 0 or use.head_dim >= 896,
    ),
    _Rule(
        _ATTENTION,
        "tensor_parallel_size",
        lambda use: use.num_heads,
        "at most 256 query heads on a rank",
        lambda use: use.num_heads > 256,
    ),
    _Rule(
        _ATTENTION,
        "tensor_parallel_size",
        lambda use: f"{use.num_heads} over {use.num_kv_heads}",
        "query heads that are a multiple of the key/value heads, at most 64 times as many",
        lambda use: use.num_heads % use.num_kv_heads != 0 or use.num_heads > 64 * use.num_kv_heads,
    ),
    _Rule(
        _ATTENTION,
        "tensor_parallel_size",
        lambda use: use.num_kv_heads * use.head_dim,
        "at most 65535 features of keys on a rank in a cache of whole tokens",
        lambda use: use.cache == "tokens" and use.num_kv_heads * use.head_dim > 65535,
    ),
    _Rule(
        _ATTENTION,
        "the cache's layout",
        lambda use: use.cache,
        "a cache of whole tokens with BSH and BSND",
        lambda use: use.cache == "heads" and use.layout in ("BSH", "BSND"),
    ),
    _Rule(
        _ATTENTION,
        "block_size",
        lambda use: use.block_size,
        "for packed rows a multiple of 16 up to 1024",
        lambda use: use.layout == "TND" and (use.block_size % 16 != 0 or not 0 < use.block_size <= 1024),
    ),
    _Rule(
        _ATTENTION,
        "block_size",
        lambda use: use.block_size,
        "for decodes a multiple of 16 up to 512",
        lambda use: use.layout != "TND" and use.decode and (use.block_size % 16 != 0 or not 0 < use.block_size <= 512),
    ),
    _Rule(
        _ATTENTION,
        "block_size",
        lambda use: use.block_size,
        "for prefills 128, 256, 384 or 512",
        lambda use: use.layout != "TND" and not use.decode and use.block_size not in (128, 256, 384, 512),
    ),
    _Rule(
        _ATTENTION,
        "max_num_seqs",
        lambda use: use.rows,
        "at most 4096 packed rows",
        lambda use: use.layout == "TND" and use.rows > 4096,
    ),
    _Rule(_ATTENTION, "max_num_seqs", lambda use: use.rows, "at most 65536 rows", lambda use: use.rows > 65536),
    _Rule(
        _ATTENTION,
        "max_model_len",
        lambda use: use.length,
        "at most 262144 keys for a decode",
        lambda use: use.decode and use.length > 262144,
    ),
)


def judge(use: Use) -> None:
    """Raises ConfigError that names the option to change if an operator does not take this use."""
    for rule in _RULES:
        if rule.fails(use):
            remedy = "run it with another device" if rule.option == _NO_OPTION else f"change {rule.option}"
            raise ConfigError(f"{rule.operator} takes {rule.wanted}, not {rule.value(use)}: {remedy}")


def uses(config: EngineConfig, model: ModelConfig) -> list[Use]:
    """Every use that a resolved config makes of the operators, over all ranks."""
    size = config.tensor_parallel_size
    prefill: Layout = "TND" if model.head_dim in PACKED_HEAD_DIMS else "BNSD"
    made = []
    for rank in range(size):
        heads = split_heads(model.num_heads, model.num_kv_heads, size, rank)
        layouts: list[tuple[Layout, bool]] = [("BNSD", True), (prefill, False)]
        for layout, decode in layouts:
            made.append(
                Use(
                    dtype=config.dtype,
                    head_dim=model.head_dim,
                    num_heads=heads.num_heads,
                    num_kv_heads=heads.num_kv_heads,
                    block_size=config.block_size,
                    rows=config.max_num_seqs,
                    length=config.max_model_len,
                    layout=layout,
                    decode=decode,
                )
            )
    return made


def check(config: EngineConfig, model: ModelConfig) -> None:
    """Whether the operators take what this resolved config asks of them. Raises ConfigError naming the option."""
    for use in uses(config, model):
        judge(use)
