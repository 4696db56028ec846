"""What the NPU platform reads from its host and hands to its workers; nothing here needs torch_npu or a device."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.launcher.sites import Site, device_environment, in_order
from nanovllm_dist.workers.platform import get_platform, npu_environment, npu_host
from nanovllm_dist.workers.platform.npu_weights import takes_nz

TOPOLOGY = """\
\t   NPU0       NPU1       NPU2       NPU3       CPU Affinity
NPU0       X          HCCS       HCCS       HCCS       144-147
NPU1       HCCS       X          HCCS       HCCS       0-1
NPU2       HCCS       HCCS       X          PHB        0-1,4-5
NPU3       HCCS       HCCS       PHB        X          7

Legend:

  X    = Self
  HCCS = Connection traversing HCCS.
"""


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("HCCL_", "ASCEND_RT", "CPU_AFFINITY", "TASK_QUEUE"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def npu_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tool of that name that prints TOPOLOGY."""
    tool = tmp_path / "npu-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'EOF'\n{TOPOLOGY}\nEOF\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tool


def test_devices_are_counted_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("davinci0", "davinci1", "davinci15", "davinci_manager", "hisi_hdc"):
        (tmp_path / "dev" / name).touch()
    assert npu_host.count_devices(tmp_path) == 3


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("5", 1), ("", 0)])
def test_a_limit_to_some_devices_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, count: int
) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    assert npu_host.count_devices(tmp_path) == count


def test_each_device_has_the_cores_that_the_topology_gives_it() -> None:
    assert npu_host.parse_topology(TOPOLOGY) == [{144, 145, 146, 147}, {0, 1}, {0, 1, 4, 5}, {7}]
    assert npu_host.parse_topology("no such table") == []


def bound(visible: str, device_index: int, environment: dict[str, str]) -> tuple[str, str]:
    """(what bind_to_device returned, the affinity after it) of a process of its own."""
    program = (
        "import os; from nanovllm_dist.workers.platform.npu_host import bind_to_device\n"
        f"print(sorted(bind_to_device({device_index})), sorted(os.sched_getaffinity(0)), sep='|')"
    )
    given = {**os.environ, **environment, **({"ASCEND_RT_VISIBLE_DEVICES": visible} if visible else {})}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=given, check=True)
    near, _, affinity = done.stdout.strip().partition("|")
    return near, affinity


def test_a_worker_runs_on_the_cores_near_its_device(npu_smi: Path) -> None:
    allowed = os.sched_getaffinity(0)
    near, affinity = bound("", 1, {})
    assert near == affinity == str(sorted({0, 1} & allowed))


def test_the_device_is_found_through_the_limit_to_some(npu_smi: Path) -> None:
    assert bound("3,1", 1, {}) == bound("", 1, {})


@pytest.mark.parametrize(
    ("device_index", "environment"),
    [(0, {}), (9, {}), (1, {"PATH": "/nowhere"}), (1, {"CPU_AFFINITY_CONF": "1"})],
    ids=["no core of it is allowed", "not listed", "no npu-smi", "left to torch_npu"],
)
def test_without_known_cores_nothing_is_bound(npu_smi: Path, device_index: int, environment: dict[str, str]) -> None:
    near, affinity = bound("", device_index, environment)
    assert near == "[]"
    assert affinity == str(sorted(os.sched_getaffinity(0)))


def test_workers_wait_for_each_other_minutes_and_not_half_an_hour() -> None:
    environment = npu_environment.worker_environment(EngineConfig(model="m", startup_timeout=900))
    assert int(environment["HCCL_EXEC_TIMEOUT"]) <= 600
    assert environment["HCCL_CONNECT_TIMEOUT"] == "900"
    assert environment["HCCL_OP_EXPANSION_MODE"] == "AIV"
    assert environment["TASK_QUEUE_ENABLE"] == "1"


@pytest.mark.parametrize(("startup", "seconds"), [(10, "120"), (90_000, "7200")])
def test_the_connection_timeout_stays_in_the_range_that_hccl_takes(startup: float, seconds: str) -> None:
    config = EngineConfig(model="m", startup_timeout=startup)
    assert npu_environment.worker_environment(config)["HCCL_CONNECT_TIMEOUT"] == seconds


def test_what_the_user_has_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HCCL_BUFFSIZE": "400", "TASK_QUEUE_ENABLE": "2", "HCCL_SOCKET_IFNAME": "eth1"}.items():
        monkeypatch.setenv(name, value)
    environment = npu_environment.worker_environment(EngineConfig(model="m"))
    assert environment["HCCL_BUFFSIZE"] == "400"
    assert environment["TASK_QUEUE_ENABLE"] == "2"
    assert environment["HCCL_SOCKET_IFNAME"] == "eth1"
    assert npu_environment.host_environment("10.0.0.7") == {}


def test_an_address_of_the_launcher_is_not_that_of_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_IF_IP", "10.0.0.1")
    assert npu_environment.host_environment("10.0.0.7") == {"HCCL_IF_IP": "10.0.0.7"}


def test_hosts_reach_each_other_by_the_address_that_ray_knows_them_by() -> None:
    assert npu_environment.host_environment("10.0.0.7") == {"HCCL_IF_IP": "10.0.0.7"}


@pytest.mark.parametrize(
    ("shape", "dtype", "takes"),
    [
        ((64, 32), torch.bfloat16, True),
        ((64, 32), torch.float16, True),
        ((64, 32), torch.float32, False),
        ((64, 24), torch.bfloat16, False),
        ((24, 64), torch.bfloat16, False),
    ],
)
def test_only_weights_of_whole_tiles_in_16_bits_take_the_tiled_format(
    shape: tuple[int, int], dtype: torch.dtype, takes: bool
) -> None:
    assert takes_nz(torch.empty(shape, dtype=dtype)) is takes


def test_a_variable_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_BUFFSIZE", "much")
    with pytest.raises(ConfigError, match="HCCL_BUFFSIZE='much'"):
        npu_environment.whole_number("HCCL_BUFFSIZE", 200)


def test_ranks_are_numbered_host_by_host_and_see_the_devices_of_their_own() -> None:
    places = [("b", "10.0.0.2", "1"), ("a", "10.0.0.1", "10"), ("b", "10.0.0.2", "0"), ("a", "10.0.0.1", "9")]
    sites = [Site(node, host, device, with_launcher=False, cores=1) for node, host, device in places]
    order = in_order(sites)
    assert order == [3, 1, 2, 0]
    ranks = [sites[index] for index in order]
    visible = get_platform("npu").visible_devices_env
    assert [device_environment(ranks, rank, visible) for rank in range(4)] == [
        ({visible: "9,10"}, 0),
        ({visible: "9,10"}, 1),
        ({visible: "0,1"}, 0),
        ({visible: "0,1"}, 1),
    ]
