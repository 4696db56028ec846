"""A trace file is what Chrome and Perfetto read: named processes and tracks, and spans that nest or follow."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from traced_steps import traced_window

from nanovllm_dist.bench.chrome_trace import trace_events, write_chrome_trace
from nanovllm_dist.wire.messages import StepTrace


def test_the_file_is_json_with_a_process_for_the_coordinator_and_every_rank(tmp_path: Path) -> None:
    path = tmp_path / "steps.trace"
    write_chrome_trace([traced_window(5, ranks=2)], path)
    events = json.loads(path.read_text())["traceEvents"]
    names = {one["pid"]: one["args"]["name"] for one in events if one["name"] == "process_name"}
    assert names == {0: "coordinator", 1: "rank 0", 2: "rank 1"}
    tracks = {(one["pid"], one["tid"]): one["args"]["name"] for one in events if one["name"] == "thread_name"}
    assert tracks == {
        (0, 0): "host",
        (1, 0): "host",
        (1, 1): "device",
        (2, 0): "host",
        (2, 1): "device",
    }


def test_spans_are_complete_positive_and_on_a_track_that_has_a_name() -> None:
    events = trace_events([traced_window(5, ranks=2)])
    named = {(one["pid"], one["tid"]) for one in events if one["name"] == "thread_name"}
    spans = [one for one in events if one["ph"] != "M"]
    assert len(spans) == 5 * (3 + 2 * 2)
    for one in spans:
        assert one["ph"] == "X"
        assert (one["pid"], one["tid"]) in named
        assert one["ts"] >= 0.0
        assert one["dur"] >= 0.0
        assert set(one["args"]) == {"step", "rows", "tokens"}
    assert min(one["ts"] for one in spans) == 0.0


def test_what_a_track_shows_does_not_overlap() -> None:
    tracks = defaultdict(list)
    for one in trace_events([traced_window(20)]):
        if one["ph"] == "X":
            tracks[one["pid"], one["tid"]].append((one["ts"], one["dur"]))
    assert len(tracks) == 3
    for spans in tracks.values():
        assert all(ts + dur <= later + 0.01 for (ts, dur), (later, _dur) in pairwise(sorted(spans)))


def test_a_span_lasts_as_long_as_its_phase() -> None:
    spans = {one["name"]: one for one in trace_events([traced_window(3)]) if one["ph"] == "X"}
    lengths = {name: one["dur"] for name, one in spans.items()}
    expected = {"schedule": 100.0, "prepare": 1000.0, "step": 3000.0, "commit": 200.0, "deliver": 400.0}
    assert lengths == pytest.approx(expected, abs=0.01)
    assert spans["step"]["args"] == {"step": 2, "rows": 8, "tokens": 10}
    assert spans["step"]["ts"] == pytest.approx(2 * 4000.0 + 1500.0, abs=0.01)


def test_nothing_is_written_without_a_path_and_a_window_without_steps_is_a_trace_too(tmp_path: Path) -> None:
    write_chrome_trace([traced_window(2)], None)
    assert list(tmp_path.iterdir()) == []
    write_chrome_trace([StepTrace([], [])], tmp_path / "empty.trace")
    assert json.loads((tmp_path / "empty.trace").read_text())["traceEvents"]
