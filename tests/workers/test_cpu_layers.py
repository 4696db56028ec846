"""The C kernels of a layer, alone and fused into a step, give what torch's operators give in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_steps import BF16, BLOCK_SIZE, CPU, MODELS, decodes, make_model, mixed, native, random, run, run_mixed

from nanovllm_dist.models.config import read_model_config
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.kernels import TorchLayers
from nanovllm_dist.models.layers.norm import QueryKeyNorm
from nanovllm_dist.models.layers.rotary import RotaryEmbedding
from nanovllm_dist.models.layers.torch_attention import TorchAttention
from nanovllm_dist.models.loader import dummy_weights
from nanovllm_dist.models.parallel import SingleRank
from nanovllm_dist.models.registry import build_model
from nanovllm_dist.workers.platform import cpu_kernels
from nanovllm_dist.workers.platform.cpu_attention import CpuAttention
from nanovllm_dist.workers.platform.cpu_layers import PanelLinear, cpu_layers
from nanovllm_dist.workers.platform.cpu_step import FEW_ROWS, fuse_step


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
