"""Paged attention equals a softmax in float64, whatever the layout, and gives a row the same bits in any batch."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

paged_decode = pytest.importorskip("nanovllm_dist.workers.kernels.paged_decode", reason="no Triton")
paged_prefill = pytest.importorskip("nanovllm_dist.workers.kernels.paged_prefill", reason="no Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of ||output - reference|| / ||reference|| of any token's head. Weights and outputs are rounded to the dtype: half
# a unit in the last place is 2**-9 in bf16 and 2**-12 in fp16
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
BLOCK_SIZES = [
    *((size, torch.bfloat16) for size in (16, 32, 48, 64, 128, 144, 256)),
    *((size, torch.float32) for size in (48, 256)),
]
LAYOUTS = {"heads outside": (0, 2, 1, 3), "slots outside": (0, 1, 2, 3)}


@dataclass(frozen=True)
class Rows:
    """Rows of a paged cache in which everything that no row may see is NaN."""

    keys: torch.Tensor  # [num_blocks, block_size, kv_heads, head_dim]
    values: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    contexts: list[int]

    def subset(self, rows: list[int]) -> Rows:
        index = torch.tensor(rows, device=self.block_tables.device)
        chosen = [self.contexts[row] for row in rows]
        return replace(
            self, block_tables=self.block_tables[index], context_lens=self.context_lens[index], contexts=chosen
        )

    def dense(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [context, kv_heads, head_dim] of a row, in float64."""
        table, context = self.block_tables[row].long(), self.contexts[row]
        blocks = table[: -(-context // self.keys.shape[1])]
        return tuple(cache[blocks].flatten(0, 1)[:context].double() for cache in (self.keys, self.values))  # type: ignore[return-value]


def make_rows(
    contexts: list[int],
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    layout: str = "heads outside",
    seed: int = 0,
) -> Rows:
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    counts = [-(-context // block_size) for context in contexts]
    ids = list(range(1, sum(counts) + 1))
    random.Random(seed).shuffle(ids)
    order = LAYOUTS[layout]
    shape = (len(ids) + 2, block_size, kv_heads, dim)
    keys, values = (
        torch.full([shape[i] for i in order], float("nan"), dtype=dtype, device=DEVICE).permute(order) for _ in range(2)
    )
    # the last block is full of NaN, and so is what table entries beyond a row's context lead to
    tables = torch.full((len(contexts), max(counts) + 3), len(ids) + 1, dtype=torch.int32, device=DEVICE)
    for row, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        own = torch.tensor([ids.pop() for _ in range(count)], device=DEVICE)
        tables[row, :count] = own
        for cache, size in ((keys, 1.0), (values, 0.5)):
            new = torch.randn(count * block_size, kv_heads, dim, generator=generator, device=DEVICE) * size + 0.1
            new[context:] = float("nan")
            cache[own] = new.to(dtype).unflatten(0, (count, block_size))
    return Rows(keys, values, tables, torch.tensor(contexts, dtype=torch.int32, device=DEVICE), contexts)


def make_query(tokens: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """[tokens, heads, dim], cut out of wider rows, as the product of q, k and v is; peaked and flat heads."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    wide = torch.randn(tokens, heads + 2, dim, generator=generator, device=DEVICE)
    return (wide * torch.linspace(0.2, 3, heads + 2, device=DEVICE)[:, None]).to(dtype)[:, :heads]


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention in float64, the last query at the last key; query [tokens, heads, dim]."""
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * query.shape[-1] ** -0.5
    tokens, context = scores.shape[1:]
    last_key = torch.arange(context - tokens, context, device=query.device)
    hidden = torch.arange(context, device=query.device) > last_key[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


def worst(output: torch.Tensor, reference: torch.Tensor) -> float:
    return float(((output.double() - reference).norm(dim=-1) / reference.norm(dim=-1)).max())


def make_workspace(rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, **changes: int):  # type: ignore[no-untyped-def]
    config = replace(paged_decode.config_for(dtype, 256, 8), **{"segment": 128, **changes})
    return paged_decode.DecodeWorkspace(rows, heads, kv_heads, dim, 40960, 100, config, DEVICE)


def decode(query: torch.Tensor, rows: Rows, workspace=None) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Decode into an output full of NaN."""
    count, heads, dim = query.shape
    if workspace is None:
        workspace = make_workspace(count, heads, rows.keys.shape[2], dim, query.dtype)
    out = torch.full((count, heads, dim), float("nan"), dtype=query.dtype, device=DEVICE)
    workspace.prepare(rows.context_lens)
    return paged_decode.decode_attention(
        query, rows.keys, rows.values, rows.block_tables, rows.context_lens, dim**-0.5, workspace, out
    )


def prefill(query: torch.Tensor, rows: Rows, lengths: list[int], before: int = 0) -> torch.Tensor:
    """Prefill into an output full of NaN; `before` tokens of the query belong to no row."""
    starts = torch.tensor([before, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    out = torch.full(query.shape, float("nan"), dtype=query.dtype, device=DEVICE)
    return paged_prefill.prefill_attention(
        query, rows.keys, rows.values, rows.block_tables, rows.context_lens, starts, query.shape[-1] ** -0.5, out
    )


def assert_decodes(rows: Rows, heads: int, dtype: torch.dtype) -> None:
    query = make_query(len(rows.contexts), heads, rows.keys.shape[-1], dtype)
    output = decode(query, rows)
    reference = torch.cat([attend(query[row : row + 1], *rows.dense(row)) for row in range(len(rows.contexts))])
    assert worst(output, reference) < BOUNDS[dtype]


def assert_prefills(rows: Rows, lengths: list[int], heads: int, dtype: torch.dtype) -> None:
    query = make_query(sum(lengths), heads, rows.keys.shape[-1], dtype)
    parts = zip(prefill(query, rows, lengths).split(lengths), query.split(lengths), strict=True)
    for row, (output, part) in enumerate(parts):
        assert worst(output, attend(part, *rows.dense(row))) < BOUNDS[dtype], row


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_in_every_dtype_head_size_and_layout(dtype: torch.dtype, dim: int, layout: str) -> None:
    rows = make_rows([1, 2, 63, 64, 65, 255, 256, 257, 700], 2, dim, 64, dtype, layout, seed=dim)
    assert_decodes(rows, 4, dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (16, 8), (9, 3), (16, 4), (16, 2), (64, 8), (16, 1), (7, 1)])
def test_decode_in_every_query_group(heads: int, kv_heads: int) -> None:
    assert_decodes(make_rows([5, 300, 1030], kv_heads, 64, 32, torch.bfloat16), heads, torch.bfloat16)


@pytest.mark.parametrize(("block_size", "dtype"), BLOCK_SIZES)
def test_decode_in_every_block_size(block_size: int, dtype: torch.dtype) -> None:
    assert_decodes(make_rows([1, 47, 129, 513, 800], 2, 128, block_size, dtype), 4, dtype)


def test_decode_of_long_contexts() -> None:
    contexts = [1, 4999, 8191, 8192, 8193, 12345, 40960]
    assert_decodes(make_rows(contexts, 2, 64, 64, torch.bfloat16), 4, torch.bfloat16)


def test_decode_of_a_row_of_no_context_gives_zeros() -> None:
    rows = make_rows([3, 300], 2, 64, 16, torch.float32)
    rows.context_lens[0] = 0
    assert decode(make_query(2, 4, 64, torch.float32), rows)[0].tolist() == torch.zeros(4, 64).tolist()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_decode_gives_a_row_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    rng = random.Random(3)
    rows = make_rows([rng.randint(1, 1500) for _ in range(301)], 2, 64, 32, dtype)
    query = make_query(301, 6, 64, dtype)
    together = decode(query, rows, make_workspace(512, 6, 2, 64, dtype))
    for row in (0, 1, 150, 300):
        alone = decode(query[row : row + 1], rows.subset([row]), make_workspace(4, 6, 2, 64, dtype))
        assert torch.equal(alone[0], together[row])


def test_decode_does_not_depend_on_how_many_programs_share_the_work() -> None:
    rows = make_rows([700, 30, 900], 2, 64, 32, torch.bfloat16)
    query = make_query(3, 4, 64, torch.bfloat16)
    results = []
    for num_programs in (1, 3, 100, 1600):
        workspace = make_workspace(3, 4, 2, 64, torch.bfloat16)
        workspace.num_programs = num_programs
        results.append(decode(query, rows, workspace))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_work_list_has_the_longest_rows_first_and_every_key_once() -> None:
    contexts = [5, 300, 0, 64, 65, 1000, 128, 5]
    workspace = make_workspace(16, 4, 2, 64, torch.bfloat16, segment=64, max_segments=4)
    workspace.prepare(torch.tensor(contexts, dtype=torch.int32, device=DEVICE))
    listed, capacity = int(workspace.segments[0]), workspace.max_rows * workspace.max_segments
    fields = workspace.segments[1:].view(-1, capacity)[:, :listed].tolist()
    row_order = list(dict.fromkeys(fields[0]))
    assert row_order == [5, 1, 6, 4, 3, 0, 7, 2]
    keys: dict[int, list[int]] = {row: [] for row in row_order}
    for row, _segment, _count, begin, end in zip(*fields, strict=True):
        keys[row] += range(begin, end)
    assert all(sorted(keys[row]) == list(range(context)) for row, context in enumerate(contexts))


@pytest.mark.parametrize("rows", [1, 32, 33, 150])
def test_rows_of_equal_length_keep_their_order_in_the_work_list_however_many_there_are(rows: int) -> None:
    contexts = [100 * (row % 7) for row in range(rows)]
    workspace = make_workspace(160, 4, 2, 64, torch.bfloat16, segment=256, max_segments=4)
    workspace.prepare(torch.tensor(contexts, dtype=torch.int32, device=DEVICE))
    listed, capacity = int(workspace.segments[0]), workspace.max_rows * workspace.max_segments
    fields = workspace.segments[1:].view(-1, capacity)[:, :listed].tolist()
    expected = [
        (row, segment)
        for row in sorted(range(rows), key=lambda row: (-contexts[row], row))
        for segment in range(max(1, -(-contexts[row] // 256)))
    ]
    assert list(zip(fields[0], fields[1], strict=True)) == expected


def test_a_workspace_can_be_used_again_and_again() -> None:
    workspace = make_workspace(4, 4, 2, 64, torch.bfloat16)
    query = make_query(4, 4, 64, torch.bfloat16)
    for seed, contexts in enumerate([[1, 1, 1, 1], [2000, 5, 900, 1], [300, 300, 300, 300]]):
        rows = make_rows(contexts, 2, 64, 64, torch.bfloat16, seed=seed)
        expected = decode(query, rows)
        for _ in range(3):
            assert torch.equal(decode(query, rows, workspace), expected)


def test_padded_rows_leave_real_rows_alone() -> None:
    rows = make_rows([500, 77], 2, 64, 64, torch.bfloat16)
    padded = Rows(
        rows.keys,
        rows.values,
        torch.cat([rows.block_tables, torch.zeros_like(rows.block_tables)]),
        torch.cat([rows.context_lens, torch.ones_like(rows.context_lens)]),
        [*rows.contexts, 1, 1],
    )
    query = make_query(4, 4, 64, torch.bfloat16)
    assert torch.equal(decode(query, padded)[:2], decode(query[:2], rows))


def test_a_captured_decode_follows_contexts_that_change() -> None:
    rows = make_rows([1500, 700, 64], 2, 128, 64, torch.bfloat16)
    query, workspace = make_query(3, 4, 128, torch.bfloat16), make_workspace(3, 4, 2, 128, torch.bfloat16)
    short = torch.tensor([3, 699, 1], dtype=torch.int32, device=DEVICE)
    long = rows.context_lens.clone()
    eager = {}
    for name, lengths in (("long", long), ("short", short)):
        rows.context_lens.copy_(lengths)
        eager[name] = decode(query, rows)
    out = torch.empty(3, 4, 128, dtype=torch.bfloat16, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        workspace.prepare(rows.context_lens)
        paged_decode.decode_attention(
            query, rows.keys, rows.values, rows.block_tables, rows.context_lens, 128**-0.5, workspace, out
        )
    for name, lengths in (("long", long), ("short", short), ("long", long)):
        rows.context_lens.copy_(lengths)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, eager[name]), name


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefill_in_every_dtype_head_size_and_layout(dtype: torch.dtype, dim: int, layout: str) -> None:
    rows = make_rows([1, 5, 64, 65, 200, 333], 2, dim, 64, dtype, layout, seed=dim)
    assert_prefills(rows, [1, 3, 64, 65, 7, 150], 4, dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (16, 8), (9, 3), (16, 4), (16, 2), (64, 8), (16, 1), (7, 1)])
def test_prefill_in_every_query_group(heads: int, kv_heads: int) -> None:
    assert_prefills(make_rows([5, 300, 430], kv_heads, 64, 32, torch.bfloat16), [5, 100, 430], heads, torch.bfloat16)


@pytest.mark.parametrize(("block_size", "dtype"), BLOCK_SIZES)
def test_prefill_in_every_block_size(block_size: int, dtype: torch.dtype) -> None:
    assert_prefills(make_rows([47, 129, 513], 2, 128, block_size, dtype), [47, 1, 300], 4, dtype)


def test_prefill_of_long_contexts() -> None:
    assert_prefills(make_rows([5000, 3000, 2], 2, 128, 64, torch.bfloat16), [700, 3000, 2], 4, torch.bfloat16)


def test_prefill_writes_no_token_outside_its_rows() -> None:
    rows = make_rows([40, 90], 2, 64, 32, torch.bfloat16)
    query = make_query(150, 4, 64, torch.bfloat16)
    output = prefill(query, rows, [40, 60], before=29)
    assert bool(output[:29].isnan().all())
    assert bool(output[129:].isnan().all())
    assert torch.equal(output[29:129], prefill(query[29:129], rows, [40, 60]))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_prefill_gives_a_token_the_same_bits_in_any_batch_and_chunk(dtype: torch.dtype) -> None:
    rng = random.Random(5)
    lengths = [600, *(rng.randint(1, 90) for _ in range(40))]
    rows = make_rows([length + 20 for length in lengths], 2, 64, 32, dtype)
    query = make_query(sum(lengths), 6, 64, dtype)
    whole = prefill(query, rows, lengths)
    first, last = rows.subset([0]), rows.subset([len(lengths) - 1])
    assert torch.equal(prefill(query[-lengths[-1] :], last, lengths[-1:]), whole[-lengths[-1] :])
    # the first 217 tokens of a prompt, then the rest of it
    early = replace(first, context_lens=torch.tensor([237], dtype=torch.int32, device=DEVICE))
    assert torch.equal(prefill(query[:217], early, [217]), whole[:217])
    assert torch.equal(prefill(query[217:600], first, [383]), whole[217:600])


def test_layouts_that_cannot_be_read_are_refused() -> None:
    rows = make_rows([40], 2, 64, 32, torch.bfloat16)
    query = make_query(1, 4, 64, torch.bfloat16)
    for wrong in (
        replace(rows, values=rows.values.contiguous()),
        replace(rows, block_tables=rows.block_tables.long()),
        replace(rows, keys=rows.keys.float(), values=rows.values.float()),
        rows.subset([0, 0]),
    ):
        with pytest.raises(ValueError, match=r"values|block tables|rows"):
            decode(query, wrong)
        with pytest.raises(ValueError, match=r"values|block tables|rows"):
            prefill(query, wrong, [1])
    with pytest.raises(ValueError, match="workspace"):
        decode(query.expand(2, -1, -1), rows.subset([0, 0]), make_workspace(1, 4, 2, 64, torch.bfloat16))
