"""An engine on a Ray cluster that exists already: it takes its place there and gives it back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

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
        with self._out.open("w") as out:
            self._process = subprocess.Popen([sys.executable, "-c", HEAD, f"{directory}/r"], stdout=out)
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


def test_an_engine_runs_in_the_cluster_and_gives_everything_back(model: str, cluster: Cluster) -> None:
    engine = Engine.start(config(model, cluster, tensor_parallel_size=2))
    cluster.wait_until_free(0)
    pids = engine.pids
    client = DistLLM.connect(engine.address)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    assert len(client.generate([[1, 2]], params, use_tqdm=False)[0].token_ids) == 4
    client.close()

    engine.stop()

    cluster.wait_until_free(2)
    assert not any(psutil.pid_exists(pid) for pid in pids.values())


def test_a_cluster_that_is_too_small_says_what_it_has(model: str, cluster: Cluster) -> None:
    with pytest.raises(EngineStartError, match=r"has 2 CPU \(2 free\), and 4 x 1 CPU was asked for"):
        Engine.start(config(model, cluster, tensor_parallel_size=4, startup_timeout=3.0))
    cluster.wait_until_free(2)


def test_a_launcher_that_is_killed_leaves_nothing_in_the_cluster(model: str, cluster: Cluster) -> None:
    source = (
        "import sys, time; from nanovllm_dist.config import EngineConfig;"
        "from nanovllm_dist.launcher.engine import Engine;"
        "engine = Engine.start(EngineConfig.from_json(sys.argv[1]));"
        "print(*engine.pids.values(), flush=True); time.sleep(600)"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", source, config(model, cluster).to_json()], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    pids = [int(pid) for pid in launcher.stdout.readline().split()]
    before = set(os.listdir(tempfile.gettempdir()))

    launcher.kill()
    launcher.wait()

    cluster.wait_until_free(2)
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert set(os.listdir(tempfile.gettempdir())) <= before


def test_an_address_without_a_cluster_is_an_error(model: str) -> None:
    with pytest.raises(EngineStartError, match=r"Ray at 127\.0\.0\.1:1 cannot be joined"):
        Engine.start(EngineConfig(model=model, ray_address="127.0.0.1:1", load_format="dummy"))
