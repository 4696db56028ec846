"""An engine over two Ray nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from two_nodes import TwoNodes, two_nodes

from nanovllm_dist.config import EngineConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from nanovllm_dist.client import DistLLM
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.launcher.engine import Engine
from nanovllm_dist.sampling_params import SamplingParams
engine = Engine.start(EngineConfig.from_json(sys.argv[1]))
llm = DistLLM.connect(engine.address, key_file=engine.key_file)
params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
tokens = [list(output.token_ids) for output in llm.generate([[1, 2, 3], [4, 5]], params, use_tqdm=False)]
llm.close(); engine.stop()
print(json.dumps({"address": engine.address, "tokens": tokens}))
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with two_nodes() as nodes:
        yield nodes


def run(nodes: TwoNodes, config: EngineConfig, directory: Path | None = None) -> tuple[dict[str, Any], str]:
    """(what PROGRAM printed, its stderr) for an engine on this cluster."""
    joined = config.replace(ray_address=nodes.address)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, msgspec.json.encode(joined).decode()],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **nodes.environment, "PYTHONPATH": str(ROOT)},
        cwd=directory,
    )
    return json.loads(done.stdout) if done.returncode == 0 else {}, done.stderr


def config(model: str, **options: Any) -> EngineConfig:
    return EngineConfig(model=model, load_format="dummy", num_blocks=50, threads_per_worker=1, device="cpu", **options)


def test_ranks_on_two_nodes_give_the_tokens_of_one_rank(nodes: TwoNodes, tiny_model: Path) -> None:
    both, errors = run(nodes, config(str(tiny_model), tensor_parallel_size=2))
    assert both, errors
    one, errors = run(nodes, config(str(tiny_model)))
    assert one, errors

    assert both["address"].startswith("tcp://")  # over the network, hence with keys
    assert both["tokens"] == one["tokens"]


def test_a_model_named_by_a_relative_path_is_found_by_every_process(nodes: TwoNodes, tiny_model: Path) -> None:
    answer, errors = run(nodes, config(tiny_model.name, tensor_parallel_size=2), directory=tiny_model.parent)
    assert answer, errors


def test_a_cluster_that_declares_no_such_device_says_how_to(nodes: TwoNodes, tiny_model: Path) -> None:
    _, errors = run(nodes, config(str(tiny_model), startup_timeout=3.0).replace(device="npu", dtype="bfloat16"))
    assert "the Ray cluster has 0 NPU (0 free), and 1 x 1 NPU was asked for" in errors
    assert "ray start --resources='{\"NPU\": N}'" in errors


def test_a_host_that_has_the_model_nowhere_is_named(tmp_path: Path) -> None:
    from nanovllm_dist.errors import ModelNotFoundError
    from nanovllm_dist.launcher.ray_cluster import ProcessHost

    host = ProcessHost(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert host.find_model(str(tmp_path), "my-model", "huggingface", True).directory == str(tmp_path)
    with pytest.raises(ModelNotFoundError, match="my-model"):
        host.find_model("/no/such/directory", "my-model", "huggingface", True)
