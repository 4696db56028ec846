"""Greedy tokens and plain temperature draws from logits, the vocabulary cut over ranks or not: two kernels.

`shard_statistics` reads a rank's logits once and leaves, for each chunk of CHUNK columns, the largest logit and the
chunk's mass; ranks exchange that in one all-gather. `choose` picks the chunk in which the token lies and looks at
the logits of that chunk only. The draw is the inverse CDF in vocabulary order.

A row's token depends on that row alone: chunks are reduced in a fixed order, and the masses are then summed as
integers, which is exact in any order. The token does not depend on the rank count either, to the bit, where ranges
of the vocabulary begin at multiples of CHUNK; elsewhere chunks are cut differently and sums round differently.
Both can be captured in a graph. Seeds, requests, the exchange between ranks, and top-k, top-p or penalties are
unknown here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm_dist.workers.kernels.dependent_launch import launch_options

# Columns of a chunk: one row of a large vocabulary must make enough programs to fill a device
CHUNK = 2048
_STATISTICS_WARPS = 4
_APPENDED = 32  # rows of a program, which writes their tokens
_CHOICE_WARPS = 8

_LOG2_E = tl.constexpr(1.4426950408889634)
# The mass of the likeliest token. Sums stay below 2**63 for vocabularies of up to 2**22 tokens
_ONE = tl.constexpr(float(2**40))


def num_chunks(columns: int) -> int:
    """Chunks of a row of `columns` logits; the last one may be shorter."""
    return -(-columns // CHUNK)


def shard_statistics(logits: Tensor, inv_temperature: Tensor, out: Tensor, *, vocab_local: int) -> Tensor:
    """Reduce each chunk of each row to (largest logit, sum of exp((logit - largest) * inv_temperature)).

    Args:
        logits: bf16, fp16 or fp32 [R, columns], this rank's range of the vocabulary; rows may be strided.
        inv_temperature: float32 [R], 1 / temperature; 0 for a greedy row, whose sums mean nothing.
        out: float32 [R, num_chunks(columns), 2], contiguous; overwritten and returned.
        vocab_local: tokens of this rank, >= 1. Columns from there on are padding and never read; a chunk of
            padding alone gets (-inf, 0), so that ranks of unequal ranges can exchange tensors of one shape.

    A NaN counts as +inf; the sum of a chunk that holds either means nothing. Raises ValueError if a shape or a
    stride does not fit.
    """
    rows, columns = logits.shape
    if out.shape != (rows, num_chunks(columns), 2) or not out.is_contiguous():
        raise ValueError(f"statistics of {rows} x {columns} logits do not fit a tensor of shape {tuple(out.shape)}")
    _check_rows(logits, inv_temperature, vocab_local)
    _shard_statistics[(rows, out.shape[1])](
        logits,
        inv_temperature,
        out,
        logits.stride(0),
        vocab_local,
        CHUNK=CHUNK,
        num_warps=_STATISTICS_WARPS,
        **launch_options(),
    )
    return out


def choose(
    statistics: Tensor,
    logits: Tensor,
    uniforms: Tensor,
    inv_temperature: Tensor,
    out: Tensor,
    *,
    rank: int,
    vocab_start: int,
    vocab_local: int,
) -> Tensor:
    """The token of each row, on the rank that has its column; 0 on the others, so that the sum over ranks is it.

    Args:
        statistics: float32 [world_size, R, chunks, 2], last two dimensions dense: what each rank's
            `shard_statistics` gave for the same rows, ranks in the order of the vocabulary.
        logits, inv_temperature, vocab_local: as given to `shard_statistics` on this rank.
        uniforms: float64 [R] in [0, 1), one random number per row; not read for greedy rows.
        out: int64 [R], contiguous; overwritten and returned.
        rank: this rank's place in `statistics`.
        vocab_start: the token id of this rank's first column.

    Greedy rows get the lowest token id of the largest logit, others the token in which `uniforms` falls; a token
    of probability 0 is never drawn. A row with a NaN or +inf has no distribution: the first such token is taken.
    A row of -inf alone gives token 0. Raises ValueError if a shape or a stride does not fit.
    """
    world_size, rows, chunks, _ = statistics.shape
    if statistics.stride()[2:] != (2, 1) or not 0 <= rank < world_size or chunks != num_chunks(logits.shape[1]):
        raise ValueError(f"statistics of shape {tuple(statistics.shape)} do not fit rank {rank} and its logits")
    if uniforms.dtype != torch.float64 or out.dtype != torch.int64 or not rows == len(uniforms) == len(out):
        raise ValueError(f"{rows} rows need as many float64 uniforms and int64 tokens")
    _check_rows(logits, inv_temperature, vocab_local)
    _choose[(rows,)](
        statistics,
        logits,
        uniforms,
        inv_temperature,
        out,
        statistics.stride(0),
        statistics.stride(1),
        logits.stride(0),
        chunks,
        world_size * chunks,
        rank,
        vocab_start,
        vocab_local,
        CHUNK=CHUNK,
        BLOCK=triton.next_power_of_2(world_size * chunks),
        num_warps=_CHOICE_WARPS,
        **launch_options(),
    )
    return out


def append_tokens(table: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """Write tokens int64 [R] behind int64 [R] places of a flat table of int32 or int64 -> tokens.

    Which of two tokens for one place stays is not said. Places are not checked. Raises ValueError if a shape, stride
    or dtype does not fit.
    """
    rows = len(tokens)
    contiguous = table.is_contiguous() and places.is_contiguous() and tokens.is_contiguous()
    integers = tokens.dtype == places.dtype == torch.int64 and table.dtype in (torch.int32, torch.int64)
    if places.shape != (rows,) or table.ndim != 1 or not contiguous or not integers:
        raise ValueError(
            f"{rows} tokens of {tokens.dtype}, places {tuple(places.shape)} of {places.dtype} and a table of "
            f"{tuple(table.shape)} {table.dtype}, strides {table.stride()}"
        )
    if rows:
        grid = (triton.cdiv(rows, _APPENDED),)
        _append_tokens[grid](table, places, tokens, rows, BLOCK=_APPENDED, num_warps=1, **launch_options())
    return tokens


def _check_rows(logits: Tensor, inv_temperature: Tensor, vocab_local: int) -> None:
    if logits.stride(1) != 1 or not 1 <= vocab_local <= logits.shape[1]:
        raise ValueError(f"{vocab_local} tokens in logits of shape {tuple(logits.shape)}, strides {logits.stride()}")
    if inv_temperature.dtype != torch.float32 or len(inv_temperature) != len(logits):
        raise ValueError(f"{len(logits)} rows of logits need as many float32 inverse temperatures")


@triton.jit
def _chunk_logits(logits: tl.tensor, chunk: tl.tensor, vocab_local: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """A chunk of the row at `logits`, in float32: -inf past the end, +inf for a NaN."""
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + columns, mask=columns < vocab_local, other=float("-inf")).to(tl.float32)
    return tl.where(values != values, float("inf"), values)


@triton.jit
def _weights(values: tl.tensor, peak: tl.tensor, inv_temperature: tl.tensor) -> tl.tensor:
    """exp((values - peak) * inv_temperature), 0 for -inf; something without meaning where `peak` is +inf."""
    # nothing draws from a row of temperature 0 or a peak of -inf, but 0 * inf must not make a NaN of what is stored
    scale = tl.where(inv_temperature > 0.0, inv_temperature * _LOG2_E, 1.0)
    return tl.exp2((values - tl.where(peak == float("-inf"), 0.0, peak)) * scale)


@triton.jit
def _shard_statistics(
    logits: tl.tensor,
    inv_temperature: tl.tensor,
    out: tl.tensor,
    logits_stride: tl.tensor,
    vocab_local: tl.tensor,
    CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    # The last columns first: those are what the second-level cache still has of a product that has just been written
    row, chunk = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    values = _chunk_logits(logits + row.to(tl.int64) * logits_stride, chunk, vocab_local, CHUNK)
    peak = tl.max(values)
    mass = tl.sum(_weights(values, peak, tl.load(inv_temperature + row)))
    place = out + (row * tl.num_programs(1) + chunk) * 2
    tl.store(place, peak)
    tl.store(place + 1, mass)


@triton.jit
def _first_above(masses: tl.tensor, threshold: tl.tensor, index: tl.tensor, otherwise: tl.tensor) -> tl.tensor:
    """First index at which the sum of int64 `masses` so far exceeds `threshold`. It never has mass 0."""
    return tl.min(tl.where(tl.cumsum(masses, 0) > threshold, index, otherwise))


@triton.jit
def _draw_column(weights: tl.tensor, rest: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """Where in a chunk `rest` falls, in units of 1 / _ONE of the chunk's largest weight, which is 1."""
    masses = (weights * _ONE).to(tl.int64)
    column = tl.arange(0, CHUNK)
    # the chunk's sum and the masses in it round apart: the rest may lie past the last token
    last = tl.max(tl.where(masses > 0, column, 0))
    return _first_above(masses, rest.to(tl.int64), column, last)


