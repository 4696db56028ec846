"""The product of a few rows against fp64 on equal inputs, and kernels that start before the last one ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from nanovllm_dist.workers.kernels import dependent_launch
from nanovllm_dist.workers.kernels.activation import silu_mul
from nanovllm_dist.workers.kernels.few_rows_linear import MAX_ROWS, few_rows_linear, max_rows
from nanovllm_dist.workers.kernels.norm import add_rms_norm

# Where the interpreter runs the kernels (TRITON_INTERPRET=1) there is no GPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
# Half of a dtype's step relative to a number: what one rounding may cost
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# Of the sum of the terms' sizes: what fp32 sums of up to some thousand terms, added up in a tree, may cost
SUM_UNIT = 2.0**-19
# Output and input features: whole tiles, fewer than a tile, odd rows that no wide load can read, a ragged last tile
SHAPES = [(768, 1024), (5, 64), (37, 333), (130, 1), (300, 3072), (1030, 6400)]
ROWS = [1, 2, 3, 4]

needs_graphs = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


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


class TestMaxRows:
    """max_rows(weight): up to how many rows the kernel is the faster one."""

    @pytest.mark.parametrize(("size", "rows"), [(1024, 4), (4096, 4), (5120, 2), (6400, 2), (20480, 2), (20481, 0)])
    def test_is_less_for_longer_rows(self, size: int, rows: int) -> None:
        assert max_rows(torch.empty(8, size, dtype=torch.bfloat16)) == rows

    def test_is_none_for_what_the_kernel_refuses(self) -> None:
        assert max_rows(torch.empty(8, 64, dtype=torch.float64)) == 0
        assert max_rows(torch.empty(8, 64, dtype=torch.int8)) == 0
        assert max_rows(torch.empty(64, 8, dtype=torch.bfloat16).t()) == 0


@needs_graphs
class TestDependentLaunch:
    """A kernel that starts before the last has ended sees all that was written, and overwrites nothing still in use."""

    LAYERS, HIDDEN, INTERMEDIATE = 200, 1024, 1536

    def chain(self, rows: int) -> Callable[[], torch.Tensor]:
        """200 layers whose intermediate tensors are freed, and their memory reused, as soon as they were read."""
        scale = self.HIDDEN**-0.5
        up = [random(2 * self.INTERMEDIATE, self.HIDDEN, dtype=torch.bfloat16, seed=i) * scale for i in range(5)]
        down = [random(self.HIDDEN, self.INTERMEDIATE, dtype=torch.bfloat16, seed=9 + i) * scale for i in range(3)]
        norm_weight, start = random(self.HIDDEN, dtype=torch.bfloat16), random(rows, self.HIDDEN, dtype=torch.bfloat16)
        torch.cuda.synchronize()

        def run() -> torch.Tensor:
            x, residual = start.clone(), start.clone()
            for layer in range(self.LAYERS):
                normed, residual = add_rms_norm(x, residual, norm_weight, EPS)
                gate_up = few_rows_linear(normed, up[layer % 5])
                # Now and then a kernel that takes no part
                linear = F.linear if layer % 7 == 0 else few_rows_linear
                x = linear(silu_mul(gate_up), down[layer % 3])
            return torch.cat((x, residual))

        return run

    @pytest.mark.parametrize("rows", [1, MAX_ROWS])
    def test_gives_the_same_bits_as_waiting_for_each_kernel(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        run = self.chain(rows)
        monkeypatch.setattr(dependent_launch, "ENABLED", False)
        expected = run()
        assert expected.isfinite().all()
        monkeypatch.setattr(dependent_launch, "ENABLED", True)
        for _ in range(3):
            assert torch.equal(run(), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()
        for _ in range(20):
            output.fill_(float("nan"))
            graph.replay()
            assert torch.equal(output, expected)

    def test_a_slow_kernel_before_is_waited_for(self) -> None:
        x, weight = random(1, 1024, dtype=torch.bfloat16), random(768, 1024, dtype=torch.bfloat16, seed=1)
        expected = few_rows_linear(x, weight)
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        assert torch.equal(few_rows_linear(late, weight), expected)
