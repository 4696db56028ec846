"""Engine processes on this host, with nothing but `subprocess`."""

from __future__ import annotations

import os
from pathlib import Path

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.launcher.cluster_lookup import devices_of_private_ray
from nanovllm_dist.launcher.process import LocalProcess, LongLivedThread, Program
from nanovllm_dist.launcher.sites import Site
from nanovllm_dist.launcher.supervisor import Supervisor
from nanovllm_dist.workers.platform.cpu import usable_cores

LOOPBACK = "127.0.0.1"


class LocalBackend:
    """Starts every process beside the launcher."""

    poll_seconds = 0.1

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._directory: Path = supervisor.directory
        self._thread = LongLivedThread()

    def open(self, config: EngineConfig, resource: str, count: int) -> None:
        """Nothing to bring up."""

    def reserve(self, config: EngineConfig, resource: str, visible_env: str) -> list[Site]:
        """The first devices that the launcher itself may see, but those of an engine of this program on a private Ray.

        Raises ConfigError when they are too few.
        """
        ranks = config.tensor_parallel_size
        visible = os.environ.get(visible_env) if visible_env else None
        taken = devices_of_private_ray if visible_env else []
        some = map(str, range(ranks + len(taken))) if visible is None else visible.split(",")
        devices = [device for device in some if device and device not in taken]
        if len(devices) < ranks:
            raise ConfigError(f"tensor_parallel_size={ranks} needs more devices than {visible_env}={visible} shows")
        cores = usable_cores()
        return [Site("", LOOPBACK, devices[rank], with_launcher=True, cores=cores) for rank in range(ranks)]

    def model_directory(self, config: EngineConfig, rank: int) -> str:
        """The one that the launcher found."""
        return config.model

    def start(self, program: Program, rank: int | None) -> LocalProcess:
        """Start one process; `rank` is None for the coordinator."""
        process = self._thread.run(lambda: LocalProcess(program, self._directory))
        self._supervisor.watch(process.pid)
        return process

    def close(self) -> None:
        """End the thread that owns the processes."""
        self._thread.close()
