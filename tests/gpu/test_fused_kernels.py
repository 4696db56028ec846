"""The fused kernels against the torch modules they stand for, run in fp64 on the same rounded inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from nanovllm_dist.workers.kernels.activation import silu_mul
from nanovllm_dist.workers.kernels.norm import add_rms_norm
from nanovllm_dist.workers.kernels.rope_cache import norm_rope_store

# Where the interpreter runs the kernels (TRITON_INTERPRET=1) there is no GPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKENS = [1, 3, 257]
# Relative to the exact result, per rounding to the dtype: half of its step, and for fp32 what its sums and the
# hardware's exp2 and rsqrt lose
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-19}


@dataclass(frozen=True)
class Heads:
    """Head counts of one rank and the size of a head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def rotated(self) -> int:
        return self.num_heads + self.num_kv_heads

    @property
    def width(self) -> int:
        return (self.rotated + self.num_kv_heads) * self.head_dim


QWEN3_06B = Heads(16, 8, 128)
QWEN3_32B_TP4 = Heads(16, 2, 128)
SMOLLM2 = Heads(9, 3, 64)
SHAPES = [QWEN3_06B, QWEN3_32B_TP4, SMOLLM2, Heads(6, 2, 80), Heads(5, 1, 96)]
MAX_POSITIONS = 4096
BLOCK_SIZE = 16


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def assert_close(actual: torch.Tensor, exact: torch.Tensor, roundings: int, scale: torch.Tensor | float = 1.0) -> None:
    """|actual - exact| <= roundings * unit of the dtype * (|exact| + scale); `scale` is what was added up to it."""
    unit = UNIT[actual.dtype]
    smallest = torch.finfo(actual.dtype).tiny
    error = (actual.double() - exact).abs()
    bound = roundings * unit * (exact.abs() + scale) + smallest
    assert bool((error <= bound).all()), f"worst error is {(error / bound).max().item():.2f} of the bound"


def replay(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a captured graph of `run` leaves behind when it is replayed."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    output.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return output


def inverse_rms(rows: torch.Tensor) -> torch.Tensor:
    """[T, 1] in fp64."""
    return torch.rsqrt(rows.double().pow(2).mean(-1, keepdim=True) + EPS)


class TestAddRmsNorm:
    """normed, total = add_rms_norm(x, residual, weight, eps)"""

    @staticmethod
    def exact(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return total.double() * inverse_rms(total) * weight.double()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("size", [576, 1024, 5120])
    def test_normalises_the_rounded_sum(self, size: int, tokens: int, dtype: torch.dtype) -> None:
        x, residual = random(tokens, size, dtype=dtype), random(tokens, size, dtype=dtype, seed=1, scale=8)
        weight = random(size, dtype=dtype, seed=2)
        expected_total = x + residual
        normed, total = add_rms_norm(x, residual, weight, EPS)
        assert torch.equal(total, expected_total)
        assert total.data_ptr() == residual.data_ptr()
        assert_close(normed, self.exact(expected_total, weight), roundings=2, scale=0.0)

    @pytest.mark.parametrize("size", [1, 100, 16384])
    def test_takes_any_size_of_row(self, size: int) -> None:
        x, weight = random(3, size), random(size, seed=2)
        assert_close(add_rms_norm(x, None, weight, EPS)[0], self.exact(x, weight), roundings=1, scale=0.0)

    def test_without_a_residual_the_total_is_x(self) -> None:
        x, weight = random(3, 1024, dtype=torch.bfloat16), random(1024, dtype=torch.bfloat16, seed=2)
        before = x.clone()
        normed, total = add_rms_norm(x, None, weight, EPS)
        assert total is x
        assert torch.equal(x, before)
        assert_close(normed, self.exact(x, weight), roundings=2, scale=0.0)

    def test_rows_may_be_apart(self) -> None:
        wide, residual = random(5, 4096, dtype=torch.bfloat16), random(5, 1024, dtype=torch.bfloat16, seed=1)
        weight = random(1024, dtype=torch.bfloat16, seed=2)
        x = wide[:, 1024:2048]
        apart = add_rms_norm(x, residual.clone(), weight, EPS)
        together = add_rms_norm(x.contiguous(), residual.clone(), weight, EPS)
        assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True))

    def test_a_row_is_the_same_alone_and_in_a_batch(self) -> None:
        x, residual = random(257, 1024, dtype=torch.bfloat16), random(257, 1024, dtype=torch.bfloat16, seed=1)
        weight = random(1024, dtype=torch.bfloat16, seed=2)
        batch = add_rms_norm(x, residual.clone(), weight, EPS)[0]
        alone = [add_rms_norm(x[i : i + 1], residual[i : i + 1].clone(), weight, EPS)[0] for i in (0, 100, 256)]
        assert torch.equal(torch.cat(alone), batch[[0, 100, 256]])

    def test_no_rows_are_no_work(self) -> None:
        x = random(0, 64)
        assert add_rms_norm(x, x.clone(), random(64), EPS)[0].shape == (0, 64)

    def test_what_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="adjacent"):
            add_rms_norm(random(4, 4).t(), None, random(4), EPS)
        with pytest.raises(ValueError, match="agree"):
            add_rms_norm(random(4, 4), random(4, 5), random(4), EPS)


