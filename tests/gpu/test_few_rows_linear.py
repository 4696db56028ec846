"""The product of a few rows against fp64 on equal inputs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from nanovllm_dist.workers.kernels.activation import silu_mul
from nanovllm_dist.workers.kernels.few_rows_linear import (
    MAX_ROWS,
    few_rows_gated,
    few_rows_linear,
    max_gated_rows,
    max_rows,
)

# Where the interpreter runs the kernels (TRITON_INTERPRET=1) there is no GPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Half of a dtype's step relative to a number: what one rounding may cost
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# Of the sum of the terms' sizes: what fp32 sums of up to some thousand terms, added up in a tree, may cost
SUM_UNIT = 2.0**-19
# Output and input features: whole tiles, fewer than a tile, odd rows that no wide load can read, a ragged last tile
SHAPES = [(768, 1024), (5, 64), (37, 333), (130, 1), (300, 3072), (1030, 6400)]
ROWS = [1, 2, 3, 4]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def assert_product(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """actual == x @ weight.T but for its rounding and the fp32 sums."""
    exact = x.double() @ weight.double().t()
    sizes = x.double().abs() @ weight.double().abs().t()
    allowed = 1.01 * UNIT[actual.dtype] * exact.abs() + SUM_UNIT * sizes + 2.0**-24
    assert actual.shape == exact.shape
    assert bool(((actual.double() - exact).abs() <= allowed).all())


class TestFewRowsLinear:
    """few_rows_linear(x, weight) -> x @ weight.T"""

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rows", ROWS)
    def test_is_the_product(self, rows: int, shape: tuple[int, int]) -> None:
        x, weight = random(rows, shape[1], dtype=torch.bfloat16), random(*shape, dtype=torch.bfloat16, seed=1)
        assert_product(few_rows_linear(x, weight), x, weight)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    @pytest.mark.parametrize("shape", [(768, 1024), (37, 333), (1030, 6400)])
    def test_is_the_product_in_other_dtypes(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        x, weight = random(2, shape[1], dtype=dtype), random(*shape, dtype=dtype, seed=1)
        assert_product(few_rows_linear(x, weight), x, weight)

    def test_rows_may_be_apart_and_go_to_rows_apart(self) -> None:
        wide, weight = random(3, 1500, dtype=torch.bfloat16), random(300, 1024, dtype=torch.bfloat16, seed=1)
        out = torch.zeros(4, 400, dtype=torch.bfloat16, device=DEVICE)
        result = few_rows_linear(wide[:, 100:1124], weight, out[:3, 50:350])
        assert result.data_ptr() == out[:, 50:].data_ptr()
        assert torch.equal(result, few_rows_linear(wide[:, 100:1124].contiguous(), weight))
        assert not out[:, :50].any()
        assert not out[:, 350:].any()
        assert not out[3].any()

    @pytest.mark.parametrize("shape", [(768, 1024), (1030, 6400)])
    def test_a_row_is_the_same_alone_and_among_others(self, shape: tuple[int, int]) -> None:
        x, weight = random(MAX_ROWS, shape[1], dtype=torch.bfloat16), random(*shape, dtype=torch.bfloat16, seed=1)
        together = few_rows_linear(x, weight)
        for rows in range(1, MAX_ROWS):
            assert torch.equal(few_rows_linear(x[MAX_ROWS - rows :], weight), together[MAX_ROWS - rows :])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("rows", ROWS)
    def test_is_added_to_what_is_there(self, rows: int, dtype: torch.dtype) -> None:
        x, weight = random(rows, 1030, dtype=dtype), random(300, 1030, dtype=dtype, seed=1)
        total = random(rows, 400, dtype=dtype, seed=2) * 50
        before = total.clone()
        few_rows_linear(x, weight, total[:, 50:350], add=True)
        exact = x.double() @ weight.double().t() + before[:, 50:350].double()
        sizes = x.double().abs() @ weight.double().abs().t() + before[:, 50:350].double().abs()
        allowed = 1.01 * UNIT[dtype] * exact.abs() + SUM_UNIT * sizes
        assert bool(((total[:, 50:350].double() - exact).abs() <= allowed).all())
        assert torch.equal(total[:, :50], before[:, :50])
        assert torch.equal(total[:, 350:], before[:, 350:])

    def test_no_rows_and_no_features(self) -> None:
        x, weight = random(2, 64, dtype=torch.float32), random(5, 64, dtype=torch.float32)
        assert few_rows_linear(x[:0], weight).shape == (0, 5)
        assert few_rows_linear(x, weight[:0]).shape == (2, 0)

    def test_what_does_not_fit_is_refused(self) -> None:
        x, weight = random(2, 64, dtype=torch.float32), random(5, 64, dtype=torch.float32)
        with pytest.raises(ValueError, match="x "):
            few_rows_linear(random(MAX_ROWS + 1, 64, dtype=torch.float32), weight)
        with pytest.raises(ValueError, match="x "):
            few_rows_linear(x[:, ::2], weight[:, :32].contiguous())
        with pytest.raises(ValueError, match="x "):
            few_rows_linear(x.double(), weight.double())
        with pytest.raises(ValueError, match="weight "):
            few_rows_linear(x, weight.half())
        with pytest.raises(ValueError, match="weight "):
            few_rows_linear(x[:, :32], weight[:, :32])
        with pytest.raises(ValueError, match="out "):
            few_rows_linear(x, weight, torch.empty(2, 6, device=DEVICE))
        with pytest.raises(ValueError, match="nothing"):
            few_rows_linear(x, weight, add=True)


class TestMaxRows:
    """max_rows(weight): up to how many rows the kernel is the faster one."""

    @pytest.mark.parametrize(("size", "rows"), [(1024, 4), (4096, 4), (5120, 2), (6400, 2), (20480, 2), (20481, 0)])
    def test_is_less_for_longer_rows(self, size: int, rows: int) -> None:
        assert max_rows(torch.empty(8, size, dtype=torch.bfloat16)) == rows

    @pytest.mark.parametrize(("size", "rows"), [(1024, 4), (5120, 2), (10240, 2), (10241, 0)])
    def test_of_gates_ends_where_two_rows_of_the_weight_are_too_many(self, size: int, rows: int) -> None:
        assert max_gated_rows(torch.empty(8, size, dtype=torch.bfloat16)) == rows

    def test_is_none_for_what_the_kernel_refuses(self) -> None:
        assert max_rows(torch.empty(8, 64, dtype=torch.float64)) == 0
        assert max_rows(torch.empty(8, 64, dtype=torch.int8)) == 0
        assert max_rows(torch.empty(64, 8, dtype=torch.bfloat16).t()) == 0


class TestFewRowsGated:
    """few_rows_gated(x, weight) -> silu of the first half of x @ weight.T, times the other half"""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("shape", [(768, 1024), (6, 64), (130, 333), (1030, 6400)])
    @pytest.mark.parametrize("rows", ROWS)
    def test_is_the_activation_of_the_product(self, rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        x = random(rows, shape[1], dtype=dtype)
        weight = random(*shape, dtype=dtype, seed=1) * shape[1] ** -0.5
        expected = silu_mul(few_rows_linear(x, weight))
        torch.testing.assert_close(few_rows_gated(x, weight), expected, rtol=4 * UNIT[dtype], atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("shape", [(768, 1024), (130, 333), (1030, 6400)])
    @pytest.mark.parametrize("rows", ROWS)
    def test_makes_up_for_a_norm_before(self, rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        x = random(rows, shape[1], dtype=dtype) * torch.tensor([9.0, 0.1, 1.0, 30.0], device=DEVICE)[:rows, None].to(
            dtype
        )
        weight = random(*shape, dtype=dtype, seed=1) * shape[1] ** -0.5
        expected = silu_mul(few_rows_linear(x, weight), x, 1e-3)
        torch.testing.assert_close(few_rows_gated(x, weight, 1e-3), expected, rtol=4 * UNIT[dtype], atol=1e-5)

    def test_a_row_is_the_same_alone_and_among_others(self) -> None:
        x, weight = random(MAX_ROWS, 1024, dtype=torch.bfloat16), random(768, 1024, dtype=torch.bfloat16, seed=1) / 32
        together = few_rows_gated(x, weight, 1e-6)
        for rows in range(1, MAX_ROWS):
            assert torch.equal(few_rows_gated(x[MAX_ROWS - rows :], weight, 1e-6), together[MAX_ROWS - rows :])

    def test_an_odd_number_of_features_is_refused(self) -> None:
        x, weight = random(1, 64, dtype=torch.bfloat16), random(5, 64, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="5 features: an odd number"):
            few_rows_gated(x, weight)
        with pytest.raises(ValueError, match="cannot take"):
            few_rows_gated(x.float(), weight[:4])
