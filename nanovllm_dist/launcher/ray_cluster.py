"""Engine processes on a Ray cluster: our own on this host, or one that exists. The only file that imports ray.

Ray decides where each rank runs and reserves its device. The actors only host processes, the same that `local`
starts, so that what serves requests owes Ray nothing but its place. It does not know kinds of devices.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import EngineStartError
from nanovllm_dist.launcher import cluster_lookup
from nanovllm_dist.launcher.model_copies import Copy, check_same, find_copy
from nanovllm_dist.launcher.process import LocalProcess, LongLivedThread, Program
from nanovllm_dist.launcher.sites import Site, in_order
from nanovllm_dist.launcher.supervisor import Supervisor
from nanovllm_dist.workers.platform.cpu import usable_cores

_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum is 75 MiB, and no object of ours goes there
_PLACEMENT_SECONDS = 60.0
_CALL_SECONDS = 10.0
_ACTOR_SECONDS = 60.0
_OWN_HOST = "127.0.0.1"
_GONE = -9
# Ray names the resources that it knows itself by an option of their own
_RESOURCE_OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus"}


class _Link:
    """This program's one connection to Ray, as far as engines made it: the last of them to go ends it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines = 0
        self._private = False

    def join(self, connect: Callable[[], None], private: bool) -> bool:
        """Share the connection, or make it by `connect`; whether `leave` is to be called in the end.

        One that the program made itself is not ours to end. Raises RayTakenError beside an engine's private Ray.
        """
        with self._lock:
            if not ray.is_initialized():
                with _own_sigterm():
                    _all_or_nothing(connect)
                self._private = private
            elif not self._engines:
                return False
            elif self._private:
                raise cluster_lookup.RayTakenError(
                    "another engine of this program runs on a private Ray, which is for that engine alone, and Ray "
                    "connects a program to one cluster: use launcher=local, or one ray_address for both"
                )
            self._engines += 1
            return True

    def leave(self) -> None:
        """End the connection with the last engine that shares it."""
        with self._lock:
            self._engines -= 1
            if not self._engines:
                cluster_lookup.devices_of_private_ray.clear()
                ray.shutdown()


