"""A model on several hosts: each finds the one that was asked for, and another model is refused."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import EngineStartError
from nanovllm_dist.launcher import ray_cluster
from nanovllm_dist.launcher.model_copies import check_same, find_copy
from nanovllm_dist.launcher.sites import Site
from nanovllm_dist.launcher.supervisor import Supervisor

PLACE = "/models/of/the/launcher"


def model(directory: Path, config: str = "{}", weights: bytes = b"1234") -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(config)
    (directory / "model.safetensors").write_bytes(weights)
    return directory


def test_a_host_without_the_directory_looks_for_the_name_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = model(tmp_path / "roots" / "my-model")
    monkeypatch.setenv("NANOVLLM_MODEL_ROOTS", str(tmp_path / "roots"))

    assert find_copy(PLACE, "my-model", "huggingface", True).directory == str(there)


def test_copies_of_one_model_may_be_in_different_places(tmp_path: Path) -> None:
    own, other = (find_copy(str(model(tmp_path / name)), "m", "huggingface", True) for name in "ab")

    check_same(own, "10.0.0.1", other, "10.0.0.2")


@pytest.mark.parametrize("change", [{"config": "[]"}, {"weights": b"12345"}])
def test_another_model_is_refused_with_both_hosts(tmp_path: Path, change: dict[str, Any]) -> None:
    own = find_copy(str(model(tmp_path / "a")), "m", "huggingface", True)
    other = find_copy(str(model(tmp_path / "b", **change)), "m", "huggingface", True)

    with pytest.raises(EngineStartError, match=r"host 10.0.0.2 has another model in .*/b than host 10.0.0.1 in .*/a"):
        check_same(own, "10.0.0.1", other, "10.0.0.2")


def test_weights_that_are_not_read_may_differ(tmp_path: Path) -> None:
    own = find_copy(str(model(tmp_path / "a")), "m", "huggingface", False)
    other = find_copy(str(model(tmp_path / "b", weights=b"")), "m", "huggingface", False)

    check_same(own, "10.0.0.1", other, "10.0.0.2")


# --- what the cluster's backend asks hosts ------------------------------------------------------------------


class Cluster:
    """Sites on hosts of which each has its own directory; it notes what they were asked, and when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: list[Any]) -> None:
        self.events: list[tuple[str, Any]] = []
        self.backend = ray_cluster.RayBackend(cast(Supervisor, None))
        self.backend._sites = [
            Site(f"n{rank}", f"10.0.0.{rank}", "0", rank == 0, cores=1) for rank in range(len(answers))
        ]
        self.backend._actors = [self._actor(answer) for answer in answers]
        monkeypatch.setattr(ray_cluster.ray, "get", self._get)
        monkeypatch.setattr(ray_cluster.ray.util, "get_node_ip_address", lambda: "10.0.0.0")

    def _actor(self, answer: Any) -> Any:
        def remote(*asked: Any) -> Any:
            self.events.append(("asked", asked))
            return answer

        return SimpleNamespace(find_model=SimpleNamespace(remote=remote))

    def _get(self, answer: Any, timeout: float) -> Any:
        self.events.append(("waited", timeout))
        time.sleep(0.05)
        return answer


def test_every_host_is_asked_for_the_model_itself_before_any_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = str(model(tmp_path / "a"))
    own = find_copy(directory, "m", "huggingface", True)
    cluster = Cluster(monkeypatch, [None, own._replace(directory="/one"), own._replace(directory="/two")])
    config = EngineConfig(model=directory, model_source="org/model", served_model_name="alias", startup_timeout=30.0)

    found = [cluster.backend.model_directory(config, rank) for rank in range(3)]

    assert found == [directory, "/one", "/two"]
    assert [name for name, _ in cluster.events] == ["asked", "asked", "waited", "waited"]
    assert [what for name, what in cluster.events if name == "asked"] == [
        (directory, "org/model", "huggingface", True)
    ] * 2
    first, second = (seconds for name, seconds in cluster.events if name == "waited")
    assert second < first - 0.04 < 30.0  # one deadline for all


def test_a_host_with_another_model_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = find_copy(str(model(tmp_path / "b", config="[]")), "m", "huggingface", True)
    cluster = Cluster(monkeypatch, [None, other])

    with pytest.raises(EngineStartError, match=r"host 10\.0\.0\.1 has another model .* than host 10\.0\.0\.0"):
        cluster.backend.model_directory(EngineConfig(model=str(model(tmp_path / "a"))), 1)
