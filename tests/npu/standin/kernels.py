"""Kernels of the simulated device: torch's own CPU kernels, on CPU tensors that name the same memory.

`install()` puts one in place of each kernel that torch_npu has for `npu` tensors, but for views and allocation, which
stay Huawei's. While a stream is captured or held back nothing is computed: shapes come from meta tensors, and the
computation is a task of the stream. An operator that only a card has, and that `operators` does not emulate, fails as
CANN would without it.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import operators, runtime

# Allocation, storage and host access: Huawei's code does these over the simulated runtime.
_HUAWEIS = {
    "empty", "empty_strided", "empty_like", "new_empty_strided", "empty_with_format", "unsafe_empty_with_format",
    "empty_with_swapped_memory", "resize_", "resize_as_", "set_", "_to_copy", "_pin_memory", "is_pinned", "is_set_to",
    "record_stream", "_local_scalar_dense", "get_storage_size", "_copy_from_and_resize", "get_npu_format",
    "npu_change_data_ptr", "copy_memory_", "_has_compatible_shallow_copy_type",
}  # fmt: skip
_libraries: list[torch.library.Library] = []
_views: dict[tuple[int, int], torch.UntypedStorage] = {}
_MOST_VIEWS = 10_000


def install() -> int:
    """Registers the kernels; how many. Needs torch_npu imported. Safe to repeat."""
    if _libraries:
        return 0
    operators.install()
    libraries = {name: torch.library.Library(name, "IMPL") for name in ("aten", "npu")}
    found = [op for op in map(_operator, torch._C._dispatch_get_all_op_names()) if op is not None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in found:
            kernel = _contiguous if op is torch.ops.aten.contiguous.default else _kernel(op)
            libraries[op.namespace].impl(op.name().split("::")[1], kernel, "PrivateUse1", allow_override=True)
    _libraries.extend(libraries.values())
    return len(found)


def _operator(name: str) -> torch._ops.OpOverload | None:
    """The operator of a dispatcher name, if it gets a simulated kernel."""
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    computed = {"aten": "PrivateUse1", "npu": "CPU"}.get(namespace)
    if computed is None or base in _HUAWEIS or not torch._C._dispatch_has_kernel_for_dispatch_key(name, computed):
        return None
    try:
        op = getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
    except AttributeError:
        return None
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
    return None if is_view and base != "contiguous" else op


def _contiguous(tensor: Tensor, *, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    return tensor.clone(memory_format=memory_format)


def host_view(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of a simulated device's tensor. Does not keep the memory."""
    storage = tensor.untyped_storage()
    address, size = storage.data_ptr(), storage.nbytes()
    if not size or not address:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    view = _views.get((address, size))
    if view is None:
        if len(_views) >= _MOST_VIEWS:
            _views.clear()
        memory = (ctypes.c_char * size).from_address(address)
        view = _views[address, size] = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(view, tensor.storage_offset(), tensor.size(), tensor.stride())


