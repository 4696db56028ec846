"""A stand-in for CANN, for tests without an Ascend NPU: torch_npu and torchair run, the libraries below do not.

`environment` gives a process the stand-in, `lowering` reads the graphs that torchair makes, `operators` computes
torch_npu's operators on CPU tensors, and `simulation` makes torch's `npu` device work on the host's memory. It never
is part of the package, and what it shows is no proof that a card would do the same: no kernel, no engine and no real
device memory is involved.
"""

from .environment import environment

__all__ = ["environment"]
