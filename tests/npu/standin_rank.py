"""One rank of the collectives' tests: `standin_rank.py CASE RANK RANKS FILE` prints what it got as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def collectives(rank: int, ranks: int) -> dict[str, Any]:
    """Each collective on small tensors, and one that is larger than a piece."""
    summed = (torch.arange(4) + 100 * rank).bfloat16().npu()
    dist.all_reduce(summed)
    largest = torch.tensor([rank, -rank, 7], dtype=torch.int64).npu()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    gathered = torch.empty(3 * ranks).npu()
    dist.all_gather_into_tensor(gathered, torch.full((3,), float(rank)).npu())
    told = torch.full((2,), float(rank + 5)).npu()
    dist.broadcast(told, 1)
    own = torch.empty(2).npu()
    dist.reduce_scatter_tensor(own, (torch.arange(2.0 * ranks) + rank).npu())
    big = (torch.arange(3_000_000) % 1000 + rank).float().npu()
    dist.all_reduce(big)
    dist.barrier()
    expected = (torch.arange(3_000_000) % 1000).float() * ranks + sum(range(ranks))
    return {
        "summed": summed.tolist(),
        "largest": largest.tolist(),
        "gathered": gathered.tolist(),
        "told": told.tolist(),
        "own": own.tolist(),
        "big": bool(torch.equal(big.cpu(), expected)),
    }


def captured(rank: int, ranks: int) -> dict[str, Any]:
    """A graph with a collective in the middle, replayed with other inputs."""
    x = torch.zeros(2).npu()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        doubled = x * 2
        dist.all_reduce(doubled)
        result = doubled + 1
    replayed = []
    for step in range(3):
        x.fill_(step + rank)
        graph.replay()
        replayed.append(result.tolist())
    return {"replayed": replayed}


def alone(rank: int, ranks: int) -> dict[str, Any]:
    """Rank 1 does not take part in the second collective."""
    x = torch.ones(1).npu()
    dist.all_reduce(x)
    if rank == 1:
        sys.stdin.read()
        return {}
    try:
        dist.all_reduce(x)
        x.item()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}


def main() -> None:
    name, rank, ranks, file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    import torch_npu  # noqa: F401

    cases: dict[str, Callable[[int, int], dict[str, Any]]] = {
        "collectives": collectives,
        "captured": captured,
        "alone": alone,
    }
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", init_method=f"file://{file}", rank=rank, world_size=ranks)
    sys.stdout.write(json.dumps(cases[name](rank, ranks)) + "\n")
    sys.stdout.flush()
    if name != "alone":
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
