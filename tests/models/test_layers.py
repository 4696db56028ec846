"""Blocks alone: norms, RoPE, repacked linear layers, decode buckets, the registry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import CONFIGS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from nanovllm_dist.models.config import SUPPORTED_ARCHITECTURES, ModelConfig, parse_model_config
from nanovllm_dist.models.layers import torch_attention
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.kernels import TorchLayers
from nanovllm_dist.models.layers.linear_kernel import pack_linear
from nanovllm_dist.models.layers.norm import RMSNorm
from nanovllm_dist.models.layers.rotary import RotaryEmbedding, rope_frequencies, rotate
from nanovllm_dist.models.layers.torch_attention import TorchAttention
from nanovllm_dist.models.registry import MODELS

CPU = torch.device("cpu")
ROPE_CONFIGS = [name for name in CONFIGS if name.startswith("llama")]


def our_config(name: str) -> ModelConfig:
    return parse_model_config({**CONFIGS[name].to_dict(), "architectures": ["LlamaForCausalLM"]})


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ROPE_CONFIGS)
def test_rope_frequencies_and_factor_equal_transformers(name: str) -> None:
    config = CONFIGS[name]
    kind = config.rope_parameters["rope_type"]
    compute = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    expected, factor = compute(config)
    ours, our_factor = rope_frequencies(our_config(name))
    torch.testing.assert_close(ours, expected, atol=0, rtol=1e-6)
    assert our_factor == pytest.approx(factor, abs=1e-12)


def test_the_rope_kinds_under_test_differ() -> None:
    kinds = ["llama", "llama_linear", "llama_llama3", "llama_yarn", "llama_yarn_untruncated"]
    tables = [rope_frequencies(our_config(name))[0] for name in kinds]
    assert not any(torch.allclose(a, b) for index, a in enumerate(tables) for b in tables[:index])
    factors = {rope_frequencies(our_config(name))[1] for name in CONFIGS if "yarn" in name}
    assert len(factors) == 3


@pytest.mark.parametrize("name", ["llama", "llama_yarn"])
def test_rotation_equals_transformers(name: str) -> None:
    positions = torch.tensor([0, 5, 17, 100])
    query, key = torch.randn(4, 3, 16), torch.randn(4, 2, 16)
    cos, sin = LlamaRotaryEmbedding(CONFIGS[name])(query, positions[None])
    expected = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    rotation = RotaryEmbedding(our_config(name), CPU)(positions)
    for ours, theirs in zip((query, key), expected, strict=True):
        torch.testing.assert_close(rotate(ours, rotation), theirs[0].transpose(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_transformers_to_the_bit(dtype: torch.dtype) -> None:
    x, residual = torch.randn(5, 64, dtype=dtype), torch.randn(5, 64, dtype=dtype)
    theirs = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    ours = RMSNorm("norm.weight", 64, 1e-5, TorchLayers(TorchAttention()), dtype, CPU)
    for weight in (theirs.weight, ours.weight):
        weight.data.copy_(torch.linspace(-1, 2, 64))
    with torch.no_grad():
        assert torch.equal(ours(x)[0], theirs(x))
        normed, total = ours(x, residual)
        assert torch.equal(total, x + residual)
        assert torch.equal(normed, theirs(x + residual))


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 65])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_linear_equals_plain(rows: int, biased: bool, dtype: torch.dtype, tolerance: float) -> None:
    weight, x = torch.randn(96, 40, dtype=dtype) / 6, torch.randn(rows, 40, dtype=dtype)
    bias = torch.randn(96, dtype=dtype) if biased else None
    kernel = pack_linear(weight, bias)
    if kernel is not None:  # a CPU without bf16 kernels keeps the plain layer
        torch.testing.assert_close(kernel(x), F.linear(x, weight, bias), atol=tolerance, rtol=tolerance)
    assert dtype == torch.bfloat16 or kernel is not None


def test_weights_that_no_kernel_takes_stay_plain() -> None:
    assert pack_linear(torch.randn(4, 4, dtype=torch.float64), None) is None
    assert pack_linear(torch.empty(0, 4), None) is None
    assert pack_linear(torch.empty(4, 4, device="meta"), None) is None


@pytest.mark.parametrize("bucket_bytes", [1, 2000, 2**20])
def test_decode_buckets_do_not_change_what_rows_attend_to(bucket_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "_BUCKET_BYTES", bucket_bytes)
    lengths, block_size, kv_heads, group, dim = [9, 1, 30, 4, 12, 30, 3], 4, 2, 3, 8
    widths = [-(-length // block_size) for length in lengths]
    blocks = torch.randperm(sum(widths)) + 1
    keys, values = (torch.randn(sum(widths) + 1, block_size, kv_heads, dim) for _ in range(2))
    tables = torch.zeros(len(lengths), max(widths), dtype=torch.int32)
    for row, own in enumerate(blocks.split(widths)):
        tables[row, : len(own)] = own
    last = torch.tensor(lengths) - 1
    slots = tables.gather(1, (last // block_size).unsqueeze(1)).squeeze(1).long() * block_size + last % block_size
    count = len(lengths)
    starts = torch.arange(count + 1, dtype=torch.int32)
    batch = AttentionBatch(slots, tables, last.int() + 1, starts, count, [1] * count, lengths, [(keys, values)])
    query, key, value = (torch.randn(count, heads, dim) for heads in (kv_heads * group, kv_heads, kv_heads))

    backend = TorchAttention()
    output = backend.attend(query, key, value, 0, batch, backend.prepare(batch))

    for row, length in enumerate(lengths):
        flat = [cache[tables[row].long()].flatten(0, 1)[:length] for cache in (keys, values)]
        assert torch.equal(flat[0][-1], key[row])
        assert torch.equal(flat[1][-1], value[row])
        spread = [part.repeat_interleave(group, dim=1).transpose(0, 1) for part in flat]
        expected = F.scaled_dot_product_attention(query[row].unsqueeze(1), *spread).squeeze(1)
        torch.testing.assert_close(output[row], expected, atol=1e-5, rtol=0)


def test_there_is_a_class_for_each_architecture_that_a_config_may_name() -> None:
    assert tuple(MODELS) == SUPPORTED_ARCHITECTURES
