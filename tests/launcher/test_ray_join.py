"""An engine on a Ray cluster that exists already: it takes its place there and gives it back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from nanovllm_dist.client import DistLLM
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import EngineStartError
from nanovllm_dist.launcher.engine import Engine
from nanovllm_dist.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "dtype": "float32",
    "eos_token_id": 2,
}
HEAD = """
import ray, sys, time
ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[1], _node_ip_address="127.0.0.1",
         object_store_memory=80 * 2**20, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
while True:
    time.sleep(0.2)
    print(int(ray.available_resources().get("CPU", 0)), flush=True)
"""


class Cluster:
    """A Ray cluster of two CPUs that another program started."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self._out = self.directory / "out"
        # its own token, so that nothing depends on the user's, or changes it
        (self.directory / "token").write_text(uuid.uuid4().hex)
        authentication = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{directory}/token"}
        (self.directory / "tmp").mkdir()
        self.environment = {**os.environ, **authentication, "TMPDIR": f"{directory}/tmp"}
        with self._out.open("w") as out:
            head = [sys.executable, "-c", HEAD, f"{directory}/r"]
            self._process = subprocess.Popen(head, stdout=out, env=self.environment)
        self.address = self._lines(at_least=1)[0]

    def _lines(self, at_least: int) -> list[str]:
        deadline = time.monotonic() + 60
        while len(lines := self._out.read_text().splitlines()) < at_least:
            assert time.monotonic() < deadline, "Ray did not start"
            time.sleep(0.1)
        return lines

    def wait_until_free(self, cpus: int) -> None:
        """Wait until the cluster itself says that so many CPUs are free."""
        deadline = time.monotonic() + 20
        while self._lines(at_least=2)[-1] != str(cpus):
            assert time.monotonic() < deadline, f"free: {self._lines(1)[-1]} CPUs"
            time.sleep(0.1)

    def run_directories(self) -> list[str]:
        """Run directories of engines that live, on what is this cluster's only node."""
        return [name for name in os.listdir(self.directory / "tmp") if name.startswith("nanovllm-")]

    def close(self) -> None:
        """End the cluster."""
        processes = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        self._process.wait()
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


class Launcher:
    """A program that starts an engine in the cluster, and stops it when its standard input ends."""

    def __init__(self, cluster: Cluster, config: EngineConfig) -> None:
        source = (
            "import sys; from nanovllm_dist.config import EngineConfig\n"
            "from nanovllm_dist.launcher.engine import Engine\n"
            "engine = Engine.start(EngineConfig.from_json(sys.argv[1]))\n"
            "print(engine.address, *engine.pids.values(), flush=True); sys.stdin.read(); engine.stop()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", source, msgspec.json.encode(config).decode()],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
            text=True,
            env=cluster.environment,
        )

    def ready(self) -> tuple[str, list[int]]:
        """The engine's address and the pids of its processes."""
        assert self.process.stdout is not None
        address, *pids = self.process.stdout.readline().split()
        return address, [int(pid) for pid in pids]

    def end(self) -> str:
        """Let it stop; returns what it wrote to stderr."""
        return self.process.communicate(timeout=120)[1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="nv", dir="/tmp", ignore_cleanup_errors=True) as directory:
        cluster = Cluster(directory)
        yield cluster
        cluster.close()


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


def config(model: str, cluster: Cluster, **options: object) -> EngineConfig:
    given = {"load_format": "dummy", "num_blocks": 50, "threads_per_worker": 1, "ray_address": cluster.address}
    return EngineConfig(model=model, **{**given, **options})  # type: ignore[arg-type]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_engine_runs_in_the_cluster_and_gives_everything_back(model: str, cluster: Cluster) -> None:
    launcher = Launcher(cluster, config(model, cluster, tensor_parallel_size=2))
    address, pids = launcher.ready()
    cluster.wait_until_free(0)
    client = DistLLM.connect(address)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    assert len(client.generate([[1, 2]], params, use_tqdm=False)[0].token_ids) == 4
    client.close()

    launcher.end()

    assert len(pids) == 3
    cluster.wait_until_free(2)
    wait_until_gone(pids)
    assert cluster.run_directories() == []


def test_a_cluster_that_is_too_small_says_what_it_has(model: str, cluster: Cluster) -> None:
    launcher = Launcher(cluster, config(model, cluster, tensor_parallel_size=4, startup_timeout=3.0))
    assert "has 2 CPU (2 free), and 4 x 1 CPU was asked for" in launcher.end()
    cluster.wait_until_free(2)


def test_a_launcher_that_is_killed_leaves_nothing_in_the_cluster(model: str, cluster: Cluster) -> None:
    launcher = Launcher(cluster, config(model, cluster))
    _, pids = launcher.ready()
    assert len(pids) == 2
    assert len(cluster.run_directories()) == 3  # the launcher's, and one of each actor

    launcher.process.kill()
    launcher.process.communicate()

    cluster.wait_until_free(2)
    wait_until_gone(pids)
    deadline = time.monotonic() + 20
    while left := cluster.run_directories():
        assert time.monotonic() < deadline, [list((cluster.directory / "tmp" / name).iterdir()) for name in left]
        time.sleep(0.1)


TWO_ENGINES = """
import json, sys
from nanovllm_dist import LLM, SamplingParams
from nanovllm_dist.errors import EngineStartError

options = json.loads(sys.argv[1])
params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
first = LLM(**options, launcher="ray")
try:
    second = LLM(**options, launcher="ray")
except EngineStartError as error:
    print(error)
    second = LLM(**options)
first.close()
print(len(second.generate([[1, 2]], params, use_tqdm=False)[0].token_ids))
second.close()
"""


def two_engines(model: str, environment: dict[str, str], **options: object) -> str:
    """What a program prints that uses its second engine after closing its first."""
    given = {"model": model, "load_format": "dummy", "num_blocks": 50, "threads_per_worker": 1, **options}
    command = [sys.executable, "-c", TWO_ENGINES, json.dumps(given)]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_two_engines_of_a_program_share_its_connection_until_both_have_left(model: str, cluster: Cluster) -> None:
    assert two_engines(model, cluster.environment, ray_address=cluster.address) == "4\n"
    cluster.wait_until_free(2)


def test_beside_an_engine_with_a_private_ray_another_takes_plain_processes(model: str) -> None:
    refusal, tokens = two_engines(model, dict(os.environ)).splitlines()
    assert "another engine of this program runs on a private Ray" in refusal
    assert "use launcher=local" in refusal
    assert tokens == "4"


def test_an_address_without_a_cluster_is_an_error_at_once(model: str) -> None:
    started = time.monotonic()
    with pytest.raises(EngineStartError, match=r"Ray at 127\.0\.0\.1:1 cannot be joined.*refused"):
        Engine.start(EngineConfig(model=model, ray_address="127.0.0.1:1", load_format="dummy"))
    assert time.monotonic() - started < 30
