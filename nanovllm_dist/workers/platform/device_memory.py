"""How much of a device's own memory the KV cache may take, once the largest step has run there."""

from __future__ import annotations

from typing import Any

# For what is not known before the first requests: graphs themselves, matrix workspaces, buffers of collectives, and
# what sampling parameters ask for: with a vocabulary of 152k at most 0.4 GiB kept by 512 rows, and 0.5 GiB in a step
_RESERVED_BYTES = 2**30


def cache_bytes(accelerator: Any, utilization: float) -> int:
    """Bytes of the current device that the cache may take: `utilization` of all, less what is taken and will be.

    The step that has run is counted twice: once for graphs, whose memory is a pool of their own. What other programs
    hold counts as taken.

    Args:
        accelerator: torch's module for the kind of device, such as `torch.cuda`.
    """
    accelerator.synchronize()
    peak, kept = accelerator.max_memory_allocated(), accelerator.memory_allocated()
    accelerator.empty_cache()
    free, total = accelerator.mem_get_info()
    taken = total - free + 2 * (peak - kept) + _RESERVED_BYTES
    return int(total * utilization - taken)
