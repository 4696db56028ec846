"""From logits and uniforms to tokens: temperature, top-k, top-p, min-p and the inverse CDF in vocabulary order.

Probabilities are summed as integers (the likeliest token weighs 2**42), and integer sums are exact in any order:
what is drawn depends on the row and its uniform alone, never on the batch, and a token of weight 0 cannot be
drawn. Tokens under 2**-42 of the likeliest one weigh 0. Requests, slots and penalties are unknown here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm_dist.workers.sampling_blocks import block_sum, blocks_at, split_keys, top_keys

_ONE = 2.0**42
_FLOAT_MAX = torch.finfo(torch.float32).max
# How many of the likeliest tokens top-k and top-p look at, one after the other; the last resort is a full sort
_WIDTHS = (64, 1024, 8192)


@dataclass(frozen=True)
class DrawOptions:
    """Parameters of R rows, on the host: float32 `temperature` > 0 and `min_p`, int64 `top_k` (0: off),
    float64 `top_p` (1: off), float64 `uniform` in [0, 1)."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float32]
    uniform: NDArray[np.float64]

    def rows(self, rows: NDArray[np.int64]) -> DrawOptions:
        """The options of some of the rows."""
        return DrawOptions(
            self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.uniform[rows]
        )


def draw(logits: Tensor, maxima: Tensor, options: DrawOptions) -> Tensor:
    """Draw from the whole vocabulary (min-p, but no top-k or top-p): int64 [R].

    `logits` float32 [R, V] is overwritten; `maxima` is its `block_max`. Where a row's maximum is not finite the
    result is some valid token id.
    """
    weights = _weights(logits, maxima.amax(-1, keepdim=True), options, in_place=True)
    if options.min_p.any():
        weights.masked_fill_(weights < _column(options.min_p, logits.device), 0.0)
    totals = _as_integers(block_sum(weights))
    block, rest = _locate(totals, _threshold(totals.sum(-1), options, logits.device))
    inside, columns = blocks_at(weights, block.unsqueeze(1), 0.0)
    index, _ = _locate(_as_integers(inside), rest)
    # the float sum of a block and the integers inside it round apart: the rest may lie past the last token
    places = torch.arange(1, inside.shape[1] + 1, device=logits.device)
    last = ((inside > 0) * places).amax(-1) - 1
    return columns[:, 0] + torch.minimum(index, last).clamp(min=0)


def draw_filtered(logits: Tensor, maxima: Tensor, options: DrawOptions) -> Tensor:
    """Draw from what top-k, top-p and min-p leave: int64 [R]. Same arguments as `draw`; `logits` is kept.

    Each of the three keeps a beginning of the order (logit down, id up), so only that beginning is looked at,
    and more of it only for rows whose nucleus turns out to be longer.
    """
    vocab_size = logits.shape[1]
    row_mass = _row_mass(logits, maxima, options)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    pending = np.arange(len(logits))
    for width in (*(width for width in _WIDTHS if width < vocab_size), vocab_size):
        part = options.rows(pending)
        if (part.top_k > width).all():
            continue
        rows = torch.from_numpy(pending).to(logits.device)
        keys = top_keys(_take(logits, rows), _take(maxima, rows), width)
        tokens[rows], complete = _draw_from_keys(keys, part, row_mass[rows])
        if width == vocab_size or ((part.top_k > 0) & (part.top_k <= width)).all():
            break
        pending = pending[~complete.cpu().numpy()]
        if not len(pending):
            break
    return tokens


def _draw_from_keys(keys: Tensor, options: DrawOptions, row_mass: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row, and whether `keys` reached to the end of what its top-k and top-p keep."""
    device, width = keys.device, keys.shape[1]
    values, ids = split_keys(keys)
    weights = _weights(values, values[:, :1], options, in_place=False)
    top_k = _column(options.top_k, device)
    has_top_k = top_k > 0
    places = torch.arange(width, device=device)
    mass = _as_integers(weights) * (~has_top_k | (places < top_k))
    until = mass.cumsum(-1)
    total = torch.where(has_top_k, until[:, -1:], row_mass.unsqueeze(1))
    nucleus = total.double() * _column(options.top_p, device)
    kept = (until - mass < nucleus) & (weights >= _column(options.min_p, device))
    complete = torch.where(has_top_k, top_k <= width, until[:, -1:] >= nucleus).squeeze(1)
    ids, by_id = ids.sort(-1)
    mass = (mass * kept).gather(1, by_id)
    index, _ = _locate(mass, _threshold(mass.sum(-1), options, device))
    return ids.gather(1, index.unsqueeze(1)).squeeze(1), complete


def _row_mass(logits: Tensor, maxima: Tensor, options: DrawOptions) -> Tensor:
    """Integer mass of whole rows, int64 [R]: what top-p is a share of where there is no top-k; else 0."""
    mass = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    rows = np.flatnonzero(options.top_k == 0)
    if len(rows):
        index = torch.from_numpy(rows).to(logits.device)
        peak = _take(maxima, index).amax(-1, keepdim=True)
        weights = _weights(_take(logits, index), peak, options.rows(rows), in_place=False)
        mass[index] = _as_integers(block_sum(weights)).sum(-1)
    return mass


def _weights(logits: Tensor, peak: Tensor, options: DrawOptions, *, in_place: bool) -> Tensor:
    # of a row without a finite maximum every finite logit gets weight 0; its token is not drawn anyway
    peak = torch.where(peak.isfinite(), peak, _FLOAT_MAX)
    scaled = logits.sub_(peak) if in_place else logits - peak
    return scaled.mul_(_column(1.0 / options.temperature, logits.device)).exp_()


def _as_integers(weights: Tensor) -> Tensor:
    return (weights.double() * _ONE).nan_to_num_(nan=0.0, posinf=0.0).to(torch.int64)


def _threshold(total: Tensor, options: DrawOptions, device: torch.device) -> Tensor:
    # a uniform is at most 1 - 2**-53, so the product stays below the total after rounding too
    return (torch.from_numpy(options.uniform).to(device) * total.double()).to(torch.int64)


def _locate(mass: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose cumulative mass exceeds `threshold`, and what is left of the threshold before it."""
    until = mass.cumsum(-1)
    index = (until <= threshold.unsqueeze(1)).sum(-1).clamp(max=mass.shape[1] - 1)
    before = (until - mass).gather(1, index.unsqueeze(1)).squeeze(1)
    return index, threshold - before


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows if len(index) == len(rows) else rows[index]


def _column(values: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device).unsqueeze(1)