# Numbers that vary with batch and rank are not specialised: some of their values would compile once more, under load
@triton.jit(do_not_specialize=["rank_stride", "rank", "vocab_start"])
def _choose(
    statistics: tl.tensor,
    logits: tl.tensor,
    uniforms: tl.tensor,
    inv_temperature: tl.tensor,
    out: tl.tensor,
    rank_stride: tl.tensor,
    row_stride: tl.tensor,
    logits_stride: tl.tensor,
    chunks: tl.tensor,
    all_chunks: tl.tensor,
    rank: tl.tensor,
    vocab_start: tl.tensor,
    vocab_local: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    inv = tl.load(inv_temperature + row)
    uniform = tl.load(uniforms + row)

    statistics += row * row_stride
    index = tl.arange(0, BLOCK)
    places = statistics + (index // chunks).to(tl.int64) * rank_stride + (index % chunks) * 2
    maxima = tl.load(places, mask=index < all_chunks, other=float("-inf"))
    sums = tl.load(places + 1, mask=index < all_chunks, other=0.0)
    peak = tl.max(maxima)
    masses = (sums.to(tl.float64) * _weights(maxima, peak, inv) * _ONE).to(tl.int64)
    # a uniform is at most 1 - 2**-53, so the product stays below the total after rounding too
    threshold = (uniform * tl.sum(masses).to(tl.float64)).to(tl.int64)
    is_greedy = (inv == 0.0) | (tl.abs(peak) == float("inf"))
    greedy = tl.min(tl.where(maxima == peak, index, all_chunks - 1))
    chosen = tl.where(is_greedy, greedy, _first_above(masses, threshold, index, all_chunks - 1))

    shard, chunk = chosen // chunks, chosen % chunks
    is_owner = shard == rank
    chunk_peak = tl.load(statistics + shard.to(tl.int64) * rank_stride + chunk * 2)
    rest = threshold - tl.sum(tl.where(index < chosen, masses, 0))
    rest = rest.to(tl.float64) / _weights(chunk_peak, peak, inv)
    values = _chunk_logits(logits + row * logits_stride, chunk, tl.where(is_owner, vocab_local, 0), CHUNK)
    drawn = _draw_column(_weights(values, chunk_peak, inv), rest, CHUNK)
    greedy = tl.min(tl.where(values == peak, tl.arange(0, CHUNK), CHUNK - 1))
    column = tl.where(is_greedy, greedy, drawn)
    tl.store(out + row, tl.where(is_owner, vocab_start + chunk * CHUNK + column, 0).to(tl.int64))


@triton.jit(do_not_specialize=["rows"])
def _append_tokens(
    table: tl.tensor,
    places: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + row, mask=row < rows, other=0)
    token = tl.load(tokens + row, mask=row < rows, other=0)
    tl.store(table + place + 1, token.to(table.dtype.element_ty), mask=row < rows)
