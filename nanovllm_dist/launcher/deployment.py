"""The processes of one engine: where they run, the endpoints and keys they share, and how they are ended.

It starts and ends processes and knows whether they live. It does not know what state the engine in them is in.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import RLock

import msgspec

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import EngineStartError
from nanovllm_dist.launcher.process import Program, RunningProcess
from nanovllm_dist.launcher.sites import Backend, Site, device_environment
from nanovllm_dist.launcher.supervisor import Supervisor
from nanovllm_dist.wire import messages as wire
from nanovllm_dist.wire.sockets import new_keys
from nanovllm_dist.workers.platform import get_platform

COORDINATOR = "nanovllm_dist.scheduler.coordinator"
WORKER = "nanovllm_dist.workers.worker"
LOG_HEADING = "\n\nlast lines of the log of "
# What to do when a phase takes longer than the startup_timeout
_REMEDIES = {
    "warmup": "its graphs were being recorded, or compiled, which may take minutes the first time: raise "
    "--startup-timeout (what graph_mode=torchair has compiled is kept, and a next start goes on from there)"
}
_LISTEN_POLL_SECONDS = 0.05
_LEAVE_SECONDS = 5.0
_NOTICE_SECONDS = 2.5  # the coordinator looks for its ranks every second


class Deployment:
    """Run directory, watchdog, backend and processes of one engine. Raises EngineStartError, ConfigError."""

    def __init__(self, config: EngineConfig) -> None:
        """Start the watchdog; nothing else runs yet. `config` is resolved."""
        self.config = config
        self.processes: list[RunningProcess] = []
        self.address = ""
        self.keys: wire.Keys | None = None
        self.key_file: Path | None = None
        self._platform = get_platform(config.device)
        self._lock = RLock()
        self._ended = False
        self._owner = os.getpid()
        self._coordinator: RunningProcess | None = None
        try:
            self._supervisor = Supervisor()
        except OSError as error:
            raise EngineStartError(f"no directory for the engine's sockets and logs: {error}; set TMPDIR") from None
        self.backend: Backend = _backend(config, self._supervisor)

    @property
    def directory(self) -> Path:
        """The run directory: sockets, logs, keys; it lives as long as the engine."""
        return self._supervisor.directory

    def open(self) -> None:
        """Bring up what starts processes (Ray)."""
        self.backend.open(self.config, self._platform.ray_resource, self._platform.count_devices())

    def launch(self, deadline: float) -> None:
        """Start the coordinator and all workers; returns when the coordinator listens.

        `deadline`: on the monotonic clock, when to give up.
        """
        sites = self.backend.reserve(self.config, self._platform.ray_resource, self._platform.visible_devices_env)
        client_endpoint, worker_endpoint = self._endpoints(sites)
        if client_endpoint.startswith("tcp:"):
            self.keys = new_keys()
            self._start_coordinator(client_endpoint, worker_endpoint)
            self._start_workers(sites, self._listening(deadline).worker_endpoint)
        else:  # the endpoints are known, and a worker takes longest to start
            self._start_workers(sites, worker_endpoint)
            self._start_coordinator(client_endpoint, worker_endpoint)
        self.address = self._listening(deadline).client_endpoint
        self._write_key_file()

    def dead(self) -> RunningProcess | None:
        """A process that has ended, if one has: rather one that was killed or failed than one that left in order."""
        codes = [(process, process.poll()) for process in self.processes]
        ended = [(code >= 0, code == 0, process) for process, code in codes if code is not None]
        return min(ended, key=lambda entry: entry[:2])[2] if ended else None

    def timeout_report(self, phase: str = "") -> str:
        """That the engine took too long, in which phase, with what every process wrote last."""
        logs = "".join(f"{LOG_HEADING}{process.name}:\n{process.log_tail()}" for process in self.processes)
        return (
            f"the engine was not ready after startup_timeout={self.config.startup_timeout:g} seconds: "
            f"{_REMEDIES.get(phase, 'raise it, or see what the processes wait for')}{logs}"
        )

    def end(self, grace: float = _LEAVE_SECONDS) -> None:
        """End every process: on request within `grace` seconds, then by force; remove the run directory. Idempotent."""
        if os.getpid() != self._owner:  # a fork of the program that started the engine
            return
        with self._lock:
            if self._ended:
                return
            self._ended = True
            try:
                self._end_processes(grace)
            finally:
                try:
                    self.backend.close()
                finally:
                    self._supervisor.finish()

    def _end_processes(self, grace: float) -> None:
        coordinator = self._coordinator
        if grace > 0 and coordinator is not None and coordinator.poll() is None:
            if any(process.poll() is not None for process in self.processes):
                # it will find the lost rank itself, and tell clients; asked to leave before, it would end their
                # requests without a reason
                _wait(lambda: coordinator.poll() is not None, _NOTICE_SECONDS)
            coordinator.terminate()  # it ends requests, and has the workers leave
            _wait(lambda: all(process.poll() is not None for process in self.processes), grace)
        for process in self.processes:
            process.kill()

    def _endpoints(self, sites: list[Site]) -> tuple[str, str]:
        """Client's and workers' endpoint: ipc where all is on the launcher's host, else tcp on rank 0's address."""
        network = bool(self.config.host or self.config.port) or self.config.transport == "tcp"
        together = all(site.with_launcher for site in sites)
        if self.config.transport == "ipc" and not together:
            raise EngineStartError("transport=ipc needs every rank on the launcher's host, and the ranks are spread")
        if together and not network:
            return f"ipc://{self.directory}/client", f"ipc://{self.directory}/worker"
        host = self.config.host or sites[0].host
        return f"tcp://{host}:{self.config.port}", f"tcp://{host}:0"

    def _start_coordinator(self, client_endpoint: str, worker_endpoint: str) -> None:
        config = self.config.replace(model=self.backend.model_directory(self.config, 0))
        spec = wire.CoordinatorSpec(
            config=config, client_endpoint=client_endpoint, worker_endpoint=worker_endpoint, keys=self.keys
        )
        program = Program("coordinator", COORDINATOR, msgspec.json.encode(spec).decode())
        self._coordinator = self.backend.start(program, None)
        self.processes.append(self._coordinator)

    def _start_workers(self, sites: list[Site], endpoint: str) -> None:
        ranks_of = Counter(site.node for site in sites)
        for rank, site in enumerate(sites):
            share = max(1, site.cores // ranks_of[site.node])
            environment = self._platform.worker_environment(self.config, share)
            devices, index = device_environment(sites, rank, self._platform.visible_devices_env)
            of_host = self._platform.host_environment(site.host) if len(ranks_of) > 1 else {}
            spec = wire.WorkerSpec(
                config=self.config.replace(model=self.backend.model_directory(self.config, rank)),
                rank=rank,
                worker_endpoint=endpoint,
                host=site.host,
                device_index=index,
                keys=_peer_keys(self.keys),
            )
            program = Program(
                f"worker-{rank}", WORKER, msgspec.json.encode(spec).decode(), {**environment, **of_host, **devices}
            )
            self.processes.append(self.backend.start(program, rank))

    def _listening(self, deadline: float) -> wire.CoordinatorListening:
        while self._coordinator is not None and time.monotonic() < deadline:
            line = self._coordinator.first_line()
            if line is not None:
                return msgspec.json.decode(line, type=wire.CoordinatorListening)
            code = self._coordinator.poll()
            if code is not None:
                raise EngineStartError(process_report(self._coordinator, code))
            time.sleep(_LISTEN_POLL_SECONDS)
        raise EngineStartError(self.timeout_report())

    def _write_key_file(self) -> None:
        keys = _peer_keys(self.keys)
        if keys is None:
            return
        self.key_file = self.directory / "client-key.json"
        with os.fdopen(os.open(self.key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(keys))


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(_LISTEN_POLL_SECONDS)


def process_report(process: RunningProcess, code: int) -> str:
    """One line on how `process` ended, then the tail of its log below LOG_HEADING."""
    log = process.log_tail()
    last = log.splitlines()[-1] if log else "it wrote no log"
    how = f"was ended by signal {-code}" if code < 0 else f"left with exit code {code}"
    return f"{process.name} {how}: {last}{LOG_HEADING}{process.name}:\n{log}"


def _peer_keys(keys: wire.Keys | None) -> wire.Keys | None:
    """What a client or a worker needs: the server's secret stays with the coordinator."""
    return None if keys is None else msgspec.structs.replace(keys, server_secret="")


def _backend(config: EngineConfig, supervisor: Supervisor) -> Backend:
    if config.launcher == "ray":
        from nanovllm_dist.launcher.ray_cluster import RayBackend

        return RayBackend(supervisor)
    from nanovllm_dist.launcher.local import LocalBackend

    return LocalBackend(supervisor)
