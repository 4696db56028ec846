"""Weights of int8 on the CPU: what they are rounded to, and that products over them are exact but for few roundings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanovllm_dist.errors import WeightsError
from nanovllm_dist.workers.platform import cpu_kernels
from nanovllm_dist.workers.platform.cpu_attention import CpuAttention
from nanovllm_dist.workers.platform.cpu_int8 import RoundedLinear, RoundingTorchLayers, round_weight, to_panels
from nanovllm_dist.workers.platform.cpu_layers import CpuLayers, PanelLinear, cpu_layers

BF16 = torch.bfloat16
# Processors that lack what the fastest code uses; the last multiplies no bfloat16, and leaves that to torch
PROCESSORS = {"this": [], "no_byte_tables": ["-mno-avx512vbmi"], "no_products": ["-mno-avx512bf16"]}


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(BF16)


@pytest.fixture(scope="module", params=PROCESSORS)
def layers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CpuLayers:
    """Kernels built for each of the processors."""
    with pytest.MonkeyPatch.context() as patch:
        if flags := PROCESSORS[request.param]:
            patch.setattr(cpu_kernels, "_COMPILE", (*cpu_kernels._COMPILE, *flags))
            patch.setenv("NANOVLLM_CACHE", str(tmp_path_factory.mktemp(request.param)))
        cpu_kernels.kernel_library.cache_clear()
        library = cpu_kernels.kernel_library()
    cpu_kernels.kernel_library.cache_clear()
    assert library is not None, "this machine has a C compiler, and the kernels were not built with it"
    return CpuLayers(CpuAttention(64, BF16), library, int8=True)


def check_product(
    kernel: Callable[..., torch.Tensor] | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    roundings: int,
) -> None:
    """Against float64 over the same rounded weights: 2**-8 of the result for each rounding to bfloat16, and 2**-24 of
    the sum of magnitudes for each input."""
    assert kernel is not None
    values, scales = round_weight(weight)
    rounded = values.double() * scales.double().unsqueeze(1)
    x = random(rows, weight.shape[1], seed=2)
    added = torch.zeros(len(weight)).double() if bias is None else bias.double()
    product = x.double() @ rounded.t()
    magnitude = x.double().abs() @ rounded.abs().t() + added.abs()
    bound = roundings * 2**-8 * torch.maximum(product.abs(), (product + added).abs())
    bound += weight.shape[1] * 2**-24 * magnitude + 1e-30
    result = kernel(x)
    assert result.dtype == BF16
    assert ((result.double() - product - added).abs() <= bound).all()
    out = torch.empty(rows, len(weight), dtype=BF16)
    assert kernel(x, out) is out
    assert torch.equal(out, result)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 2), (96, 64), (160, 66), (576, 1536), (352, 202)])
def test_a_product_is_as_exact_as_bfloat16_allows(
    layers: CpuLayers, outputs: int, inputs: int, bias: bool, request: pytest.FixtureRequest
) -> None:
    weight, added = random(outputs, inputs), random(outputs, seed=1) if bias else None
    kernel = layers.pack_linear(weight, added)
    by_torch = "no_products" in request.node.callspec.id
    assert isinstance(kernel, RoundedLinear if by_torch else PanelLinear)
    for rows in [*range(1, 20), 23, 24, 25, 64, 70, 131]:
        check_product(kernel, weight, added, rows, 2 if by_torch else 1)


@pytest.mark.parametrize(("outputs", "inputs"), [(100, 72), (64, 71), (1, 1)])
def test_a_weight_that_does_not_fit_the_kernel_is_rounded_for_torch(
    layers: CpuLayers, outputs: int, inputs: int
) -> None:
    weight, bias = random(outputs, inputs), random(outputs, seed=1)
    kernel = layers.pack_linear(weight, bias)
    assert isinstance(kernel, RoundedLinear)
    for rows in (1, 17):
        check_product(kernel, weight, bias, rows, 2)


def test_a_rank_without_outputs_has_no_kernel(layers: CpuLayers) -> None:
    assert layers.pack_linear(torch.empty(0, 64, dtype=BF16), None) is None


def test_every_int8_is_widened_to_itself(layers: CpuLayers) -> None:
    """Each value meets an input of one, alone in its row: what comes out is its magnitude times its scale of 1."""
    weight = torch.zeros(256, 64)
    weight[:, 0] = 127.0  # the scale is 1
    weight[:, 1] = torch.arange(-128, 128).clamp(-127, 127)
    kernel = layers.pack_linear(weight.to(BF16), None)
    assert kernel is not None
    for rows in (1, 5, 40):
        x = torch.zeros(rows, 64, dtype=BF16)
        x[:, 1] = 1.0
        assert torch.equal(kernel(x), weight[:, 1].to(BF16).expand(rows, 256))


@pytest.mark.parametrize("rows", [1, 30])
def test_outputs_of_zero_weights_are_zero(layers: CpuLayers, rows: int) -> None:
    weight = random(64, 64)
    weight[3] = 0.0
    kernel = layers.pack_linear(weight, None)
    assert kernel is not None
    assert (kernel(random(rows, 64, seed=3))[:, 3] == 0.0).all()


def test_a_step_of_rounding_is_the_largest_of_its_output_over_127() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [-4.0, 4.0, 2.0, 0.0, 1.0], [0.0] * 5], dtype=BF16)
    values, scales = round_weight(weight)
    assert values.tolist() == [[127, 0, 2, -2, -127], [-127, 127, 64, 0, 32], [0] * 5]
    assert torch.equal(scales, torch.tensor([1.0, 4 / 127, 1.0]))


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1.0, 1e20, 3e38])
def test_rounding_moves_a_weight_by_half_a_step_and_saturates_at_127(scale: float) -> None:
    weight = (torch.rand(70, 5000, generator=torch.Generator().manual_seed(0)) * 2 - 1).mul(scale).to(BF16)
    values, scales = round_weight(weight)
    step = scales.double().unsqueeze(1)
    slack = 0.501 if scale > 1e-38 else 0.6  # a scale below what float32 has normal values for is itself inexact
    assert ((values.double() * step - weight.double()).abs() <= slack * step).all()
    assert (values.abs().amax(1) == 127).all()
    assert values.min() >= -127


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = random(64, 64)
    weight[7, 9] = value
    with pytest.raises(WeightsError, match=r"\[64, 64\] holds NaN or infinity.*weight_format=plain"):
        cpu_layers(CpuAttention(64, BF16), BF16, int8=True).pack_linear(weight, None)


def test_panels_hold_every_value_once_and_zeros_behind() -> None:
    values = torch.randint(-127, 128, (96, 34), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    panels = to_panels(values)
    assert panels.shape == (2, 32, 64, 2)
    whole = panels.transpose(1, 2).reshape(128, 64)
    assert torch.equal(whole[:96, :34], values)
    assert not whole[96:].any()
    assert not whole[:, 34:].any()


def test_without_a_compiler_torch_multiplies_the_same_integers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    cpu_kernels.kernel_library.cache_clear()
    try:
        layers = cpu_layers(CpuAttention(64, BF16), BF16, int8=True)
    finally:
        cpu_kernels.kernel_library.cache_clear()
    assert isinstance(layers, RoundingTorchLayers)
    weight, bias = random(96, 64), random(96, seed=1)
    check_product(layers.pack_linear(weight, bias), weight, bias, 5, 2)
    assert layers.pack_linear(torch.empty(0, 64, dtype=BF16), None) is None