class _Call:
    """One call of an operator: its arguments with each `npu` tensor replaced, and what became of which."""

    def __init__(
        self, op: Any, arguments: tuple[Any, ...], options: dict[str, Any], replace: Callable[[Tensor], Tensor]
    ):
        self.op = op
        self.replace = replace
        self.originals: dict[int, Tensor] = {}
        self.device: torch.device | None = None
        self.arguments = tuple(self._swap(value) for value in arguments)
        self.options = {name: self._swap(value) for name, value in options.items()}

    def _swap(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.device.type != "npu":
                self.originals[id(value)] = value
                return value
            self.device = value.device
            replaced = self.replace(value)
            self.originals[id(replaced)] = value
            return replaced
        if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
            return [self._swap(item) for item in value]
        if isinstance(value, torch.device) and value.type == "npu":
            self.device = value
            return torch.device("cpu")
        if isinstance(value, torch.Generator):
            raise NotImplementedError(f"{self.op.name()} with a generator is not simulated")
        return value

    def run(self) -> Any:
        return self.op(*self.arguments, **self.options)

    def results(self, returned: Any, make: Callable[[Tensor], Tensor]) -> Any:
        """What the caller gets: tensors that it gave, resized if need be, and new ones from `make`."""
        if isinstance(returned, Tensor):
            given = self.originals.get(id(returned))
            if given is None:
                return make(returned)
            if given.shape != returned.shape:
                given.resize_(returned.shape)
                _give(given, returned)
            return given
        if isinstance(returned, list | tuple):
            return type(returned)(self.results(item, make) for item in returned)
        return returned


def _give(given: Tensor, computed: Tensor) -> None:
    """Copies what was computed aside, unless only its shape is known."""
    if computed.device.type != "meta":
        host_view(given).copy_(computed)


def _kernel(op: Any) -> Callable[..., Any]:
    # some of Huawei's schemas do not say that they write into `out`
    writes = any(a.name == "out" or (a.alias_info and a.alias_info.is_write) for a in op._schema.arguments)

    @functools.wraps(op)
    def kernel(*arguments: Any, **options: Any) -> Any:
        stream = _stream_with_work() if runtime.deferring.value else 0
        if stream:
            return _submit(op, arguments, options, stream, writes)
        return _at_once(op, arguments, options)

    return kernel


def _at_once(op: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    call = _Call(op, arguments, options, host_view)

    def on_device(computed: Tensor) -> Tensor:
        made = _empty(computed, call.device)
        host_view(made).copy_(computed)
        return made

    return call.results(call.run(), on_device)


def _submit(op: Any, arguments: tuple[Any, ...], options: dict[str, Any], stream: int, writes: bool) -> Any:
    """Computes shapes now, the rest in the stream's turn."""
    if op is torch.ops.aten.copy_.default and _host_copy(arguments, options):
        import torch_npu

        torch_npu.npu.current_stream().synchronize()
        return _at_once(op, arguments, options)
    is_copy = op is torch.ops.aten.copy_.default
    shapes = _Call(op, arguments, options, _without_data)
    made: list[Tensor] = []

    def on_device(computed: Tensor) -> Tensor:
        made.append(_empty(computed, shapes.device))
        return made[-1]

    results = arguments[0] if is_copy else shapes.results(_shapes_of(shapes, writes), on_device)
    call = _Call(op, _snapshots(arguments) if is_copy else arguments, options, host_view)
    into = [host_view(tensor) for tensor in made]

    def task() -> None:
        computed: list[Tensor] = []
        call.results(call.run(), lambda tensor: computed.append(tensor) or tensor)
        for target, source in zip(into, computed, strict=True):
            target.copy_(source)

    runtime.submit(stream, task)
    return results


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _shapes_of(call: _Call, writes: bool) -> Any:
    """What the call returns, on tensors without data; CPU tensors among its arguments become such, too."""

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type == "cpu" and value.dim():
            return _without_data(value)
        if isinstance(value, list):
            return [swap(item) for item in value]
        return torch.device("meta") if isinstance(value, torch.device) else value

    arguments, options = [swap(value) for value in call.arguments], {k: swap(v) for k, v in call.options.items()}
    try:
        return call.op(*arguments, **options)
    except NotImplementedError:
        # Huawei's operators without a Meta kernel: they return what they were given to write into, or a buffer
        out = options.get("out", arguments[0]) if writes else torch.empty(1024, dtype=torch.uint8, device="meta")
        return tuple(out) if isinstance(out, list) else out


def _host_copy(arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """A copy to the host that the caller waits for."""
    non_blocking = arguments[2] if len(arguments) > 2 else options.get("non_blocking", False)
    return arguments[0].device.type == "cpu" and not non_blocking


def _snapshots(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A copy's arguments; memory of the host that is not pinned is read now, as a card's driver does."""
    source = arguments[1]
    if source.device.type == "cpu" and not source.is_pinned():
        return (arguments[0], source.clone(), *arguments[2:])
    return arguments


def _empty(like: Tensor, device: torch.device | None) -> Tensor:
    return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=device or torch.device("npu"))


def _stream_with_work() -> int:
    """The current stream's address, if its work has to be submitted, else 0."""
    import torch_npu

    stream = torch_npu._C._npu_getCurrentRawStream(torch_npu.npu.current_device())
    return stream if runtime.is_deferred(stream) else 0
