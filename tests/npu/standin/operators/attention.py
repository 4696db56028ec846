"""npu_fused_infer_attention_score: paged and plain caches, every layout the project may use, causal masks.

Each sequence is computed by itself from its own keys. A sequence without keys gives zeros, and so do rows of padding;
what a card leaves there is undefined. Quantisation, shared prefixes and separate rotary parts are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_UNBOUNDED = 2147483647
_MASK_SIZE = 2048


@dataclass(frozen=True)
class _Call:
    """The options that are emulated, by the names of the operator's first version."""

    num_heads: int = 1
    scale: float = 1.0
    input_layout: str = "BSH"
    num_key_value_heads: int = 0
    sparse_mode: int = 0
    block_size: int = 0
    atten_mask: Tensor | None = None
    actual_seq_lengths: list[int] | None = None
    actual_seq_lengths_kv: list[int] | None = None
    block_table: Tensor | None = None
    softmax_lse_flag: bool = False

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_heads


_NAMES_IN_V2 = {
    "num_query_heads": "num_heads",
    "softmax_scale": "scale",
    "actual_seq_qlen": "actual_seq_lengths",
    "actual_seq_kvlen": "actual_seq_lengths_kv",
    "return_softmax_lse": "softmax_lse_flag",
}
# options that change nothing here: precision of the card's arithmetic, and windows that take in everything
_WITHOUT_EFFECT = {"inner_precise": None, "pre_tokens": _UNBOUNDED, "next_tokens": _UNBOUNDED}


