"""Which devices the ranks of one host get: the first that the launcher itself may see, and never a hidden one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.launcher import cluster_lookup
from nanovllm_dist.launcher.local import LocalBackend

VISIBLE = "CUDA_VISIBLE_DEVICES"


@pytest.fixture
def backend(tmp_path: Path) -> LocalBackend:
    supervisor: Any = SimpleNamespace(directory=tmp_path)  # it starts nothing here
    return LocalBackend(supervisor)


def devices(backend: LocalBackend, ranks: int) -> list[str]:
    config = EngineConfig(model="m", tensor_parallel_size=ranks)
    return [site.device for site in backend.reserve(config, "GPU", VISIBLE)]


def test_without_a_limit_they_are_counted_from_zero(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    assert devices(backend, 2) == ["0", "1"]


def test_a_limit_is_kept_in_its_order(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "3,1,2")
    assert devices(backend, 2) == ["3", "1"]


@pytest.mark.parametrize(("visible", "left"), [(None, ["0", "2"]), ("3,1,2", ["3", "2"])])
def test_those_of_an_engine_on_a_private_ray_are_left_to_it(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, visible: str | None, left: list[str]
) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    cluster_lookup.devices_of_private_ray[:] = ["1"]
    try:
        assert devices(backend, 2) == left
    finally:
        cluster_lookup.devices_of_private_ray.clear()


@pytest.mark.parametrize("visible", ["", "5"])
def test_hidden_devices_are_not_taken(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv(VISIBLE, visible)
    with pytest.raises(ConfigError, match="needs more devices"):
        devices(backend, 2)
