"""Two-level views of a row over the vocabulary: reduce blocks first, then look inside one block only.

A full-vocabulary argmax, sort or cumulative sum costs many times a block reduction, which is vectorised. Results
depend on the row alone: a block is reduced in the same order whatever the batch, ties go to the lower token id.
Nothing here knows requests or sampling parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1


def block_max(rows: Tensor) -> Tensor:
    """Maxima of blocks of BLOCK columns, the last one shorter: [R, V] -> [R, ceil(V / BLOCK)]. NaN wins."""
    whole = rows.shape[1] // BLOCK
    parts = [rows[:, : whole * BLOCK].view(len(rows), whole, BLOCK).amax(-1)] if whole else []
    if rows.shape[1] % BLOCK:
        parts.append(rows[:, whole * BLOCK :].amax(-1, keepdim=True))
    return torch.cat(parts, dim=1)


def block_sum(rows: Tensor) -> Tensor:
    """Sums of blocks of BLOCK columns, the last one shorter: [R, V] -> [R, ceil(V / BLOCK)]."""
    whole = rows.shape[1] // BLOCK
    parts = [rows[:, : whole * BLOCK].view(len(rows), whole, BLOCK).sum(-1)] if whole else []
    if rows.shape[1] % BLOCK:
        parts.append(rows[:, whole * BLOCK :].sum(-1, keepdim=True))
    return torch.cat(parts, dim=1)


def blocks_at(rows: Tensor, blocks: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """Content and column numbers of the blocks numbered `blocks` int64 [R, C]: two tensors [R, C * BLOCK].

    Columns past the end of the vocabulary hold `fill`.
    """
    columns = (blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=rows.device)).flatten(1)
    content = rows.gather(1, columns.clamp(max=rows.shape[1] - 1))
    return content.masked_fill_(columns >= rows.shape[1], fill), columns


def first_argmax(rows: Tensor, maxima: Tensor) -> Tensor:
    """The lowest column holding the maximum (or a NaN): int64 [R]. `maxima` is `block_max(rows)`."""
    block = maxima.argmax(-1, keepdim=True)
    content, _ = blocks_at(rows, block, float("-inf"))
    return block.squeeze(1) * BLOCK + content.argmax(-1)


def top_keys(rows: Tensor, maxima: Tensor, width: int) -> Tensor:
    """The first `width` tokens of each row by (value down, id up), as order keys int64 [R, min(width, V)].

    The blocks with the `width` highest maxima hold them all: a token of another block has `width` such maxima
    before it.
    """
    if width < maxima.shape[1]:
        block_keys = _order_keys(maxima, _columns(maxima))
        _, blocks = split_keys(block_keys.topk(width, sorted=False).values)
        keys = _order_keys(*blocks_at(rows, blocks, float("-inf")))
    else:
        keys = _order_keys(rows, _columns(rows))
    if width < rows.shape[1]:
        return keys.topk(width).values
    return keys.sort(-1, descending=True).values


def split_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Values float32 and ids int64 that made these order keys."""
    ordered = (keys >> _ID_BITS).to(torch.int32)
    return _flip_negative(ordered).view(torch.float32), _ID_MASK - (keys & _ID_MASK)


def _columns(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[1], device=rows.device)


def _order_keys(values: Tensor, ids: Tensor) -> Tensor:
    # integers that compare as (value, -id); a NaN counts as +inf, because its sign bit means nothing
    bits = values.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf")).view(torch.int32)
    return (_flip_negative(bits).to(torch.int64) << _ID_BITS) | (_ID_MASK - ids)


def _flip_negative(bits: Tensor) -> Tensor:
    # IEEE floats compare as sign and magnitude: flipping the magnitude of negative ones makes them compare as
    # integers, and flipping again undoes it
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
