"""Directories of compiled graphs: another for whatever changed, and nobody else's to write to. Free of torch."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm_dist.errors import ConfigError
from nanovllm_dist.workers.platform import graph_cache
from nanovllm_dist.workers.platform.graph_cache import entry_directory, try_lock

FACTS: dict[str, Any] = {"rows": 8, "rank": 0, "tensors": [["torch.bfloat16", 64, 128]], "versions": {"cann": "8.3"}}


def test_the_same_facts_are_found_again_whatever_their_order(tmp_path: Path) -> None:
    directory = entry_directory(tmp_path / "graphs", FACTS)

    assert entry_directory(tmp_path / "graphs", dict(reversed(FACTS.items()))) == directory


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 16},
        {"rank": 1},
        {"tensors": [["torch.bfloat16", 65, 128]]},
        {"tensors": [["torch.float16", 64, 128]]},
        {"versions": {"cann": "8.5"}},
        {"another": None},
    ],
)
def test_any_other_fact_is_another_directory(tmp_path: Path, change: dict[str, Any]) -> None:
    assert entry_directory(tmp_path, {**FACTS, **change}) != entry_directory(tmp_path, FACTS)


def test_a_line_of_this_package_that_changes_is_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = entry_directory(tmp_path, FACTS)
    monkeypatch.setattr(graph_cache, "source_digest", lambda: "of other sources")

    assert entry_directory(tmp_path, FACTS) != before


def test_what_a_directory_is_for_can_be_read_in_it(tmp_path: Path) -> None:
    kept = json.loads((entry_directory(tmp_path, FACTS) / "facts.json").read_text())

    assert kept == {**FACTS, "sources": graph_cache.source_digest()}


def test_only_the_user_can_write_to_what_is_made(tmp_path: Path) -> None:
    directory = entry_directory(tmp_path / "a" / "graphs", FACTS)

    for path in (directory, directory.parent, directory.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_code_that_others_could_have_put_there_is_refused(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "graphs"
    root.mkdir()
    root.chmod(mode)

    with pytest.raises(ConfigError, match=r"graph_cache_dir: .* may be written to by others"):
        entry_directory(root, FACTS)


def test_what_is_another_users_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = entry_directory(tmp_path / "graphs", FACTS).parent
    monkeypatch.setattr(os, "getuid", lambda: root.stat().st_uid + 1)

    with pytest.raises(ConfigError, match=r"graph_cache_dir: .* is another user's"):
        entry_directory(root, FACTS)


def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "graphs").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ConfigError, match=r"graph_cache_dir: .* is a link"):
        entry_directory(tmp_path / "graphs", FACTS)


def test_a_place_where_others_could_exchange_the_directory_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "place"
    (place / "graphs").mkdir(parents=True, mode=0o700)
    place.chmod(0o777)

    with pytest.raises(ConfigError, match=r"graph_cache_dir: .*place' may be written to by others"):
        entry_directory(place / "graphs", FACTS)


def test_a_directory_belongs_to_one_process_until_it_lets_go_or_ends(tmp_path: Path) -> None:
    source = (
        "import sys; from pathlib import Path; from nanovllm_dist.workers.platform.graph_cache import try_lock;"
        "print(try_lock(Path(sys.argv[1])) is not None, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", source, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        assert try_lock(tmp_path) is None
        other.communicate()

    lock = try_lock(tmp_path)
    assert lock is not None
    assert try_lock(tmp_path) is None
    os.close(lock)


def test_a_place_that_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match=r"graph_cache_dir=.*cannot be written to \(.+\): name another"):
        entry_directory(tmp_path / "file", FACTS)