class TestSiluMul:
    """silu_mul(gate_up)"""

    @staticmethod
    def exact(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.double().chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("size", [1536, 3072, 6400, 37])
    def test_is_silu_of_the_gates_times_the_rest(self, size: int, tokens: int, dtype: torch.dtype) -> None:
        gate_up = random(tokens, 2 * size, dtype=dtype, scale=4)
        assert_close(silu_mul(gate_up), self.exact(gate_up), roundings=2, scale=2.0**-10)

    def test_large_gates_neither_overflow_nor_vanish(self) -> None:
        gate = torch.tensor([[1e4, -1e4, 0.0, 88.0, -88.0]], device=DEVICE)
        output = silu_mul(torch.cat((gate, torch.ones_like(gate)), dim=-1))
        assert_close(output, self.exact(torch.cat((gate, torch.ones_like(gate)), dim=-1)), roundings=1, scale=2.0**-20)

    def test_rows_may_be_apart_and_do_not_depend_on_each_other(self) -> None:
        wide = random(257, 8192, dtype=torch.bfloat16)
        batch = silu_mul(wide[:, :6144])
        alone = torch.cat([silu_mul(wide[i : i + 1, :6144].contiguous()) for i in (0, 100, 256)])
        assert torch.equal(alone, batch[[0, 100, 256]])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize(("size", "width"), [(3072, 1024), (6400, 5120), (37, 100)])
    def test_with_hidden_rows_it_divides_by_their_root_mean_square(
        self, size: int, width: int, tokens: int, dtype: torch.dtype
    ) -> None:
        gate_up, hidden = (
            random(tokens, 2 * size, dtype=dtype, scale=40),
            random(tokens, 2 * width, dtype=dtype, scale=9),
        )
        hidden = hidden[:, :width]
        exact = self.exact(gate_up.double() * inverse_rms(hidden))
        assert_close(silu_mul(gate_up, hidden, EPS), exact, roundings=2, scale=2.0**-10)

    def test_what_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="even"):
            silu_mul(random(2, 5))
        with pytest.raises(ValueError, match="hidden"):
            silu_mul(random(2, 6), random(3, 4), EPS)


class Step(NamedTuple):
    """Inputs of one launch; the cache is full of NaN, so that what was not written shows."""

    qkv: torch.Tensor
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    weight: torch.Tensor | None
    slots: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    def run(self, heads: Heads, out: torch.Tensor | None = None) -> torch.Tensor:
        return norm_rope_store(
            self.qkv,
            self.positions,
            self.cos,
            self.sin,
            self.weight,
            EPS,
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            self.slots,
            self.keys,
            self.values,
            out,
            self.bias,
            self.hidden,
            EPS,
        )

    def rows(self, *chosen: int) -> Step:
        return self._replace(
            qkv=self.qkv[list(chosen)], positions=self.positions[list(chosen)], slots=self.slots[list(chosen)]
        )


