"""Steps that either all ranks of the process group take, or none: for what is optional, and useless on some of them.

It does not know what the steps do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class UnavailableError(Exception):
    """Something optional cannot be used; the same step failed on every rank or on another one."""


def on_all_ranks(device: torch.device, step: Callable[[], T]) -> T:
    """`step` on every rank; if it fails on any, all raise, so that none waits for one that has given up.

    `device`: where the process group finds tensors.

    Raises:
        UnavailableError: it failed here, or elsewhere.
    """
    problem = ""
    try:
        result = step()
    except UnavailableError as error:
        problem = str(error)
    except Exception as error:  # whatever it is, it must not leave the other ranks behind
        problem = f"{type(error).__name__}: {error}"
    succeeded = torch.tensor([not problem], dtype=torch.int32, device=device)
    dist.all_reduce(succeeded, op=dist.ReduceOp.MIN)
    if problem:
        raise UnavailableError(problem)
    if not succeeded.item():
        raise UnavailableError("another rank failed, its log says why")
    return result
