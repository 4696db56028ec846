"""The design's rules that an import linter cannot see, read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanovllm_dist"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def code_words(path: Path) -> Iterator[str]:
    """Names and string constants of a file, docstrings left out."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_policy_has_no_clock_no_files_and_no_randomness_of_its_own() -> None:
    pure = [path for path in (PACKAGE / "scheduler").glob("*.py") if path.name != "coordinator.py"]
    forbidden = {"time", "random", "os", "io", "pathlib", "socket", "threading", "logging", "datetime"}
    assert {name_of(path): set(imports(path)) & forbidden for path in pure if set(imports(path)) & forbidden} == {}


def test_ray_is_imported_in_one_file() -> None:
    users = {name_of(path) for path in SOURCES if any(name.split(".")[0] == "ray" for name in imports(path))}
    assert users == {"launcher/ray_cluster.py"}


def test_only_the_platform_room_names_a_device() -> None:
    device = re.compile(r"\b(cuda|npu|nccl|hccl)\b", re.IGNORECASE)
    elsewhere = [path for path in SOURCES if "platform" not in path.parts]
    assert {name_of(path) for path in elsewhere if any(device.search(word) for word in code_words(path))} == set()


def test_nothing_that_runs_data_is_imported_or_called() -> None:
    forbidden = {"pickle", "cloudpickle", "marshal", "shelve", "dill"}
    assert {name_of(path) for path in SOURCES if set(imports(path)) & forbidden} == set()
    calls = re.compile(r"\btorch\.load\(|\beval\(|\bexec\(|shell=True|trust_remote_code=True")
    running = {name_of(p) for p in SOURCES if calls.search(p.read_text().replace(".eval(", "").replace("_exec(", ""))}
    assert running == set()


def test_assert_only_checks_integrity_or_narrows_a_type() -> None:
    """What a user can get wrong survives `python -O`."""
    found = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "check_integrity"]
        allowed = {id(node) for check in checks for node in ast.walk(check)}
        lines = [
            n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert) and id(n) not in allowed and not narrows(n)
        ]
        if lines:
            found[name_of(path)] = lines
    assert found == {}


def narrows(node: ast.Assert) -> bool:
    """`assert isinstance(x, T)` or `assert x is not None`."""
    test = node.test
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.IsNot)
    return isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "isinstance"


def test_files_stay_short_enough_to_read() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 500} == {}
    assert sum(length > 300 for length in lengths.values()) <= len(lengths) // 10


def test_the_links_at_the_root_lead_to_the_rooms_and_nothing_imports_through_them() -> None:
    rooms = ("launcher", "workers", "scheduler", "models")
    for room in rooms:
        assert (ROOT / room).is_symlink()
        assert (ROOT / room).resolve() == PACKAGE / room
    everything = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    through = {str(p) for p in everything if any(name.split(".")[0] in rooms for name in imports(p))}
    assert through == set()