def make_step(heads: Heads, tokens: int, dtype: torch.dtype, norm: bool = True, heads_first: bool = True) -> Step:
    """Tokens at random positions and in random slots outside block 0; blocks hold a head's slots together or apart."""
    generator = torch.Generator().manual_seed(3)
    frequencies = 10000.0 ** -(torch.arange(0, heads.head_dim, 2) / heads.head_dim)
    angles = torch.outer(torch.arange(MAX_POSITIONS, dtype=torch.float32), frequencies)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    num_blocks = tokens // BLOCK_SIZE + 5
    slots = torch.randperm((num_blocks - 1) * BLOCK_SIZE, generator=generator)[:tokens] + BLOCK_SIZE
    physical = (num_blocks, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
    caches = [poisoned(*physical, dtype=dtype) for _ in range(2)]
    if heads_first:
        caches = [
            torch.empty_like(cache.transpose(1, 2)).copy_(cache.transpose(1, 2)).transpose(1, 2) for cache in caches
        ]
    return Step(
        random(tokens, heads.width, dtype=dtype),
        torch.randint(MAX_POSITIONS, (tokens,), generator=generator).to(DEVICE),
        cos.to(DEVICE),
        sin.to(DEVICE),
        random(heads.rotated, heads.head_dim, dtype=dtype, seed=4) if norm else None,
        slots.to(DEVICE),
        *caches,
    )


def exact_query_key(heads: Heads, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated queries and keys [T, heads, head_dim] in fp64, and what was added up to each of their elements."""
    wide = step.qkv[:, : heads.rotated * heads.head_dim].double().unflatten(-1, (heads.rotated, heads.head_dim))
    if step.weight is not None:
        wide = wide * inverse_rms(wide) * step.weight.double()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((second, first), dim=-1)
    cos, sin = (table[step.positions].double().unsqueeze(1) for table in (step.cos, step.sin))
    return wide * cos + turned * sin, (wide * cos).abs() + (turned * sin).abs()


class TestNormRopeStore:
    """query = norm_rope_store(qkv, ...), keys and values in the cache"""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("norm", [True, False])
    @pytest.mark.parametrize("heads", SHAPES, ids=str)
    def test_norms_rotates_and_stores(self, heads: Heads, norm: bool, tokens: int, dtype: torch.dtype) -> None:
        step = make_step(heads, tokens, dtype, norm)
        out = poisoned(tokens, heads.num_heads, heads.head_dim, dtype=dtype)
        query = step.run(heads, out)
        assert query is out
        blocks, offsets = step.slots // BLOCK_SIZE, step.slots % BLOCK_SIZE
        rotated = torch.cat((query, step.keys[blocks, offsets]), dim=1)
        exact, scale = exact_query_key(heads, step)
        assert_close(rotated, exact, roundings=3 if norm else 1, scale=scale)
        value = step.qkv[:, heads.rotated * heads.head_dim :].view(tokens, heads.num_kv_heads, heads.head_dim)
        assert torch.equal(step.values[blocks, offsets], value)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("heads", [QWEN3_06B, SMOLLM2, Heads(6, 2, 80)], ids=str)
    def test_with_hidden_rows_it_divides_by_their_root_mean_square(
        self, heads: Heads, bias: bool, tokens: int, dtype: torch.dtype
    ) -> None:
        step = make_step(heads, tokens, dtype, norm=not bias)
        hidden = random(tokens, 900, dtype=dtype, seed=5, scale=7)[:, :576]
        offset = random(heads.width, dtype=dtype, seed=6) if bias else None
        scaled = (step.qkv.float() * inverse_rms(hidden).float() + (0.0 if offset is None else offset.float())).to(
            dtype
        )
        expected = step._replace(qkv=scaled, keys=step.keys.clone(), values=step.values.clone())
        actual = step._replace(hidden=hidden, bias=offset)
        blocks, offsets = step.slots // BLOCK_SIZE, step.slots % BLOCK_SIZE
        pairs = [(actual.run(heads), expected.run(heads))]
        pairs += [(getattr(actual, part)[blocks, offsets], getattr(expected, part)[blocks, offsets])
                  for part in ("keys", "values")]  # fmt: skip
        for mine, theirs in pairs:
            assert_close(mine, theirs.double(), roundings=4, scale=theirs.double().abs().amax(-1, keepdim=True))

    @pytest.mark.parametrize("heads_first", [True, False])
    def test_writes_the_named_slots_and_no_others(self, heads_first: bool) -> None:
        step = make_step(QWEN3_06B, 257, torch.bfloat16, heads_first=heads_first)
        step.run(QWEN3_06B)
        for cache in (step.keys, step.values):
            written = ~cache.isnan().all(-1).all(-1).flatten()
            assert torch.equal(written.nonzero().flatten(), step.slots.sort().values)
            assert int((~cache.isnan()).sum()) == 257 * QWEN3_06B.num_kv_heads * QWEN3_06B.head_dim

    def test_padding_goes_to_block_0_and_harms_nobody(self) -> None:
        step = make_step(QWEN3_06B, 8, torch.bfloat16)
        step.slots[3:] = 0
        step.positions[3:] = 0
        padded = step.run(QWEN3_06B)
        stored = step.keys.clone()
        step.keys.fill_(float("nan"))
        assert torch.equal(step.rows(0, 1, 2).run(QWEN3_06B), padded[:3])
        assert torch.equal(stored[1:].nan_to_num(-1.0), step.keys[1:].nan_to_num(-1.0))

    def test_a_row_is_the_same_alone_and_in_a_batch(self) -> None:
        step = make_step(QWEN3_06B, 257, torch.bfloat16)
        batch = step.run(QWEN3_06B)
        keys = step.keys.clone()
        step.keys.fill_(float("nan"))
        for row in (0, 100, 256):
            assert torch.equal(step.rows(row).run(QWEN3_06B)[0], batch[row])
            block, offset = divmod(int(step.slots[row]), BLOCK_SIZE)
            assert torch.equal(step.keys[block, offset], keys[block, offset])

    def test_indices_may_be_32_bits_wide_and_rows_apart(self) -> None:
        step = make_step(QWEN3_06B, 33, torch.bfloat16)
        expected = step.run(QWEN3_06B)
        wide = random(33, QWEN3_06B.width + 512, dtype=torch.bfloat16, seed=9)
        wide[:, : QWEN3_06B.width] = step.qkv
        narrow = step._replace(qkv=wide[:, : QWEN3_06B.width], slots=step.slots.int(), positions=step.positions.int())
        assert torch.equal(narrow.run(QWEN3_06B), expected)

    def test_what_does_not_fit_is_refused(self) -> None:
        step = make_step(QWEN3_06B, 3, torch.bfloat16)
        with pytest.raises(ValueError, match="qkv"):
            step.run(SMOLLM2)
        with pytest.raises(ValueError, match="cache"):
            step._replace(keys=step.keys.float()).run(QWEN3_06B)
        with pytest.raises(ValueError, match="table"):
            step._replace(cos=step.cos.half()).run(QWEN3_06B)
        with pytest.raises(ValueError, match="hidden"):
            step._replace(hidden=step.qkv[:2]).run(QWEN3_06B)
        with pytest.raises(ValueError, match="bias"):
            step._replace(bias=step.qkv[0]).run(QWEN3_06B)


class TestGraphs:
    """A replayed graph gives what the same calls give eagerly."""

    @pytest.mark.parametrize("tokens", [1, 256])
    def test_norm(self, tokens: int) -> None:
        x, weight = random(tokens, 1024, dtype=torch.bfloat16), random(1024, dtype=torch.bfloat16, seed=2)
        assert torch.equal(replay(lambda: add_rms_norm(x, None, weight, EPS)[0]), add_rms_norm(x, None, weight, EPS)[0])

    @pytest.mark.parametrize("tokens", [1, 256])
    def test_activation(self, tokens: int) -> None:
        gate_up = random(tokens, 6144, dtype=torch.bfloat16)
        assert torch.equal(replay(lambda: silu_mul(gate_up)), silu_mul(gate_up))

    @pytest.mark.parametrize("tokens", [1, 256])
    def test_rotation_with_new_inputs_of_the_same_place(self, tokens: int) -> None:
        step = make_step(QWEN3_06B, tokens, torch.bfloat16)
        run = partial(step.run, QWEN3_06B)
        first = replay(run)
        assert torch.equal(first, run())
        step.positions.copy_((step.positions + 1) % MAX_POSITIONS)
        assert not torch.equal(first, run())
