"""Argmax and plain draws by a C kernel over bfloat16 logits, which rank 0 gathers and samples for all ranks.

Torch takes five passes over logits in float32 for it: 64 rows of a vocabulary of 49,152 took 3 ms on two cores, and new
memory each time, beside 9 ms for the logits themselves. Rows that want more than a plain draw are not its business.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from nanovllm_dist.models.layers.embedding import LMHead
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.workers.platform.cpu_group import CpuGroup
from nanovllm_dist.workers.platform.cpu_kernels import kernel_library

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int


class CpuSampler:
    """A DeviceSampler; see sampling_draw for how it draws."""

    def __init__(self, library: ctypes.CDLL, head: LMHead, comm: Communicator) -> None:
        self._head = head
        self._comm = comm
        self._sample: Any = library.sample_rows
        self._sample.argtypes = [_POINTER, ctypes.c_int64, _POINTER, _POINTER, _POINTER, _INT, _INT]
        self._sample.restype = None

    @property
    def uniform_dtype(self) -> type[np.float64]:
        """See DeviceSampler."""
        return np.float64

    def sample(self, logits: torch.Tensor, inv_temperature: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """See DeviceSampler; logits are bfloat16. A row that holds NaN or +inf gets the first such token, a row of
        -inf alone token 0."""
        tokens = torch.empty(len(logits), dtype=torch.int64)
        whole = self._head.gather(logits)
        if whole is not None:
            self._sample(
                whole.data_ptr(),
                whole.stride(0),
                inv_temperature.data_ptr(),
                uniforms.data_ptr(),
                tokens.data_ptr(),
                len(whole),
                whole.shape[1],
            )
        return self._comm.broadcast(tokens)

    def append(self, table: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See DeviceSampler."""
        table.index_copy_(0, places + 1, tokens.to(table.dtype))
        return tokens


def cpu_sampler(comm: Communicator, head: LMHead) -> CpuSampler | None:
    """The C kernel for a vocabulary in bfloat16, where it can be built, for one rank or the ranks of one host."""
    dtype, together = next(head.parameters()).dtype, comm.world_size == 1 or isinstance(comm, CpuGroup)
    library = kernel_library() if dtype == torch.bfloat16 and together else None
    return None if library is None else CpuSampler(library, head, comm)
