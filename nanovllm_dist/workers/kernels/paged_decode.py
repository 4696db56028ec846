"""Decode attention over a paged cache: one query token a row, bound by how fast keys and values are read.

A row's context is cut into segments; a segment of one key/value head is one task. Where the cuts lie depends on the
configuration and the row's own context alone, so with one workspace a row gives the same bits in any batch.
`DecodeWorkspace.prepare` lists the segments of a step on the device, once for all layers, those of the longest rows
first, and a fixed number of programs walk the list. A grid over (row, head, possible segment) would be as safe in a
captured graph, but most of its programs would only start and leave. There are more programs than run at once, so that
who is done early takes on more, and what is taken last is short: against a list in the order of rows and programs that
all run at once, that is worth a tenth of the time at rows of 100 to 1,100 keys.

The query heads of a group are the rows of one tile, so a key is read once. A row of one segment writes its output.
Otherwise segments leave partial results in the workspace, and the program that arrives last merges them, in order of
segments whoever it is: no second launch. Few long segments beat many short ones only at large batches; a segment is
`DecodeConfig.segment` keys until `max_segments` of them no longer cover the row, and longer from there on.

It knows nothing of requests or layers, and does not write the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm_dist.workers.kernels.attention_config import DecodeConfig
from nanovllm_dist.workers.kernels.dependent_launch import launch_options
from nanovllm_dist.workers.kernels.paged_tiles import LOG2E, block_of, check_layout, load_tile, slots_of, softmax_step

# Rows of a tensor core's smallest tile: groups of fewer query heads are padded to it
_MIN_ROWS = 16
# Elements of partial results that a program merges at a time
_MERGE_ELEMENTS = 4096
# Up to so many rows: keys of a segment, and most segments of a row. With _MANY_HEADS key/value heads or more
_CUTS = ((4, (64, 8)), (32, (512, 16)), (64, (1024, 16)))
# With fewer of them, as one rank of several has: up to so many rows times heads
_CUTS_OF_FEW_HEADS = ((32, (128, 16)), (128, (256, 16)), (256, (512, 16)))
_CUT_OF_MORE = (2048, 16)
_MANY_HEADS = 8
# Up to so many rows times heads the tiles are small
_FEW_TILES = _CUTS_OF_FEW_HEADS[-1][0]
# Rows of a program of the listing, contexts that they are compared with at a time, and its warps
_LIST_ROWS, _LIST_CHUNK, _LIST_WARPS = 32, 64, 4
# More than fit at once: the device gives the next program to the processor that has room first
_PROGRAMS_PER_PROCESSOR = 16
_FIELDS = 5  # of a listed segment: row, index in the row, segments of the row, first key, end


def config_for(dtype: torch.dtype, rows: int, kv_heads: int) -> DecodeConfig:
    """The configuration for up to `rows` rows of `kv_heads` heads with keys of this dtype, measured on Hopper GPUs.

    The less there is, the finer contexts must be cut to occupy the processors, and the more it costs. An H100 reads
    256 rows of 100 to 1,100 keys (16 heads over 8) at 95% of its bandwidth with segments of 2,048, at 91% with 512; 16
    rows at 70% with 512; one row of 512 keys takes 6.6 us with segments of 64 and 11 with 512. An H200 takes 14.4 us
    for 8 rows of 400 to 1,200 keys (16 over 2) with segments of 128 and 23.2 with 512, for 64 rows 27.5 with 256 and
    33.1 with 1,024, for 256 rows 53.0 with 2,048 and 61.2 with 256.
    """
    segment, max_segments = next((cut for limit, cut in _cuts(kv_heads) if rows <= limit), _CUT_OF_MORE)
    if dtype == torch.float32:
        return DecodeConfig(segment, max_segments, tile=32, num_warps=4, num_stages=2)
    if rows * min(kv_heads, _MANY_HEADS) <= _FEW_TILES:
        return DecodeConfig(segment, max_segments, tile=32, num_warps=2, num_stages=3)
    return DecodeConfig(segment, max_segments, tile=64, num_warps=4, num_stages=3)


def row_limits(kv_heads: int) -> tuple[int, ...]:
    """The largest number of rows of each cut that `config_for` chooses among, but for the last cut, which has none."""
    return tuple(limit for limit, _cut in _cuts(kv_heads))


def _cuts(kv_heads: int) -> tuple[tuple[int, tuple[int, int]], ...]:
    if kv_heads >= _MANY_HEADS:
        return _CUTS
    return tuple((limit // kv_heads, cut) for limit, cut in _CUTS_OF_FEW_HEADS)


class DecodeWorkspace:
    """The step's list of segments and room for partial results. For one stream at a time.

    Holds max_rows * num_heads * min(max_segments, max_context / segment) * head_dim floats.
    """

    def __init__(
        self,
        max_rows: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_context: int,
        num_processors: int,
        config: DecodeConfig,
        device: torch.device,
    ) -> None:
        """Room for `max_rows` rows of `num_heads` query heads; `num_processors` multiprocessors run the programs.

        Contexts beyond `max_context` stay correct, with fewer segments than the configuration allows.
        """
        if num_heads % num_kv_heads or config.segment % config.tile:
            raise ValueError(f"{num_heads} heads over {num_kv_heads} key/value heads, {config}")
        self.config = config
        self.max_rows = max_rows
        self.max_segments = min(config.max_segments, -(-max_context // config.segment))
        self.num_programs = num_processors * _PROGRAMS_PER_PROCESSOR
        parts = max_rows * num_heads * self.max_segments
        self.segments = torch.zeros(1 + _FIELDS * max_rows * self.max_segments, dtype=torch.int32, device=device)
        self.maxima, self.sums = torch.empty(2, parts, dtype=torch.float32, device=device)
        self.partials = torch.empty(parts * head_dim, dtype=torch.float32, device=device)
        # every launch leaves them at zero again
        self.arrivals = torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device)

    def prepare(self, context_lens: torch.Tensor) -> None:
        """List the segments of a step: context_lens [R] int32, contiguous. Raises ValueError if R is too large.

        Launches one kernel and waits for nothing; may be captured.
        """
        rows = len(context_lens)
        if rows > self.max_rows:
            raise ValueError(f"{rows} rows in a workspace for {self.max_rows}")
        _list_segments[(self.max_segments, max(1, triton.cdiv(rows, _LIST_ROWS)))](
            context_lens,
            self.segments,
            rows,
            self.max_rows * self.max_segments,
            self.config.segment,
            self.max_segments,
            ROWS=_LIST_ROWS,
            CHUNK=_LIST_CHUNK,
            num_warps=_LIST_WARPS,
            **launch_options(),
        )


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    workspace: DecodeWorkspace,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row's one token over its context; `workspace.prepare(context_lens)` must have run in this step.

    query [R, heads, head_dim], rows at any distance; keys and values [num_blocks, block_size, kv_heads, head_dim] with
    equal strides, the last of them 1; block_tables [R, max_blocks] int32; context_lens [R] int32, where a row of no
    context gives zeros; scale > 0. `out` [R, heads, head_dim] contiguous, new if None -> `out`. Slots behind a
    context are not read. Nothing is allocated when `out` is given, and the grid depends on R and the workspace alone.
    Raises ValueError for layouts it cannot read.
    """
    rows, heads, head_dim = query.shape
    block_size, kv_heads = keys.shape[1:3]
    check_layout(query, keys, values, block_tables)
    if len(context_lens) != rows or rows > workspace.max_rows:
        raise ValueError(f"{rows} rows, {len(context_lens)} contexts, a workspace for {workspace.max_rows}")
    out = torch.empty((rows, heads, head_dim), dtype=query.dtype, device=query.device) if out is None else out
    if rows == 0:
        return out
    config, group, width = workspace.config, heads // kv_heads, triton.next_power_of_2(head_dim)
    merge_width = triton.next_power_of_2(group) * width
    parts = triton.next_power_of_2(workspace.max_segments)
    _decode[(min(rows * kv_heads * workspace.max_segments, workspace.num_programs),)](
        out,
        query,
        keys,
        values,
        block_tables,
        workspace.segments,
        workspace.maxima,
        workspace.sums,
        workspace.partials,
        workspace.arrivals,
        scale * LOG2E,
        workspace.max_rows * workspace.max_segments,
        workspace.max_segments,
        kv_heads,
        query.stride(0),
        block_tables.stride(0),
        *keys.stride()[:3],
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=config.tile,
        QUERIES=max(_MIN_ROWS, triton.next_power_of_2(group)),
        WIDTH=width,
        MERGED=max(1, min(parts, _MERGE_ELEMENTS // merge_width)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(),
    )
    return out


@triton.jit
def _cut(context, present, segment_keys, max_segments):
    """Keys of a row's segments, and how many it has; none where there is no row."""
    length = segment_keys * tl.maximum(tl.cdiv(context, segment_keys * max_segments), 1)
    return length, tl.where(present, tl.maximum(tl.cdiv(context, length), 1), 0)


@triton.jit(do_not_specialize=["num_rows", "capacity", "segment_keys", "max_segments"])
def _list_segments(
    context_lens,
    segments,
    num_rows,
    capacity,
    segment_keys,
    max_segments,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program (i, j) lists the i-th segment of every row of the j-th ROWS that has one; the longest row first, its
    segments together."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    segment = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    context = tl.load(context_lens + row, mask=row < num_rows, other=0)
    length, count = _cut(context, row < num_rows, segment_keys, max_segments)
    before = tl.zeros([ROWS], tl.int32)
    total = 0
    for first in range(0, num_rows, CHUNK):
        other = first + tl.arange(0, CHUNK)
        other_context = tl.load(context_lens + other, mask=other < num_rows, other=0)
        _length, other_count = _cut(other_context, other < num_rows, segment_keys, max_segments)
        longer = other_context[None, :] > context[:, None]
        as_long = (other_context[None, :] == context[:, None]) & (other[None, :] < row[:, None])
        before += tl.sum(tl.where(longer | as_long, other_count[None, :], 0), 1)
        total += tl.sum(other_count, 0)
    place = segments + 1 + before + segment
    listed = segment < count
    tl.store(place, row, mask=listed)
    tl.store(place + capacity, tl.full([ROWS], segment, tl.int32), mask=listed)
    tl.store(place + 2 * capacity, count, mask=listed)
    tl.store(place + 3 * capacity, segment * length, mask=listed)
    tl.store(place + 4 * capacity, tl.minimum((segment + 1) * length, context), mask=listed)
    if (segment == 0) & (tl.program_id(1) == 0):
        tl.store(segments, total)


@triton.jit(do_not_specialize=["capacity", "max_segments", "kv_heads", "table_stride"])
def _decode(
    out,
    query,
    keys,
    values,
    block_tables,
    segments,
    maxima,
    sums,
    partials,
    arrivals,
    scale,
    capacity,
    max_segments,
    kv_heads,
    query_stride,
    table_stride,
    block_stride,
    slot_stride,
    head_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A program takes every num_programs-th task; task = place in the list * kv_heads + key/value head."""
    if DEPENDENT:  # the output projection may load its weights meanwhile
        gdc_launch_dependents()
        gdc_wait()
    member = tl.arange(0, QUERIES)
    column = tl.arange(0, WIDTH)
    tile_offset = member[:, None] * HEAD_DIM + column[None, :]
    tile_mask = (member[:, None] < GROUP) & (column[None, :] < HEAD_DIM)
    num_tasks = tl.load(segments) * kv_heads
    # Read beside their number, whether or not there is one for this program
    row, segment, count, begin, end = _listed(segments, tl.program_id(0) // kv_heads, capacity)
    for task in range(tl.program_id(0), num_tasks, tl.num_programs(0)):
        head = task % kv_heads
        if task >= tl.num_programs(0):
            row, segment, count, begin, end = _listed(segments, task // kv_heads, capacity)
        queries = tl.load(query + row * query_stride + head * GROUP * HEAD_DIM + tile_offset, mask=tile_mask, other=0.0)
        maximum = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        acc = tl.zeros([QUERIES, WIDTH], tl.float32)
        table = block_tables + row * table_stride
        block = block_of(table, begin, end, BLOCK_SIZE, TILE)
        for start in range(begin, end, TILE):
            visible = start + tl.arange(0, TILE) < end
            slot = head * head_stride + slots_of(block, start, block_stride, slot_stride, BLOCK_SIZE, TILE)
            cells = slot[:, None] + column[None, :]
            block = block_of(table, start + TILE, end, BLOCK_SIZE, TILE)
            key_tile = load_tile(keys, cells, visible, column, HEAD_DIM, WIDTH, WHOLE=False)
            value_tile = load_tile(values, cells, visible, column, HEAD_DIM, WIDTH, WHOLE=False)
            scores = tl.dot(queries, tl.trans(key_tile), input_precision="ieee")
            scores = tl.where(visible[None, :], scores, float("-inf"))
            maximum, total, acc = softmax_step(scores, value_tile, scale, maximum, total, acc)

        target = row * kv_heads + head
        if count == 1:
            total = tl.where(total > 0, total, 1.0)
            tl.store(out + target * GROUP * HEAD_DIM + tile_offset, acc / total[:, None], mask=tile_mask)
        else:
            part = (target * max_segments + segment) * GROUP
            tl.store(maxima + part + member, maximum, mask=member < GROUP)
            tl.store(sums + part + member, total, mask=member < GROUP)
            tl.store(partials + part * HEAD_DIM + tile_offset, acc, mask=tile_mask)
            # all threads' stores come before the one thread's release
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals + target, 1, sem="acq_rel", scope="gpu")
            if arrived == count - 1:
                _merge(out, maxima, sums, partials, target, count, max_segments, GROUP, HEAD_DIM, WIDTH, MERGED)
                tl.store(arrivals + target, 0)


@triton.jit
def _listed(segments, place, capacity):
    """The _FIELDS of a segment of the list."""
    field = segments + 1 + place
    row, segment, count = tl.load(field), tl.load(field + capacity), tl.load(field + 2 * capacity)
    return row, segment, count, tl.load(field + 3 * capacity), tl.load(field + 4 * capacity)


@triton.jit
def _merge(
    out,
    maxima,
    sums,
    partials,
    target,
    count,
    max_segments,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Output of the group `target` from its `count` partial results, MERGED of them at a time."""
    MEMBERS: tl.constexpr = triton.next_power_of_2(GROUP)
    member = tl.arange(0, MEMBERS)
    column = tl.arange(0, WIDTH)
    top = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    acc = tl.zeros([MEMBERS, WIDTH], tl.float32)
    for first in range(0, count, MERGED):
        part = first + tl.arange(0, MERGED)
        place = (target * max_segments + part[:, None]) * GROUP + member[None, :]
        present = (part[:, None] < count) & (member[None, :] < GROUP)
        cells = place[:, :, None] * HEAD_DIM + column[None, None, :]
        readable = present[:, :, None] & (column[None, None, :] < HEAD_DIM)
        # all that is to be read is asked for at once: the time of a merge is that of waiting for memory
        tops = tl.load(maxima + place, mask=present, other=float("-inf"))
        totals = tl.load(sums + place, mask=present, other=0.0)
        accs = tl.load(partials + cells, mask=readable, other=0.0)
        last, top = top, tl.maximum(top, tl.max(tops, 0))
        # padding of the group stays free of NaN
        base = tl.where(member < GROUP, top, 0.0)
        decay, weight = tl.exp2(last - base), tl.exp2(tops - base[None, :])
        total = total * decay + tl.sum(weight * totals, 0)
        acc = acc * decay[:, None] + tl.sum(weight[:, :, None] * accs, 0)
    written = (member[:, None] < GROUP) & (column[None, :] < HEAD_DIM)
    cells = (target * GROUP + member[:, None]) * HEAD_DIM + column[None, :]
    tl.store(out + cells, acc / total[:, None], mask=written)
