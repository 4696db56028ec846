"""A graph engine in place of CANN's: runs the GE graph that torchair has lowered, operator by operator, on the CPU.

`install()` makes torchair load and run its graphs here, on CPU tensors and on the simulated device's; so everything
up to the engine is Huawei's: tracing, conversion, passes, the cache of compiled graphs, outputs written into inputs.
An operator that `engine_operators` does not know is refused when the graph is loaded. `runs` counts what was loaded
and launched. Knows nothing of speed, fusion or memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import engine_operators, lowering
from .engine_operators import COMPUTE, COMPUTE_NAMED, DTYPES

_COLLECTIVES = ("HcomAllReduce", "HcomAllGather", "HcomBroadcast")
_STRUCTURE = ("Data", "Const", "NetOutput")
# operator -> its inputs that it writes into
_WRITTEN = {"ScatterNdUpdate": (0,), "ScatterPaKvCache": (1, 4)}
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Transpose", "BroadcastTo", "StridedSliceV2", "SplitV")


@dataclass
class Runs:
    """How often graphs were loaded and launched in this process."""

    loaded: int = 0
    launched: int = 0


runs = Runs()


def install() -> None:
    """Replaces the engine in this process. Needs torch_npu imported. Safe to repeat."""
    from torchair.core._backend import TorchNpuGraph

    lowering.answer_for_engine()
    TorchNpuGraph.load = _load
    TorchNpuGraph.compile = lambda self: None
    TorchNpuGraph.run = _run


def _load(self: Any, ge_graph: Any, options: dict[str, str] | None = None) -> None:
    known = {*COMPUTE, *COMPUTE_NAMED, *_COLLECTIVES, *_STRUCTURE}
    unknown = sorted({op.type for op in ge_graph.op} - known)
    if unknown:
        raise NotImplementedError(f"the stand-in's graph engine does not know {', '.join(unknown)}")
    _refuse_writes_into_views(ge_graph)
    self.simulated = Program(ge_graph)
    runs.loaded += 1


def _refuse_writes_into_views(graph: Any) -> None:
    """torchair takes such a write for one into a value of its own; whether a card's reaches the input is unknown."""
    makers = {op.name: op.type for op in graph.op}
    for op in graph.op:
        for index in _WRITTEN.get(op.type, ()):
            maker = makers[op.input[index].rsplit(":", 1)[0]]
            if maker in _VIEWS:
                raise ValueError(
                    f"{op.name} writes into what a {maker} made: let it write into an input of the graph itself"
                )


def _run(
    self: Any, inputs: list[Tensor], assigned_outputs: Sequence[Tensor | None] = (), stream: Any = None
) -> list[Tensor]:
    runs.launched += 1
    return self.simulated.run(list(inputs), list(assigned_outputs))


