"""The C kernels of a layer, alone and fused into a step, give what torch's operators give in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm_dist.models.config import read_model_config
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.decoder import DecoderLM
from nanovllm_dist.models.layers.kernels import LayerKernels, TorchLayers
from nanovllm_dist.models.layers.norm import QueryKeyNorm
from nanovllm_dist.models.layers.rotary import RotaryEmbedding
from nanovllm_dist.models.layers.torch_attention import TorchAttention
from nanovllm_dist.models.loader import dummy_weights
from nanovllm_dist.models.parallel import SingleRank
from nanovllm_dist.models.registry import build_model
from nanovllm_dist.workers.platform import cpu_kernels
from nanovllm_dist.workers.platform.cpu_attention import CpuAttention
from nanovllm_dist.workers.platform.cpu_layers import CpuLayers, PanelLinear, cpu_layers
from nanovllm_dist.workers.platform.cpu_step import FEW_ROWS, fuse_step

BF16, CPU = torch.bfloat16, torch.device("cpu")
SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen2": {**SHAPE, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {**SHAPE, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128},
    "one_kv_head": {**SHAPE, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 1},
}
BLOCK_SIZE = 16


def native(head_dim: int = 64, int8: bool = False) -> CpuLayers:
    layers = cpu_layers(CpuAttention(head_dim, BF16), BF16, int8)
    assert isinstance(layers, CpuLayers), "this machine has a C compiler, and the kernels were not built with it"
    return layers


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(BF16)


def make_model(name: str, directory: Path, kernels: LayerKernels, dtype: torch.dtype = BF16) -> DecoderLM:
    (directory / "config.json").write_text(json.dumps(MODELS[name]))
    model = build_model(read_model_config(directory), SingleRank(), kernels, dtype, CPU)
    dummy_weights(model, 3)
    if dtype == torch.float32:  # what the others have
        for parameter in model.parameters():
            parameter.copy_(parameter.to(BF16))
    model.finalize()
    return model


def decodes(model: DecoderLM, lengths: list[int], dtype: torch.dtype = BF16) -> AttentionBatch:
    """One token for each row, at the end of a context whose keys and values are random."""
    blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    order = (torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(5)) + 1).tolist()
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for row, count in enumerate(blocks):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    last = torch.tensor(lengths) - 1
    slots = tables[torch.arange(len(lengths)), last // BLOCK_SIZE].long() * BLOCK_SIZE + last % BLOCK_SIZE
    shape = (sum(blocks) + 1, BLOCK_SIZE, model.kv_heads, model.head_dim)
    caches = [tuple(random(*shape, seed=2 * layer + part).to(dtype) for part in (0, 1)) for layer in range(3)]
    return AttentionBatch(
        slot_mapping=slots,
        block_tables=tables,
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        query_start=torch.arange(len(lengths) + 1, dtype=torch.int32),
        num_decodes=len(lengths),
        host_query_lens=[1] * len(lengths),
        host_context_lens=lengths,
        kv_caches=[(keys, values) for keys, values in caches],
    )


def run(model: DecoderLM, batch: AttentionBatch) -> torch.Tensor:
    ids = torch.arange(len(batch.host_context_lens)) + 7
    with torch.inference_mode():
        return model(ids, (batch.context_lens - 1).long(), batch)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_residual_and_norm_equal_torch_to_the_last_bit(rows: int) -> None:
    x, residual, weight = random(rows, 576), random(rows, 576, seed=1), random(576, seed=2)
    expected = TorchLayers(TorchAttention()).add_rms_norm(x, residual.clone(), weight, 1e-5)
    assert all(map(torch.equal, native().add_rms_norm(x, residual.clone(), weight, 1e-5), expected))
    first, total = native().add_rms_norm(x, None, weight, 1e-5)
    assert torch.equal(first, TorchLayers(TorchAttention()).add_rms_norm(x, None, weight, 1e-5)[0])
    assert torch.equal(total, x)


@pytest.mark.parametrize("rows", [1, 70])
def test_the_activation_is_within_its_two_roundings_of_torch(rows: int) -> None:
    gate_up = random(rows, 2 * 352, scale=4.0)
    expected = TorchLayers(TorchAttention()).silu_mul(gate_up)
    torch.testing.assert_close(native().silu_mul(gate_up), expected, rtol=2**-6, atol=1e-30)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (576, 1536), (160, 66), (3072, 576)])
@pytest.mark.parametrize("rows", [*range(1, 8), 64, 131])
def test_a_product_is_as_exact_as_bfloat16_allows(rows: int, outputs: int, inputs: int, bias: bool) -> None:
    weight, added = random(outputs, inputs), random(outputs, seed=1) if bias else None
    kernel = native().pack_linear(weight, added)
    assert isinstance(kernel, PanelLinear), "oneDNN's layout on this machine is not the known one"
    x = random(rows, inputs, seed=2)
    exact = x.double() @ weight.double().t() + (0.0 if added is None else added.double())
    torch.testing.assert_close(kernel(x).double(), exact, rtol=2**-8, atol=1e-3)
    out = torch.empty(rows, outputs, dtype=BF16)
    assert torch.equal(kernel(x, out), kernel(x))


def test_a_weight_that_does_not_fit_the_kernel_stays_with_onednn() -> None:
    kernel = native().pack_linear(random(100, 72), None)
    assert kernel is not None
    assert not isinstance(kernel, PanelLinear)
    assert kernel(random(2, 72)).shape == (2, 100)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
def test_a_step_with_a_prefill_equals_torch(qk_norm: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llama"]))
    rotary = RotaryEmbedding(read_model_config(tmp_path), CPU)
    norm = QueryKeyNorm("x", 6, 2, 64, 1e-5, BF16, CPU) if qk_norm else None
    if norm is not None:
        norm.weight.copy_(random(8, 64, seed=9))
    outputs = []
    for kernels in (native(), TorchLayers(TorchAttention())):
        caches = [(torch.zeros(4, BLOCK_SIZE, 2, 64, dtype=BF16), torch.zeros(4, BLOCK_SIZE, 2, 64, dtype=BF16))]
        tables = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
        slots = torch.tensor([3 * BLOCK_SIZE, *range(BLOCK_SIZE, BLOCK_SIZE + 20)])
        lengths = torch.tensor([1, 20], dtype=torch.int32)
        start = torch.tensor([0, 1, 21], dtype=torch.int32)
        batch = AttentionBatch(slots, tables, lengths, start, 1, [1, 20], [1, 20], caches)
        plan = kernels.prepare(batch, torch.tensor([0, *range(20)]), rotary)
        outputs.append((kernels.attend(random(21, 10 * 64), 6, 2, norm, 0, batch, plan), *caches[0]))
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "lengths", [[1], [40], [33, 1], [16, 17, 100], [5, 300, 64, 31], [9, 8, 7, 6, 5, 4, 3, 2]], ids=str
)
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_a_fused_step_is_the_same_as_its_operations(name: str, lengths: list[int], int8: bool, tmp_path: Path) -> None:
    model = make_model(name, tmp_path, native(MODELS[name]["head_dim"], int8))
    apart, fused = decodes(model, lengths), decodes(model, lengths)
    expected = run(model, apart)
    model.fused = fuse_step(model, SingleRank(), BF16)
    assert model.fused is not None
    assert model.fused.takes(fused)
    assert torch.equal(run(model, fused), expected)
    for ours, theirs in zip(fused.kv_caches, apart.kv_caches, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_step_is_no_further_from_float32_than_torch_in_bfloat16(name: str, tmp_path: Path) -> None:
    lengths = [70, 200]
    model = make_model(name, tmp_path, native(MODELS[name]["head_dim"]))
    model.fused = fuse_step(model, SingleRank(), BF16)
    plain = make_model(name, tmp_path, TorchLayers(TorchAttention()))
    exact = make_model(name, tmp_path, TorchLayers(TorchAttention()), torch.float32)
    ours, theirs = run(model, decodes(model, lengths)), run(plain, decodes(plain, lengths))
    reference = run(exact, decodes(exact, lengths, torch.float32))
    assert (ours - reference).norm() < 1.5 * (theirs - reference).norm()
    assert (theirs - reference).norm() < 0.1 * reference.norm()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_row_of_a_fused_step_reads_what_another_row_writes_in_it(two_threads: None, tmp_path: Path) -> None:
    """The same prompt twice: one row computes its last token, the other has found it in the cache and runs it again."""
    model = make_model("one_kv_head", tmp_path, native())
    batch = decodes(model, [8, 8])
    batch.block_tables[1] = batch.block_tables[0]
    batch.slot_mapping[1] = 0
    position = torch.tensor([7, 7])
    model.fused = fuse_step(model, SingleRank(), BF16)
    written = int(batch.slot_mapping[0])
    for _ in range(300):
        for keys, values in batch.kv_caches:
            keys.view(-1, 1, 64)[written] = values.view(-1, 1, 64)[written] = 100
        first, second = model.forward(torch.tensor([5, 5]), position, batch)
        assert torch.equal(first, second)


def mixed(model: DecoderLM, prefills: list[tuple[int, int]], lengths: list[int]) -> AttentionBatch:
    """Decodes of these lengths, then prefill rows of (tokens, keys before them)."""
    batch = decodes(model, [*lengths, *(new + old for new, old in prefills)])
    counts = [*(1 for _ in lengths), *(new for new, _old in prefills)]
    slots = []
    for row, (count, length) in enumerate(zip(counts, batch.host_context_lens, strict=True)):
        places = torch.arange(length - count, length)
        slots.append(batch.block_tables[row, places // BLOCK_SIZE].long() * BLOCK_SIZE + places % BLOCK_SIZE)
    batch.slot_mapping = torch.cat(slots)
    batch.query_start = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    batch.num_decodes, batch.host_query_lens = len(lengths), counts
    return batch


def run_mixed(model: DecoderLM, batch: AttentionBatch) -> torch.Tensor:
    rows = zip(batch.host_query_lens, batch.host_context_lens, strict=True)
    positions = torch.cat([torch.arange(length - count, length) for count, length in rows])
    with torch.inference_mode():
        return model(torch.arange(len(positions)) % 250, positions, batch)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("prefills", "lengths"),
    [([], [30] * (FEW_ROWS + 1)), ([(1, 0)], []), ([(300, 0), (7, 90)], []), ([(200, 20), (61, 0), (2, 5)], [9, 77])],
    ids=["decodes", "one_token", "prefills", "mixed"],
)
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_a_fused_step_of_any_rows_is_the_same_as_its_operations(
    name: str, prefills: list[tuple[int, int]], lengths: list[int], int8: bool, tmp_path: Path
) -> None:
    model = make_model(name, tmp_path, native(MODELS[name]["head_dim"], int8))
    apart, fused = mixed(model, prefills, lengths), mixed(model, prefills, lengths)
    expected = run_mixed(model, apart)
    model.fused = fuse_step(model, SingleRank(), BF16)
    assert model.fused is not None
    for _again in range(2):  # what a step leaves in its workspace is nothing to the next
        assert torch.equal(run_mixed(model, fused), expected)
    for ours, theirs in zip(fused.kv_caches, apart.kv_caches, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("change", [{"attention_bias": True}, {"mlp_bias": True}, {"intermediate_size": 200}], ids=str)
def test_layers_of_another_kind_are_not_fused(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MODELS["llama"], **change}))
    model = build_model(read_model_config(tmp_path), SingleRank(), native(), BF16, CPU)
    dummy_weights(model, 3)
    model.finalize()
    assert fuse_step(model, SingleRank(), BF16) is None


def test_without_a_compiler_torch_does_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    cpu_kernels.kernel_library.cache_clear()
    try:
        assert type(cpu_layers(CpuAttention(64, BF16), BF16)) is TorchLayers
    finally:
        cpu_kernels.kernel_library.cache_clear()


def test_code_is_not_loaded_from_where_others_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o770)
    cpu_kernels.kernel_library.cache_clear()
    try:
        assert cpu_kernels.kernel_library() is None
    finally:
        cpu_kernels.kernel_library.cache_clear()
    assert "code is not loaded from it" in caplog.text