def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Softmax of `scale * query @ key` over each sequence's keys, times value.

    query is [B, S, N*D], [B, S, N, D], [B, N, S, D] or, with cumulative lengths, [T, N, D]; key and value are in the
    same layout, or with a block table [blocks, block size, heads*D] or [blocks, heads, block size, D]. Returns the
    result in query's shape and the logarithm of the softmax's sum, fp32, where asked for.
    """
    call = _parse(options)
    rows = _rows(query, call)
    keys, values = _cached(key, call, len(rows)), _cached(value, call, len(rows))
    result = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = _empty_lse(query, call)
    for index, (place, held) in enumerate(zip(rows, _kv_lengths(keys, call), strict=True)):
        asked = _heads_first(query, place, call)
        if held and asked.shape[1]:
            part, sums = _one(asked, keys[index][:, :held], values[index][:, :held], call)
            _heads_first(result, place, call).copy_(part)
            if call.softmax_lse_flag:
                _lse_place(lse, place, call).copy_(sums)
    return result, lse


def attention_out(
    *tensors: Tensor, workspace: Tensor | None = None, out: list[Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    """The same into given tensors; the workspace is not used."""
    for target, source in zip(out, attention(*tensors, **options), strict=True):
        if source.numel():
            target.copy_(source)
    return out[0], out[1]


def workspace(query: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    """A small buffer, as a card would ask for one."""
    return torch.zeros(1024, dtype=torch.uint8)


def _parse(options: dict[str, Any]) -> _Call:
    known: dict[str, Any] = {}
    for name, given in options.items():
        name = _NAMES_IN_V2.get(name, name)
        if name in _Call.__dataclass_fields__:
            known[name] = given
        elif name in _WITHOUT_EFFECT:
            if _WITHOUT_EFFECT[name] not in (None, given):
                raise NotImplementedError(f"attention with {name} is not emulated")
        elif isinstance(given, Tensor) or given not in (None, 0, False):
            raise NotImplementedError(f"attention with {name} is not emulated")
    call = _Call(**known)
    if call.sparse_mode not in (0, 3):
        raise NotImplementedError(f"attention with sparse_mode={call.sparse_mode} is not emulated")
    if call.sparse_mode == 3:
        _check_causal_mask(call.atten_mask)
    if call.block_table is not None and call.actual_seq_lengths_kv is None:
        raise ValueError("attention over a block table needs actual_seq_lengths_kv")
    if call.input_layout == "TND" and (call.actual_seq_lengths is None or call.actual_seq_lengths_kv is None):
        raise ValueError("attention in layout TND needs both lists of lengths")
    return call


def _check_causal_mask(mask: Tensor | None) -> None:
    if mask is None or tuple(mask.shape[-2:]) != (_MASK_SIZE, _MASK_SIZE):
        raise ValueError(f"sparse_mode=3 needs atten_mask of {_MASK_SIZE} x {_MASK_SIZE}")
    # the corners tell a triangle of masked places from its transpose and from its complement
    corners = (bool(mask[..., 0, 0].any()), bool(mask[..., 0, 1].any()), bool(mask[..., -1, 0].any()))
    if corners != (False, True, False):
        raise ValueError("atten_mask of sparse_mode=3 must be True above the diagonal, and only there")


def _rows(query: Tensor, call: _Call) -> list[tuple[int, int, int]]:
    """For each sequence: batch index (0 in TND), first and last + 1 of its query rows."""
    lengths = call.actual_seq_lengths
    if call.input_layout == "TND":
        assert lengths is not None
        starts = [0, *lengths[:-1]]
        return [(0, int(start), int(end)) for start, end in zip(starts, lengths, strict=True)]
    size = query.shape[2] if call.input_layout == "BNSD" else query.shape[1]
    if lengths is None:
        return [(b, 0, size) for b in range(query.shape[0])]
    if len(lengths) == 1:
        lengths = list(lengths) * query.shape[0]
    return [(b, 0, int(length)) for b, length in enumerate(lengths)]


def _heads_first(tensor: Tensor, place: tuple[int, int, int], call: _Call) -> Tensor:
    """A view [N, rows, D] of one sequence."""
    batch, start, end = place
    if call.input_layout == "TND":
        return tensor[start:end].transpose(0, 1)
    if call.input_layout == "BNSD":
        return tensor[batch, :, start:end]
    if call.input_layout == "BSND":
        return tensor[batch, start:end].transpose(0, 1)
    if call.input_layout == "BSH":
        return tensor[batch, start:end].unflatten(-1, (call.num_heads, -1)).transpose(0, 1)
    raise NotImplementedError(f"attention in layout {call.input_layout} is not emulated")


def _cached(cache: Tensor, call: _Call, sequences: int) -> list[Tensor]:
    """Keys or values of each sequence as [heads, positions, D], positions beyond its length included."""
    if call.block_table is None:
        if call.input_layout == "TND":
            assert call.actual_seq_lengths_kv is not None
            ends = [int(end) for end in call.actual_seq_lengths_kv]
            return [cache[a:b].transpose(0, 1) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        if call.input_layout == "BSH":
            cache = cache.unflatten(-1, (call.kv_heads, -1))
        return list(cache if call.input_layout == "BNSD" else cache.transpose(1, 2))
    assert call.actual_seq_lengths_kv is not None
    if cache.dim() == 3:
        cache = cache.unflatten(-1, (call.kv_heads, -1)).transpose(1, 2)
    if cache.shape[1:3] != (call.kv_heads, call.block_size):
        raise ValueError(
            f"a cache of {tuple(cache.shape)} is not of {call.kv_heads} heads and blocks of {call.block_size}"
        )
    found = []
    for row, length in zip(call.block_table.tolist(), _each(call.actual_seq_lengths_kv, sequences), strict=True):
        blocks = row[: -(-length // call.block_size)]
        if len(blocks) * call.block_size < length or any(not 0 <= b < cache.shape[0] for b in blocks):
            raise IndexError(
                f"a block table row {blocks} does not hold {length} positions of a cache of {cache.shape[0]} blocks"
            )
        found.append(cache[blocks].transpose(0, 1).flatten(1, 2))
    return found


def _kv_lengths(keys: list[Tensor], call: _Call) -> list[int]:
    if call.actual_seq_lengths_kv is None or (call.input_layout == "TND" and call.block_table is None):
        return [key.shape[1] for key in keys]
    return _each(call.actual_seq_lengths_kv, len(keys))


def _each(lengths: list[int], sequences: int) -> list[int]:
    return [int(length) for length in (list(lengths) * sequences if len(lengths) == 1 else lengths)]


def _one(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """[N, S, D] against [heads, T, D]: the result, and the logarithms of the sums [N, S]."""
    grouped = query.float().unflatten(0, (call.kv_heads, -1))
    scores = torch.einsum("hgsd,htd->hgst", grouped, key.float()).flatten(0, 1) * call.scale
    size, held = scores.shape[1:]
    if call.sparse_mode == 3:
        position = torch.arange(size)[:, None] + held - size
        scores = scores.masked_fill(torch.arange(held) > position, float("-inf"))
    elif call.atten_mask is not None and size > 1:
        scores = scores.masked_fill(
            call.atten_mask.reshape(-1, *call.atten_mask.shape[-2:])[0, :size, :held].bool(), float("-inf")
        )
    sums = scores.logsumexp(-1)
    weights = torch.nan_to_num((scores - sums[..., None]).exp()).unflatten(0, (call.kv_heads, -1))
    return torch.einsum("hgst,htd->hgsd", weights, value.float()).flatten(0, 1).to(query.dtype), sums


def _empty_lse(query: Tensor, call: _Call) -> Tensor:
    if not call.softmax_lse_flag:
        return torch.zeros(0)
    if call.input_layout == "TND":
        return torch.full((query.shape[0], call.num_heads, 1), float("inf"))
    rows = query.shape[2] if call.input_layout == "BNSD" else query.shape[1]
    return torch.full((query.shape[0], call.num_heads, rows, 1), float("inf"))


def _lse_place(lse: Tensor, place: tuple[int, int, int], call: _Call) -> Tensor:
    batch, start, end = place
    return lse[start:end, :, 0].transpose(0, 1) if call.input_layout == "TND" else lse[batch, :, start:end, 0]


KERNELS = {
    "npu_fused_infer_attention_score": attention,
    "npu_fused_infer_attention_score.out": attention_out,
    "npu_fused_infer_attention_score_v2": attention,
    "npu_fused_infer_attention_score_v2.out": attention_out,
    "_npu_fused_infer_attention_score_get_max_workspace": workspace,
    "_npu_fused_infer_attention_score_v2_get_max_workspace": workspace,
}
