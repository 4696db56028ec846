"""Huawei's own lowering without an engine behind it: what torchair makes of a model, as graphs that tests can read.

`capture()` lets torch.compile with torchair's backend run through (dynamo, functionalisation, conversion to GE
operators, torchair's graph passes), and hands out each optimised graph. What needs the engine itself is answered:
starting and ending it, the device's number and name, and the questions whether the installed CANN knows an operator
or parameter (`Lowered.asked` keeps those). Does not know whether the engine would accept the graph, or what it
computes.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class DataNode:
    """An input of a graph: its position, shape, dtype (GE's number) and where it lives, "NPU" or "CPU"."""

    name: str
    shape: tuple[int, ...]
    dtype: int
    placement: str
    uses: int


@dataclass
class GeGraph:
    """One optimised GE graph. `definition` is the GraphDef itself: `definition.op`, each with type, input, attr."""

    definition: Any
    # output index -> input index: outputs that the engine writes into the memory of an input
    assigned: dict[int, int] = field(default_factory=dict)
    # indices of inputs that an operator updates in place
    updated: list[int] = field(default_factory=list)

    @property
    def operators(self) -> Counter[str]:
        """How many operators of each type, inputs and constants left out."""
        return Counter(op.type for op in self.definition.op if op.type not in ("Data", "Const", "NetOutput"))

    @property
    def inputs(self) -> list[DataNode]:
        """The Data nodes in order."""
        uses = Counter(name.rsplit(":", 1)[0] for op in self.definition.op for name in op.input)
        return [_data_node(op, uses[op.name]) for op in self.definition.op if op.type == "Data"]

    @property
    def outputs(self) -> list[str]:
        """`operator:index` of each value that the graph returns."""
        for op in self.definition.op:
            if op.type == "NetOutput":
                return [name for name in op.input if name and not name.endswith(":-1")]
        return []

    def producer(self, value: str) -> Any:
        """The operator that makes a value named `operator:index`. Raises KeyError."""
        return {op.name: op for op in self.definition.op}[value.rsplit(":", 1)[0]]

    @property
    def copies(self) -> int:
        """Operators that copy a tensor so that another may write into it: 0 where the cache is updated in place."""
        return self.operators["TensorMove"]


@dataclass
class Lowered:
    """What `capture` has seen so far."""

    graphs: list[GeGraph] = field(default_factory=list)
    # operator type, inputs, attributes of each question whether the installed CANN supports them
    asked: list[tuple[str, list[str], list[str]]] = field(default_factory=list)

    @property
    def graph(self) -> GeGraph:
        """The only graph. Raises AssertionError where there is another number of them."""
        assert len(self.graphs) == 1, f"{len(self.graphs)} graphs were lowered, not one"
        return self.graphs[0]


@contextlib.contextmanager
def capture() -> Iterator[Lowered]:
    """Collects every graph that torchair lowers meanwhile. Compile with `compiler_config()` or with run_eagerly set."""
    from torchair._ge_concrete_graph.fx2ge_converter import GeConcreteGraph

    answer_for_engine()
    seen = Lowered()
    optimise = GeConcreteGraph.optimize_graph_without_runtime

    def keep(self: Any, *arguments: Any, **options: Any) -> Any:
        result = optimise(self, *arguments, **options)
        seen.graphs.append(GeGraph(self.graph, dict(self._graph_output_ref_input), sorted(self._ref_data_idx)))
        return result

    def supported(operator: str, inputs: list[str], attributes: list[str]) -> str:
        seen.asked.append((operator, list(inputs), list(attributes)))
        return ""

    from torchair.core import _torchair

    with (
        mock.patch.object(GeConcreteGraph, "optimize_graph_without_runtime", keep),
        mock.patch.object(_torchair, "check_cann_compat", supported),
    ):
        yield seen


def compiler_config(**options: Any) -> Any:
    """A torchair CompilerConfig that lowers fully and then runs the FX graph operator by operator.

    Options are set by their path: `compiler_config(experimental_config__frozen_parameter=True)`.
    """
    from torchair import CompilerConfig

    config = CompilerConfig()
    config.debug.run_eagerly = True
    for path, value in options.items():
        *parents, name = path.split("__")
        holder = config
        for parent in parents:
            holder = getattr(holder, parent)
        setattr(holder, name, value)
    return config


def answer_for_engine() -> None:
    """Replaces, for this process, the entry points of torchair that would start the graph engine. Safe to repeat."""
    import torch_npu
    import torchair.core._backend as backend
    from torchair.core import _torchair

    backend._cached_device_id = 0
    _torchair.InitializeGraphEngine = lambda options: None
    _torchair.FinalizeGraphEngine = lambda: None
    _torchair.check_cann_compat = lambda operator, inputs, attributes: ""
    _torchair.get_registered_ir_def = lambda operator: ("the stand-in has no operator definitions", [], [], [])
    torch_npu.npu.get_device_name = lambda device=None: "Ascend910B4"


def _data_node(op: Any, uses: int) -> DataNode:
    described = op.output_desc[0]
    return DataNode(op.name, tuple(described.shape.dim), described.dtype, described.device_type, uses)
