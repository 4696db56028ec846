"""The stand-in's operators compute what torch_npu's documentation says they do, against plain torch in fp32."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.npu

BLOCK = 16


@pytest.fixture(autouse=True)
def operators_on_cpu() -> None:
    from standin import operators

    operators.install()
    torch.manual_seed(0)


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor:
    """query [N, S, D], key and value [heads, T, D]; the last query sees all keys."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    size, held = query.shape[1], key.shape[1]
    mask = torch.ones(size, held, dtype=torch.bool).tril(held - size) if causal else None
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


class PagedCase:
    """Sequences of given lengths whose keys lie in shuffled blocks."""

    def __init__(self, query_lengths: list[int], lengths: list[int], heads: int, kv_heads: int, dim: int) -> None:
        self.query_lengths, self.lengths, self.heads, self.kv_heads, self.dim = (
            query_lengths,
            lengths,
            heads,
            kv_heads,
            dim,
        )
        self.queries = [torch.randn(heads, size, dim) for size in query_lengths]
        self.keys = [torch.randn(kv_heads, length, dim) for length in lengths]
        self.values = [torch.randn(kv_heads, length, dim) for length in lengths]
        needed = [-(-length // BLOCK) for length in lengths]
        blocks = (torch.randperm(sum(needed)) + 1).tolist()
        self.table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
        self.key_cache, self.value_cache = (torch.full((sum(needed) + 1, kv_heads, BLOCK, dim), 9.0) for _ in range(2))
        for row, (count, length) in enumerate(zip(needed, lengths, strict=True)):
            own = [blocks.pop() for _ in range(count)]
            self.table[row, :count] = torch.tensor(own)
            for position in range(length):
                place = own[position // BLOCK], slice(None), position % BLOCK
                self.key_cache[place] = self.keys[row][:, position]
                self.value_cache[place] = self.values[row][:, position]

    def options(self, layout: str, causal: bool) -> dict[str, object]:
        options: dict[str, object] = {
            "block_table": self.table,
            "actual_seq_lengths_kv": self.lengths,
            "num_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "scale": self.dim**-0.5,
            "block_size": BLOCK,
            "input_layout": layout,
        }
        if causal:
            options["atten_mask"] = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
            options["sparse_mode"] = 3
        return options

    def flat(self, cache: torch.Tensor) -> torch.Tensor:
        """The [blocks, block size, heads * D] form of a cache."""
        return cache.transpose(1, 2).flatten(2)

    def expected(self, causal: bool) -> list[torch.Tensor]:
        rows = zip(self.queries, self.keys, self.values, strict=True)
        return [plain_attention(q, k, v, self.dim**-0.5, causal) for q, k, v in rows]


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD"])
@pytest.mark.parametrize("form", ["flat", "heads first"])
def test_decodes_see_their_own_keys_wherever_the_blocks_lie(layout: str, form: str) -> None:
    case = PagedCase([1, 1, 1], [5, 16, 33], heads=4, kv_heads=2, dim=8)
    query = torch.stack(case.queries)
    query = {"BNSD": query, "BSND": query.transpose(1, 2), "BSH": query.transpose(1, 2).flatten(2)}[layout]
    caches = (
        [case.key_cache, case.value_cache]
        if form == "heads first"
        else [case.flat(case.key_cache), case.flat(case.value_cache)]
    )

    got, _ = torch.ops.npu.npu_fused_infer_attention_score(query, *caches, **case.options(layout, causal=False))

    want = torch.stack(case.expected(causal=False))
    want = {"BNSD": want, "BSND": want.transpose(1, 2), "BSH": want.transpose(1, 2).flatten(2)}[layout]
    torch.testing.assert_close(got, want)


def test_packed_rows_are_told_apart_by_cumulative_lengths_and_are_causal_from_the_right() -> None:
    case = PagedCase([3, 1, 7], [3, 20, 18], heads=4, kv_heads=1, dim=16)
    query = torch.cat([q.transpose(0, 1) for q in case.queries])
    options = case.options("TND", causal=True) | {"actual_seq_lengths": list(itertools.accumulate(case.query_lengths))}

    got, _ = torch.ops.npu.npu_fused_infer_attention_score(query, case.key_cache, case.value_cache, **options)

    torch.testing.assert_close(got, torch.cat([part.transpose(0, 1) for part in case.expected(causal=True)]))


def test_one_prefill_row_is_causal_and_its_padding_is_zero() -> None:
    case = PagedCase([5], [21], heads=2, kv_heads=2, dim=8)
    query = F.pad(case.queries[0], (0, 0, 0, 3)).unsqueeze(0)
    options = case.options("BNSD", causal=True) | {"actual_seq_lengths": [5]}

    got, _ = torch.ops.npu.npu_fused_infer_attention_score(query, case.key_cache, case.value_cache, **options)

    torch.testing.assert_close(got[0, :, :5], case.expected(causal=True)[0])
    assert got[0, :, 5:].eq(0).all()


def test_without_a_table_keys_come_in_the_querys_layout() -> None:
    query, key, value = torch.randn(2, 3, 4 * 8), torch.randn(2, 9, 2 * 8), torch.randn(2, 9, 2 * 8)

    got, _ = torch.ops.npu.npu_fused_infer_attention_score(
        query,
        key,
        value,
        num_heads=4,
        num_key_value_heads=2,
        scale=0.3,
        input_layout="BSH",
        actual_seq_lengths_kv=[9, 4],
    )

    for row, length in enumerate([9, 4]):
        q, k, v = (t[row].unflatten(-1, (-1, 8)).transpose(0, 1) for t in (query, key[:, :length], value[:, :length]))
        want = plain_attention(q, k, v, 0.3, causal=False)
        torch.testing.assert_close(got[row], want.transpose(0, 1).flatten(1))


def test_the_second_version_and_the_given_output_agree_with_the_first() -> None:
    case = PagedCase([1, 1], [7, 30], heads=4, kv_heads=2, dim=8)
    query, options = torch.stack(case.queries), case.options("BNSD", causal=False)
    ops = torch.ops.npu
    want, lse = ops.npu_fused_infer_attention_score(
        query, case.key_cache, case.value_cache, softmax_lse_flag=True, **options
    )
    names = {"num_heads": "num_query_heads", "scale": "softmax_scale", "actual_seq_lengths_kv": "actual_seq_kvlen"}

    second, _ = ops.npu_fused_infer_attention_score_v2(
        query, case.key_cache, case.value_cache, **{names.get(name, name): value for name, value in options.items()}
    )
    out = [torch.empty_like(want), torch.empty_like(lse)]
    space = ops._npu_fused_infer_attention_score_get_max_workspace(query, case.key_cache, case.value_cache, **options)
    ops.npu_fused_infer_attention_score.out(
        query, case.key_cache, case.value_cache, softmax_lse_flag=True, workspace=space, out=out, **options
    )

    torch.testing.assert_close(second, want)
    torch.testing.assert_close(out[0], want)
    torch.testing.assert_close(out[1], lse)
    scores = torch.einsum("hd,htd->ht", case.queries[0][:, 0], case.keys[0].repeat_interleave(2, 0)) * 8**-0.5
    torch.testing.assert_close(lse[0, :, 0, 0], scores.logsumexp(-1))


def test_a_block_table_that_holds_too_little_or_names_no_block_is_refused() -> None:
    case = PagedCase([1], [20], heads=1, kv_heads=1, dim=8)
    options = case.options("BNSD", causal=False)
    query = torch.stack(case.queries)

    with pytest.raises(IndexError, match="block table"):
        torch.ops.npu.npu_fused_infer_attention_score(
            query, case.key_cache, case.value_cache, **options | {"actual_seq_lengths_kv": [33]}
        )
    with pytest.raises(IndexError, match="block table"):
        torch.ops.npu.npu_fused_infer_attention_score(
            query,
            case.key_cache,
            case.value_cache,
            **options | {"block_table": torch.tensor([[0, 99]], dtype=torch.int32)},
        )


def test_a_causal_mask_of_the_wrong_sense_or_size_is_refused() -> None:
    case = PagedCase([2], [4], heads=1, kv_heads=1, dim=8)
    options = case.options("BNSD", causal=True)
    lower = torch.ones(2048, 2048, dtype=torch.bool).tril()

    for mask in (lower, ~lower.T, torch.ones(64, 64, dtype=torch.bool).triu(1), None):
        with pytest.raises(ValueError, match="atten_mask"):
            torch.ops.npu.npu_fused_infer_attention_score(
                torch.stack(case.queries), case.key_cache, case.value_cache, **options | {"atten_mask": mask}
            )


def test_what_is_not_emulated_is_refused_and_not_ignored() -> None:
    case = PagedCase([1], [4], heads=1, kv_heads=1, dim=8)
    query = torch.stack(case.queries)

    for extra in ({"sparse_mode": 2}, {"pre_tokens": 100}, {"query_rope": query}, {"antiquant_mode": 1}):
        with pytest.raises(NotImplementedError, match="not emulated"):
            torch.ops.npu.npu_fused_infer_attention_score(
                query, case.key_cache, case.value_cache, **case.options("BNSD", causal=False) | extra
            )


def test_norms_divide_by_the_root_of_the_mean_square() -> None:
    x, residual, gamma = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.randn(8)

    normed, rstd = torch.ops.npu.npu_rms_norm(x, gamma, 1e-5)
    both, _, total = torch.ops.npu.npu_add_rms_norm(x, residual, gamma, 1e-5)

    torch.testing.assert_close(normed, F.rms_norm(x, (8,), gamma, 1e-5))
    torch.testing.assert_close(rstd, torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(both, F.rms_norm(x + residual, (8,), gamma, 1e-5))


def test_rotation_turns_halves_or_neighbours() -> None:
    x, angle = torch.randn(5, 1, 2, 8), torch.randn(5, 1, 1, 4)
    halves = torch.cat([angle, angle], -1)
    neighbours = angle.repeat_interleave(2, -1)

    by_halves = torch.ops.npu.npu_rotary_mul(x, halves.cos(), halves.sin())
    by_neighbours = torch.ops.npu.npu_rotary_mul(x, neighbours.cos(), neighbours.sin(), "interleave")

    turn = torch.polar(torch.ones_like(angle), angle)
    want = torch.complex(x[..., :4].contiguous(), x[..., 4:].contiguous()) * turn
    torch.testing.assert_close(by_halves, torch.cat([want.real, want.imag], -1))
    torch.testing.assert_close(
        by_neighbours, torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn).flatten(-2)
    )


def test_swiglu_gates_with_the_first_half() -> None:
    x = torch.randn(3, 10)

    torch.testing.assert_close(torch.ops.npu.npu_swiglu(x), F.silu(x[:, :5]) * x[:, 5:])


def test_half_precision_is_rounded_once() -> None:
    x, gamma = torch.randn(4, 64, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)

    normed, _ = torch.ops.npu.npu_rms_norm(x, gamma, 1e-6)

    assert torch.equal(normed, F.rms_norm(x.float(), (64,), gamma.float(), 1e-6).bfloat16())


def test_scatter_writes_rows_in_place_and_the_last_of_equal_places_stays() -> None:
    cache = torch.zeros(6, 2)

    torch.ops.npu.npu_scatter_nd_update_(cache, torch.tensor([[4], [1], [4]]), torch.tensor([[1.0, 1], [2, 2], [3, 3]]))

    assert cache.tolist() == [[0, 0], [2, 2], [0, 0], [0, 0], [3, 3], [0, 0]]


def test_scatter_takes_places_of_several_dimensions() -> None:
    cache = torch.zeros(2, 3, 2)

    torch.ops.npu.npu_scatter_nd_update_(cache, torch.tensor([[1, 2], [0, 1]]), torch.tensor([[1.0, 2], [3, 4]]))

    assert cache[1, 2].tolist() == [1, 2]
    assert cache[0, 1].tolist() == [3, 4]
    assert cache.sum() == 10


@pytest.mark.parametrize("place", [-1, 6])
def test_scatter_outside_of_the_cache_is_refused(place: int) -> None:
    with pytest.raises(IndexError, match="lie outside"):
        torch.ops.npu.npu_scatter_nd_update_(torch.zeros(6, 2), torch.tensor([[place]]), torch.ones(1, 2))


def test_paged_scatter_fills_slots_of_an_nd_cache() -> None:
    keys, values = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    key_cache, value_cache = torch.zeros(4, 16, 2, 4), torch.zeros(4, 16, 2, 4)
    slots = torch.tensor([17, 0, 63], dtype=torch.int32)

    torch.ops.npu.npu_scatter_pa_kv_cache(keys, values, key_cache, value_cache, slots, cache_mode="Norm")

    assert torch.equal(key_cache.flatten(0, 1)[slots.long()], keys)
    assert torch.equal(value_cache.flatten(0, 1)[slots.long()], values)
    with pytest.raises(NotImplementedError, match="PA_NZ"):
        torch.ops.npu.npu_scatter_pa_kv_cache(keys, values, key_cache, value_cache, slots)
