"""What the operators of a GE graph compute, in torch, on CPU tensors: one function each, by the operator's type.

A function gets the operator's inputs in order (None for one that is left out) and its attributes, and returns a
tensor or a tuple of them. Semantics are those of torchair's converters and CANN's operator list, for what the
project's graphs hold. Operators of two inputs want one dtype, as CANN has them: torchair casts where torch would
promote.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import attention, cache, pointwise

Attributes = dict[str, Any]

# GE's numbers of data types (its Python side; a GraphDef's `dtype` fields number them otherwise)
DTYPES = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    9: torch.int64,
    11: torch.float64,
    12: torch.bool,
    27: torch.bfloat16,
}


def _same_dtype(compute: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def checked(a: Tensor, b: Tensor, attributes: Attributes) -> Tensor:
        if a.dtype != b.dtype:
            raise TypeError(f"inputs of {a.dtype} and {b.dtype}, which CANN's operators do not mix")
        return compute(a, b)

    return checked


def _one(compute: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, attributes: compute(x)


def _dims(axes: Tensor) -> list[int]:
    return [int(axis) for axis in axes.reshape(-1).tolist()]


def _reduce(compute: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    return lambda x, axes, attributes: compute(x, _dims(axes), attributes["keep_dims"])


def _mat_mul(x1: Tensor, x2: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
    attributes = rest[-1]
    x1 = x1.mT if attributes.get("transpose_x1", attributes.get("adj_x1")) else x1
    x2 = x2.mT if attributes.get("transpose_x2", attributes.get("adj_x2")) else x2
    product = torch.matmul(x1, x2)
    return product if bias is None else product + bias


def _strided_slice(
    x: Tensor, begin: Tensor, end: Tensor, axes: Tensor | None, strides: Tensor | None, attributes: Attributes
) -> Tensor:
    masks = ("shrink_axis_mask", "new_axis_mask", "begin_mask", "end_mask", "ellipsis_mask")
    if any(attributes.get(mask) for mask in masks):
        raise NotImplementedError(f"a slice with masks {attributes} is not simulated")
    begins, ends = _dims(begin), _dims(end)
    steps = [1] * len(begins) if strides is None else _dims(strides)
    for axis, start, stop, step in zip(
        _dims(axes) if axes is not None else range(len(begins)), begins, ends, steps, strict=True
    ):
        index = [slice(None)] * x.dim()
        index[axis] = slice(start, stop, step)
        x = x[tuple(index)]
    return x


def _pad(x: Tensor, paddings: Tensor, value: Tensor | None, attributes: Attributes) -> Tensor:
    pairs = paddings.reshape(-1, 2).tolist()
    flat = [number for pair in reversed(pairs) for number in pair]
    return F.pad(x, flat, value=0 if value is None else value.item())


def _range(start: Tensor, limit: Tensor, delta: Tensor, attributes: Attributes) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _select(condition: Tensor, then: Tensor, other: Tensor, attributes: Attributes) -> Tensor:
    if then.dtype != other.dtype:
        raise TypeError(f"choices of {then.dtype} and {other.dtype}, which CANN's operators do not mix")
    return torch.where(condition, then, other)


def _gather(x: Tensor, indices: Tensor, axis: Tensor, attributes: Attributes) -> Tensor:
    dim = int(axis) % x.dim()
    if bool(((indices < 0) | (indices >= x.shape[dim])).any()):
        raise IndexError(f"GatherV2 with indices outside of {x.shape[dim]}")
    return (
        x.index_select(dim, indices.reshape(-1).long()).unflatten(dim, indices.shape)
        if indices.dim()
        else x.select(dim, int(indices))
    )


def _gather_elements(x: Tensor, index: Tensor, attributes: Attributes) -> Tensor:
    return x.gather(attributes["dim"], index.long())


def _reshape(x: Tensor, shape: Tensor, attributes: Attributes) -> Tensor:
    return x.reshape(_dims(shape))


def _squeeze(x: Tensor, attributes: Attributes) -> Tensor:
    return x.squeeze(tuple(attributes["axis"])) if attributes.get("axis") else x.squeeze()


def _unsqueeze(x: Tensor, attributes: Attributes) -> Tensor:
    for axis in attributes["axes"]:
        x = x.unsqueeze(axis)
    return x


def _rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, *rest: Any) -> Tensor:
    mode = rest[-1].get("mode", rest[-1].get("rotary_mode", 0))
    return pointwise.rotary_mul(x, r1, r2, {0: "half", 1: "interleave"}.get(mode, mode))


def _scatter_pa(
    key: Tensor, key_cache: Tensor, slots: Tensor, value: Tensor, value_cache: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    mode = rest[-1].get("cache_mode", "Norm")
    cache.scatter_pa_kv_cache(key, value, key_cache, value_cache, slots, cache_mode=mode)
    return key_cache, value_cache


def _attention(named: dict[str, Tensor], attributes: Attributes) -> tuple[Tensor, Tensor]:
    """By the inputs' names: key and value are lists of one in GE."""
    given = dict(named)
    query, key, value = given.pop("query"), given.pop("key0"), given.pop("value0")
    for name in ("actual_seq_lengths", "actual_seq_lengths_kv"):
        if name in given:
            given[name] = given[name].tolist()
    without_effect = {"pse_type", "out_dtype", "query_quant_mode"}
    options = {name: given_ for name, given_ in attributes.items() if name not in without_effect}
    return attention.attention(query, key, value, **given, **options)


