"""Environment variables of a worker on an NPU. What the user has set stays as it is. It imports no torch."""

from __future__ import annotations

import os

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError

# HCCL waits 1,836 s by default, or 1,091 in AIV mode. Ranks differ by what loading a shard and compiling a graph take
EXEC_SECONDS = 300
BUFFER_MIB = 200
_CONNECT_SECONDS = (120, 7200)  # the range that HCCL takes
# Of the launcher's environment, but meant for every worker
_HANDED_ON = ("HCCL_SOCKET_IFNAME", "HCCL_ALGO", "HCCL_DETERMINISTIC", "ASCEND_LAUNCH_BLOCKING", "CPU_AFFINITY_CONF")


def worker_environment(config: EngineConfig) -> dict[str, str]:
    """Variables of HCCL, torch_npu and OpenMP for every worker."""
    shortest, longest = _CONNECT_SECONDS
    defaults = {
        # launches go through a queue of their own, so that the host runs ahead
        "TASK_QUEUE_ENABLE": "1",
        "HCCL_OP_EXPANSION_MODE": "AIV",
        "HCCL_BUFFSIZE": str(BUFFER_MIB),
        "HCCL_CONNECT_TIMEOUT": str(min(longest, max(shortest, int(config.startup_timeout)))),
        "HCCL_EXEC_TIMEOUT": str(EXEC_SECONDS),
    }
    return {
        # torch_npu is imported when the device is opened, where what it lacks can be said
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": str(config.threads_per_worker or 1),
        **{name: os.environ.get(name, value) for name, value in defaults.items()},
        **{name: os.environ[name] for name in _HANDED_ON if name in os.environ},
    }


def host_environment(host: str) -> dict[str, str]:
    """The address by which HCCL on that host is reached from others, unless an interface was named.

    An HCCL_IF_IP of the launcher's environment is the address of one host, and says nothing of the others.
    """
    if "HCCL_SOCKET_IFNAME" in os.environ:
        return {}
    return {"HCCL_IF_IP": host}


def whole_number(name: str, default: int) -> int:
    """A variable as a number. Raises ConfigError."""
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(f"{name}={text!r} in the environment is not a whole number: set one, or unset it")
    return int(text)
