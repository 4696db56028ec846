"""Which device `auto` takes, and what is said where the asked-for one cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm_dist.errors import ConfigError
from nanovllm_dist.workers.platform import cuda, get_platform


def test_a_torch_without_cuda_is_told_from_one_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, (line, expected) in enumerate(
        [("cuda: Optional[str] = None", False), ("cuda: Optional[str] = '13.0'", True), ("cuda = '12.8'", True)]
    ):
        package = tmp_path / str(number) / "torch"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "version.py").write_text(f"__all__ = ['cuda']\n{line}\nhip: Optional[str] = None\n")

        class Found:
            origin = str(package / "__init__.py")

        monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name, found=Found: found)
        assert cuda._torch_has_cuda() is expected


def test_an_unknown_device_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"auto, cuda, cpu"):
        get_platform("abacus")
