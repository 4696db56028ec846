"""CPU kernels for the operators of torch_npu that the project uses, under torch_npu's own schemas.

`install()` registers them for CPU tensors, once per process. Sums and products are in fp32 and rounded once, to the
dtype of the result; fp32 tensors are accepted, which a card's attention is not. An option that is not emulated raises
NotImplementedError, and an index out of range IndexError: what a card would do there is undefined. Knows nothing of
devices or graphs.
"""

from __future__ import annotations

import torch

from . import attention, cache, pointwise

_KERNELS = {**attention.KERNELS, **cache.KERNELS, **pointwise.KERNELS}
_libraries: list[torch.library.Library] = []


def install() -> None:
    """Registers the kernels for CPU tensors. Needs torch_npu imported. Safe to repeat."""
    if _libraries:
        return
    library = torch.library.Library("npu", "IMPL")
    for name, kernel in _KERNELS.items():
        library.impl(name, kernel, "CPU")
    _libraries.append(library)