def _all_or_nothing(connect: Callable[[], None]) -> None:
    try:
        connect()
    except BaseException:
        ray.shutdown()
        raise


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray installs a handler that writes a stack trace and aborts the program three seconds later: put back what was
    there. Not by `signal`, which knows handlers of Python alone, and only in the main thread."""
    get, put = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get.argtypes, get.restype = (ctypes.c_int,), ctypes.c_void_p
    put.argtypes, put.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handler = get(signal.SIGTERM)
    try:
        yield
    finally:
        put(signal.SIGTERM, handler)


_link = _Link()


class ProcessHost:
    """The actor: starts one process on its node and answers questions about it.

    Its methods run on the actor's main thread, so the process ends when the actor does.
    """

    def __init__(self, directory: str | None) -> None:
        self._supervisor = None if directory else Supervisor()  # beside the launcher, the launcher's own is enough
        self._directory = Path(directory) if directory else None
        self._process: LocalProcess | None = None

    def site(self, resource: str) -> tuple[str, str, str, int, int]:
        """(node id, node address, device id, user id, usable cores) of this actor."""
        context = ray.get_runtime_context()
        devices = context.get_accelerator_ids().get(resource) or [""]
        return context.get_node_id(), ray.util.get_node_ip_address(), str(devices[0]), os.getuid(), usable_cores()

    def find_model(self, directory: str, source: str, hub: str, weights: bool) -> Copy:
        """The model on this node; see find_copy."""
        return find_copy(directory, source, hub, weights)

    def start(self, name: str, module: str, spec: str, environment: dict[str, str]) -> int:
        """Start the process; returns its pid."""
        directory = self._directory or self._own().directory
        self._process = LocalProcess(Program(name, module, spec, environment), directory)
        if self._supervisor is not None:
            self._supervisor.watch(self._process.pid)
        return self._process.pid

    def call(self, method: str) -> Any:
        """`poll`, `first_line`, `log_tail`, `terminate` or `kill` of the process."""
        return getattr(self._process, method)()

    def leave(self) -> None:
        """Remove what this actor keeps on its node."""
        if self._process is not None:
            self._process.kill()
        if self._supervisor is not None:
            self._supervisor.finish()

    def _own(self) -> Supervisor:
        if self._supervisor is None:
            raise EngineStartError("a process host without a directory needs a supervisor")
        return self._supervisor


class RemoteProcess:
    """A process behind an actor. An actor that is gone counts as a process that was killed."""

    def __init__(self, name: str, actor: Any, pid: int) -> None:
        self.name = name
        self.pid = pid
        self._actor = actor

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""
        code = self._call("poll", gone=_GONE)
        return None if code is None else int(code)

    def first_line(self) -> str | None:
        """The first complete line of its standard output, or None so far."""
        line = self._call("first_line")
        return None if line is None else str(line)

    def log_tail(self) -> str:
        """The last lines of its log."""
        return str(self._call("log_tail", gone="the Ray actor that hosts the process is gone"))

    def terminate(self) -> None:
        """SIGTERM."""
        self._call("terminate")

    def kill(self) -> None:
        """SIGKILL to its group."""
        self._call("kill")

    def _call(self, method: str, gone: Any = None) -> Any:
        if not ray.is_initialized():  # as the program ends Ray may have left before us, and a call would start it anew
            return gone
        try:
            return ray.get(self._actor.call.remote(method), timeout=_CALL_SECONDS)
        except GetTimeoutError:
            return None  # a busy node is not a dead process
        except RayError:
            return gone


class RayBackend:
    """Ranks in a placement group, one bundle each; coordinator and workers hosted by one actor each."""

    poll_seconds = 0.5

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._thread = LongLivedThread()
        self._own_cluster = False
        self._linked = False
        self._group: Any = None
        self._actors: list[Any] = []
        self._sites: list[Site] = []
        self._models: dict[str, str] = {}  # by node
        self._coordinator: Any = None

    def open(self, config: EngineConfig, resource: str, count: int) -> None:
        """Start a private Ray on this host, or join the one at `ray_address` (or the RAY_ADDRESS variable).

        A program that has connected to Ray itself keeps its connection, and that cluster is used; so do other engines
        of the program that joined one. A private Ray is told of `count` devices where `resource` is none that Ray has
        an option for.
        """
        address = config.ray_address or os.environ.get("RAY_ADDRESS", "")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # visible devices are set by us, explicitly
        own = {} if resource in _RESOURCE_OPTIONS else {resource: float(count)}
        try:
            self._thread.run(lambda: self._connect(address, config.tensor_parallel_size, own))
        except EngineStartError:
            raise
        except (RayError, OSError, RuntimeError, ValueError) as error:
            what = f"Ray at {address} cannot be joined" if address else "Ray did not start"
            hint = "a cluster with tokens needs RAY_AUTH_MODE=token" if address else "launcher=local needs no Ray"
            raise EngineStartError(f"{what}: {error}; {hint}") from error

    def _connect(self, address: str, ranks: int, own: dict[str, float]) -> None:
        if address:
            self._linked = _link.join(lambda: self._join(address), private=False)
        else:
            self._linked = _link.join(lambda: self._start(ranks, own), private=True)

    def _join(self, address: str) -> None:
        cluster_lookup.check_reachable(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)

    def _start(self, ranks: int, resources: dict[str, float]) -> None:
        temp_dir = self._supervisor.directory / "r"
        self._own_cluster = True
        # it would look for the devices' model name and write a traceback where it finds none; only numbers matter here
        logging.getLogger("ray._private.accelerators").setLevel(logging.CRITICAL)
        ray.init(
            address="local",
            num_cpus=ranks + 1,  # logical: a bundle for each rank of a CPU engine, and the coordinator
            resources=resources,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(temp_dir),
            _node_ip_address=_OWN_HOST,
            _system_config={"memory_monitor_refresh_ms": 0},  # it would kill a worker for other programs' memory
        )
        self._supervisor.watch(*cluster_lookup.processes_of(temp_dir))

    def reserve(self, config: EngineConfig, resource: str, visible_env: str) -> list[Site]:
        """Reserve one unit of `resource` per rank and put an actor there. Raises EngineStartError."""
        self._group = self._place(config.tensor_parallel_size, resource, config.startup_timeout)
        actors = [self._actor_in_bundle(index, resource) for index in range(config.tensor_parallel_size)]
        answers = self._get([actor.site.remote(resource) for actor in actors])
        here = ray.get_runtime_context().get_node_id()
        found = [
            Site(node, host, device, with_launcher=node == here and uid == os.getuid(), cores=cores)
            for node, host, device, uid, cores in answers
        ]
        order = in_order(found)
        self._actors = [actors[index] for index in order]
        self._sites = [found[index] for index in order]
        if self._own_cluster:
            cluster_lookup.devices_of_private_ray[:] = [site.device for site in self._sites]
        affinity = NodeAffinitySchedulingStrategy(self._sites[0].node, soft=False)
        self._coordinator = self._new_actor(num_cpus=0, scheduling_strategy=affinity)
        return self._sites

    def model_directory(self, config: EngineConfig, rank: int) -> str:
        """The launcher's own where the rank's host has it, else what its name gives there. Raises EngineStartError."""
        site = self._sites[rank]
        if site.with_launcher:
            return config.model
        if not self._models:
            self._models = self._find_models(config)
        return self._models[site.node]

    def _find_models(self, config: EngineConfig) -> dict[str, str]:
        """The model's directory by node, asked of all of them at once: each may have to fetch it."""
        asked = (config.model, config.model_source or config.model, config.hub, config.load_format != "dummy")
        own = find_copy(*asked)
        ranks = {site.node: rank for rank, site in enumerate(self._sites) if not site.with_launcher}.values()
        calls = [(self._sites[rank], self._actors[rank].find_model.remote(*asked)) for rank in ranks]
        deadline = time.monotonic() + config.startup_timeout
        found = {}
        for site, call in calls:
            try:
                copy = Copy(*ray.get(call, timeout=max(0.0, deadline - time.monotonic())))
            except (RayError, GetTimeoutError) as error:
                raise EngineStartError(
                    f"host {site.host} has no {config.model}, and {asked[1]!r} cannot be had there: "
                    f"{_last_line(error)}; put the model in the same directory on every host"
                ) from error
            check_same(own, ray.util.get_node_ip_address(), copy, site.host)
            found[site.node] = copy.directory
        return found

    def _place(self, ranks: int, resource: str, timeout: float) -> Any:
        total = ray.cluster_resources()
        asked = f"{ranks} x 1 {resource}"
        if self._own_cluster and total.get(resource, 0) < ranks:
            raise EngineStartError(f"this host has {total.get(resource, 0):g} {resource}, and {asked} was asked for")
        declare = f"; each node declares what it has: ray start --resources='{{\"{resource}\": N}}'"
        hint = "" if resource in _RESOURCE_OPTIONS else declare
        group = placement_group([{resource: 1}] * ranks, strategy="PACK")
        if not group.wait(min(timeout, _PLACEMENT_SECONDS)):
            free = ray.available_resources().get(resource, 0)
            remove_placement_group(group)
            raise EngineStartError(
                f"the Ray cluster has {total.get(resource, 0):g} {resource} ({free:g} free), and {asked} was asked for"
                f"{hint}"
            )
        return group

    def _actor_in_bundle(self, index: int, resource: str) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": strategy}
        if resource in _RESOURCE_OPTIONS:
            options[_RESOURCE_OPTIONS[resource]] = 1
        else:
            options["resources"] = {resource: 1}
        return self._new_actor(**options)

    def _new_actor(self, **options: Any) -> Any:
        directory = str(self._supervisor.directory) if self._own_cluster else None
        return ray.remote(ProcessHost).options(**options).remote(directory)

    def _get(self, references: list[Any]) -> list[Any]:
        try:
            return list(ray.get(references, timeout=_ACTOR_SECONDS))
        except (RayError, GetTimeoutError) as error:
            raise EngineStartError(f"a Ray actor did not start: {error}") from error

    def start(self, program: Program, rank: int | None) -> RemoteProcess:
        """Start a process in the actor of that rank, or in the coordinator's."""
        actor = self._coordinator if rank is None else self._actors[rank]
        call = actor.start.remote(program.name, program.module, program.spec, program.environment)
        pid = int(self._get([call])[0])
        if self._own_cluster:
            self._supervisor.watch(pid)
        return RemoteProcess(program.name, actor, pid)

    def close(self) -> None:
        """End the actors and free the bundles; end Ray, or the connection to it, if it was opened here."""
        self._thread.run(self._leave)  # after `open`, should that have been interrupted
        self._thread.close()

    def _leave(self) -> None:
        try:
            if ray.is_initialized() and not self._own_cluster:
                self._release()
        finally:
            if self._linked:
                _link.leave()

    def _release(self) -> None:
        actors = [actor for actor in (*self._actors, self._coordinator) if actor is not None]
        if actors:
            ray.wait([actor.leave.remote() for actor in actors], num_returns=len(actors), timeout=_CALL_SECONDS)
        for actor in actors:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)


def _last_line(error: BaseException) -> str:
    """What a remote call failed with, without its traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
