"""Where ranks run: one Site each, and what a backend (local or Ray) must offer. Knows no processes of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.launcher.process import Program, RunningProcess


@dataclass(frozen=True)
class Site:
    """The place of one rank: `node` tells hosts apart, `host` is its address, `device` its id in the driver's terms.

    `with_launcher`: on the launcher's own host and user, so that ipc sockets in its run directory can be reached.
    `cores`: of the host, for all ranks there.
    """

    node: str
    host: str
    device: str
    with_launcher: bool
    cores: int


class Backend(Protocol):
    """A way to get processes started."""

    poll_seconds: float

    def open(self, config: EngineConfig, resource: str, count: int) -> None:
        """Bring up or join what starts processes. Raises EngineStartError.

        Each rank will reserve one `resource`, of which this host has `count`.
        """
        ...

    def reserve(self, config: EngineConfig, resource: str, visible_env: str) -> list[Site]:
        """One site per rank, ranks of one host adjacent. Raises ConfigError, EngineStartError."""
        ...

    def model_directory(self, config: EngineConfig, rank: int) -> str:
        """Where the model is on the rank's host, fetched there if need be. Raises EngineStartError."""
        ...

    def start(self, program: Program, rank: int | None) -> RunningProcess:
        """Start a process at the rank's site; None is the coordinator, on rank 0's host."""
        ...

    def close(self) -> None:
        """Give back what `open` and `reserve` took."""
        ...


def in_order(sites: list[Site]) -> list[int]:
    """Indices of `sites` in the order of their ranks: the launcher's host first, then by address; a host's devices
    adjacent and by number."""

    def key(index: int) -> tuple[bool, str, str, tuple[int, str]]:
        site = sites[index]
        device = (int(site.device), "") if site.device.isdigit() else (0, site.device)
        return not site.with_launcher, site.host, site.node, device

    return sorted(range(len(sites)), key=key)


def device_environment(sites: list[Site], rank: int, visible_env: str) -> tuple[dict[str, str], int]:
    """Environment that shows `rank` the engine's devices on its host, and the index of its own among them.

    Ranks of one host see each other's devices, which peer-to-peer memory needs.
    """
    if not visible_env:
        return {}, 0
    peers = [other for other, site in enumerate(sites) if site.node == sites[rank].node]
    return {visible_env: ",".join(sites[other].device for other in peers)}, peers.index(rank)