def _concat(*inputs: Any) -> Tensor:
    *parts, axis, _attributes = inputs
    return torch.cat(parts, int(axis))


COMPUTE: dict[str, Callable[..., Any]] = {
    "Abs": _one(torch.abs),
    "Add": _same_dtype(torch.add),
    "AddRmsNorm": lambda x1, x2, gamma, a: _add_rms_norm(x1, x2, gamma, a["epsilon"]),
    "ArgMaxV2": lambda x, dim, a: x.argmax(int(dim)).to(DTYPES[a["dtype"]]),
    "ArgMaxWithValue": lambda x, a: _max(x, a["dimension"], a["keep_dims"]),
    "BatchMatMul": _mat_mul,
    "BatchMatMulV2": _mat_mul,
    "BroadcastTo": lambda x, shape, a: x.expand(_dims(shape)),
    "Cast": lambda x, a: x.to(DTYPES[a["dst_type"]]),
    "ClipByValueV2": lambda x, low, high, a: x.clamp(low.to(x.dtype), high.to(x.dtype)),
    "ConcatV2": _concat,
    "Cos": _one(torch.cos),
    "Cumsum": lambda x, axis, a: x.cumsum(int(axis)),
    "Div": _same_dtype(torch.div),
    "Equal": _same_dtype(torch.eq),
    "Exp": _one(torch.exp),
    "Fill": lambda dims, value, a: value.expand(_dims(dims)).clone(),
    "FloorDiv": _same_dtype(torch.floor_divide),
    "FloorMod": _same_dtype(torch.remainder),
    "GatherElements": _gather_elements,
    "GatherV2": _gather,
    "Greater": _same_dtype(torch.gt),
    "GreaterEqual": _same_dtype(torch.ge),
    "Identity": _one(torch.clone),
    "Less": _same_dtype(torch.lt),
    "LessEqual": _same_dtype(torch.le),
    "LogicalAnd": _same_dtype(torch.logical_and),
    "LogicalNot": _one(torch.logical_not),
    "LogicalOr": _same_dtype(torch.logical_or),
    "MaskedFill": lambda x, mask, value, a: torch.where(mask, value.to(x.dtype), x),
    "MatMul": _mat_mul,
    "MatMulV2": _mat_mul,
    "MatMulV3": _mat_mul,
    "Maximum": _same_dtype(torch.maximum),
    "Minimum": _same_dtype(torch.minimum),
    "Mul": _same_dtype(torch.mul),
    "Neg": _one(torch.neg),
    "NotEqual": _same_dtype(torch.ne),
    "OnesLike": _one(torch.ones_like),
    "Pack": lambda *inputs: torch.stack(inputs[:-1], inputs[-1]["axis"]),
    "PadV3": _pad,
    "Pow": _same_dtype(torch.pow),
    "Range": _range,
    "RealDiv": _same_dtype(torch.div),
    "Reciprocal": _one(torch.reciprocal),
    "ReduceMax": _reduce(lambda x, dims, keep: x.amax(dims, keep)),
    "ReduceMean": _reduce(lambda x, dims, keep: x.mean(dims, keep)),
    "ReduceSum": _reduce(lambda x, dims, keep: x.sum(dims, keep)),
    "Reshape": _reshape,
    "RmsNorm": lambda x, gamma, a: pointwise.rms_norm(x, gamma, a["epsilon"]),
    "RotaryMul": _rotary_mul,
    "RotaryPositionEmbedding": _rotary_mul,
    "Rsqrt": _one(torch.rsqrt),
    "ScatterNdUpdate": lambda target, indices, updates, a: cache.scatter_nd_update_(target, indices, updates),
    "ScatterPaKvCache": _scatter_pa,
    "SelectV2": _select,
    "Sigmoid": _one(torch.sigmoid),
    "Sin": _one(torch.sin),
    "SoftmaxV2": lambda x, a: x.softmax(a["axes"][0]),
    "SplitV": lambda x, sizes, dim, a: x.split(_dims(sizes), int(dim)),
    "Square": _one(torch.square),
    "Squeeze": _squeeze,
    "StridedSliceV2": _strided_slice,
    "Sub": _same_dtype(torch.sub),
    "SwiGlu": lambda x, a: pointwise.swiglu(x, a["dim"]),
    "Swish": lambda x, a: F.silu(x) if a.get("scale", 1.0) == 1.0 else x * torch.sigmoid(a["scale"] * x),
    "TensorMove": _one(torch.clone),
    "Tile": lambda x, multiples, a: x.repeat(_dims(multiples)),
    "Transpose": lambda x, order, a: x.permute(_dims(order)),
    "Unsqueeze": _unsqueeze,
    "ZerosLike": _one(torch.zeros_like),
}
# Operators that are called with their inputs by name
COMPUTE_NAMED: dict[str, Callable[[dict[str, Tensor], Attributes], Any]] = {"FusedInferAttentionScore": _attention}


def _add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    return pointwise.add_rms_norm(x1, x2, gamma, epsilon)


def _max(x: Tensor, dim: int, keep: bool) -> tuple[Tensor, Tensor]:
    values, indices = x.max(dim, keepdim=keep)
    return indices.to(torch.int32), values


def constant(definition: Any, dtype: torch.dtype) -> Tensor:
    """The tensor of a Const operator's `value`."""
    shape = tuple(definition.desc.shape.dim)
    data = bytearray(definition.data)
    if not data or not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype)[: math.prod(shape)].reshape(shape).clone()