class Program:
    """A loaded graph: its operators in an order in which each comes after its inputs."""

    def __init__(self, graph: Any) -> None:
        self._by_name = {op.name: op for op in graph.op}
        self._operators = self._ordered(graph.op)
        self._output_dtypes = [DTYPES[number] for number in graph.attr["_output_dtypes"].list.i]
        self._proto_dtypes = _dtypes_of_descriptions()

    def run(self, inputs: list[Tensor], assigned: list[Tensor | None]) -> list[Tensor]:
        """One launch. `assigned`: for each output a tensor to write into, or None for a new one."""
        device = next((tensor.device for tensor in inputs if tensor.device.type == "npu"), None)
        if device is not None:
            torch.npu.current_stream().synchronize()
        computed: dict[str, tuple[Tensor, ...]] = {}
        outputs: list[Tensor] = []
        for op in self._operators:
            values = [self._value(computed, name) for name in op.input if not _is_control(name)]
            if op.type == "NetOutput":
                outputs = [value for value in values if value is not None]
            else:
                computed[op.name] = self._compute(op, values, inputs)
        return [
            self._give(*pair, device)
            for pair in zip(outputs, self._output_dtypes, _padded(assigned, len(outputs)), strict=True)
        ]

    def _ordered(self, operators: Any) -> list[Any]:
        ordered: dict[str, Any] = {}

        def visit(op: Any) -> None:
            if op.name not in ordered:
                for name in op.input:
                    if name:
                        visit(self._by_name[name.rsplit(":", 1)[0]])
                ordered[op.name] = op

        for op in operators:
            visit(op)
        return list(ordered.values())

    def _value(self, computed: dict[str, tuple[Tensor, ...]], name: str) -> Tensor | None:
        if not name:
            return None
        producer, index = name.rsplit(":", 1)
        return computed[producer][int(index)]

    def _compute(self, op: Any, values: list[Tensor | None], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        if op.type == "Data":
            tensor = inputs[op.attr["index"].i]
            return (_on_host(tensor),)
        if op.type == "Const":
            return (engine_operators.constant(op.attr["value"].t, self._proto_dtypes[op.attr["value"].t.desc.dtype]),)
        attributes = {name: _attribute(value) for name, value in op.attr.items() if not name.startswith("_")}
        try:
            if op.type in _COLLECTIVES:
                result = _collective(op.type, values[0], attributes)
            elif op.type in COMPUTE_NAMED:
                named = {d.name: v for d, v in zip(op.input_desc, values, strict=True) if v is not None}
                result = COMPUTE_NAMED[op.type](named, attributes)
            else:
                result = COMPUTE[op.type](*values, attributes)
        except Exception as error:
            error.add_note(f"in {op.name} of a GE graph, with inputs {list(op.input)}")
            raise
        return result if isinstance(result, tuple) else (result,)

    def _give(self, value: Tensor, dtype: torch.dtype, into: Tensor | None, device: torch.device | None) -> Tensor:
        if value.dtype != dtype:
            raise TypeError(f"the graph gives {value.dtype} where torchair expects {dtype}")
        if into is None:
            into = torch.empty(value.shape, dtype=dtype, device=device or "cpu")
        target = _on_host(into)
        if target.data_ptr() != value.data_ptr():
            target.copy_(value)
        return into


def _on_host(tensor: Tensor) -> Tensor:
    from .kernels import host_view

    return host_view(tensor) if tensor.device.type == "npu" else tensor


def _is_control(name: str) -> bool:
    return name.endswith(":-1")


def _padded(assigned: list[Tensor | None], count: int) -> list[Tensor | None]:
    return [*assigned, *[None] * (count - len(assigned))]


def _attribute(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "list":
        return [*value.list.i, *value.list.f, *(text.decode() for text in value.list.s)]
    if kind == "s":
        return value.s.decode()
    return getattr(value, kind) if kind else None


def _dtypes_of_descriptions() -> dict[int, torch.dtype]:
    """GraphDef's own numbers of data types."""
    from torchair._ge_concrete_graph.ge_ir_pb2 import DataType

    names = {
        "DT_FLOAT": torch.float32,
        "DT_FLOAT16": torch.float16,
        "DT_BF16": torch.bfloat16,
        "DT_DOUBLE": torch.float64,
        "DT_INT8": torch.int8,
        "DT_UINT8": torch.uint8,
        "DT_INT16": torch.int16,
        "DT_INT32": torch.int32,
        "DT_INT64": torch.int64,
        "DT_BOOL": torch.bool,
    }
    return {DataType.Value(name): dtype for name, dtype in names.items()}


def _collective(kind: str, value: Tensor | None, attributes: dict[str, Any]) -> Tensor:
    """Through the process group that the graph names: HCCL's, over simulated devices, or gloo's."""
    import torch.distributed as dist

    assert value is not None
    group = _group(attributes["group"])
    on_device = dist.get_backend(group) == "hccl"
    given = value.to("npu") if on_device else value.clone()
    if kind == "HcomAllReduce":
        dist.all_reduce(
            given,
            {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[attributes["reduction"]],
            group,
        )
    elif kind == "HcomBroadcast":
        dist.broadcast(given, attributes["root_rank"], group)
    else:
        gathered = given.new_empty((given.shape[0] * dist.get_world_size(group), *given.shape[1:]))
        dist.all_gather_into_tensor(gathered, given, group)
        given = gathered
    return given.cpu()


def _group(name: str) -> Any:
    import torch.distributed as dist

    for group in dist.distributed_c10d._world.pg_map:
        if dist.get_backend(group) == "hccl":
            backend = group._get_backend(torch.device("npu"))
            if backend.get_hccl_comm_name(dist.get_rank()) == name:
                return group
    return dist.group.WORLD
