"""HCCL between ranks: its group, and collectives that a graph can hold.

All collectives are torch.distributed's, which torchair turns into operators of its own and NPUGraph can capture.
HCCL finds its peers over the store of the process group; no rank table is needed.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch_npu
from torch._C._distributed_c10d import Store

from nanovllm_dist.models.parallel import GroupCommunicator
from nanovllm_dist.workers.platform.npu_environment import BUFFER_MIB, EXEC_SECONDS, whole_number

_WATCHDOG_SECONDS = 30
# HCCL's own numbers for where a collective is unfolded
_EXPANSION_MODES = {"HOST": 1, "AI_CPU": 2, "AIV": 3}


class HcclCommunicator(GroupCommunicator):
    """A Communicator over the default process group, which must be HCCL's; made by `open_communicator`."""

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Gather equal shapes to rank 0; HCCL has no gather, so every rank gets them on the way."""
        parts = self.all_gather(tensor)
        return list(parts) if self.rank == 0 else None


def open_communicator(rank: int, world_size: int, store: Store) -> HcclCommunicator:
    """Join the group, and meet the other ranks now: connecting has a shorter timeout than loading weights may take.

    Raises ConfigError for a variable of HCCL that is no number.
    """
    options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
    options.hccl_config = _group_config()
    # torch's own watchdog comes after HCCL, whose error says more; 0 is no limit for HCCL
    timeout = timedelta(seconds=(whole_number("HCCL_EXEC_TIMEOUT", EXEC_SECONDS) or EXEC_SECONDS) + _WATCHDOG_SECONDS)
    dist.init_process_group("hccl", store=store, rank=rank, world_size=world_size, timeout=timeout, pg_options=options)
    comm = HcclCommunicator()
    device = torch.device("npu", torch_npu.npu.current_device())
    comm.all_reduce(torch.ones(1, dtype=torch.float32, device=device)).item()
    return comm


def _group_config() -> dict[str, int]:
    config = {"hccl_buffer_size": whole_number("HCCL_BUFFSIZE", BUFFER_MIB)}
    mode = _EXPANSION_MODES.get(os.environ.get("HCCL_OP_EXPANSION_MODE", "AIV"))
    return config if mode is None else {**config, "hccl_op_expansion_mode": mode}
