"""The libraries that stand in for CANN's are complete, and a process gets them by its environment alone."""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.npu


def test_each_function_that_torch_npu_links_with_is_there() -> None:
    from standin import build, symbols

    missing = symbols.missing_functions()

    assert len(missing) > 150
    assert set(missing) <= symbols.defined_in(build.library())


def test_each_library_that_torch_npu_links_with_is_there() -> None:
    from standin import build, symbols

    names = {path.name for path in build.library_directory().glob("*.so")}

    assert {"libascendcl.so", "libhccl.so", "libge_runner.so"} <= set(symbols.missing_libraries()) <= names


def test_operators_are_not_stubbed_so_that_a_missing_one_fails() -> None:
    from standin import build, symbols

    assert not {name for name in symbols.defined_in(build.library()) if name.startswith("aclnn")}


def test_the_environment_comes_before_what_was_there_and_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    from standin import build, environment

    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    for _ in range(2):
        variables = environment(3, memory_bytes=1 << 20)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    assert os.environ["LD_LIBRARY_PATH"] == f"{build.library_directory()}:/before"
    assert os.environ["PYTHONPATH"].split(":")[0].endswith("standin/site")
    assert variables["NANOVLLM_NPU_SIMULATION"] == "3"
    assert variables["NANOVLLM_NPU_SIMULATION_MEMORY"] == "1048576"
