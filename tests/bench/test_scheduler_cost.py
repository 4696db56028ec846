"""The scheduler's costs: the points that were asked for, and a step that does not look at the whole queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm_dist.bench.scheduler_cost import RUNNING_BESIDE_A_QUEUE, SchedulerReport, measure_scheduler
from nanovllm_dist.bench.scheduler_plot import plot_scheduler


@pytest.fixture(scope="module")
def report() -> SchedulerReport:
    return measure_scheduler(lambda line: None, steps=60, running=(1, 32), queued=(1, 4000))


def test_every_point_is_measured(report: SchedulerReport) -> None:
    assert [(cost.running, cost.queued) for cost in report.by_running] == [(1, 0), (32, 0)]
    assert [(cost.running, cost.queued) for cost in report.by_queue] == [
        (RUNNING_BESIDE_A_QUEUE, 1),
        (RUNNING_BESIDE_A_QUEUE, 4000),
    ]
    for cost in (*report.by_running, *report.by_queue):
        assert 0.0 < cost.schedule < cost.step
        assert 0.0 < cost.commit < cost.step <= cost.step_p99


def test_requests_are_submitted_only_where_there_is_a_queue(report: SchedulerReport) -> None:
    assert all(cost.submit is None for cost in report.by_running)
    assert all(cost.submit is not None and cost.submit > 0.0 for cost in report.by_queue)


def test_a_step_costs_more_with_more_running_but_not_with_a_long_queue(report: SchedulerReport) -> None:
    assert report.by_running[1].step > 4 * report.by_running[0].step
    assert report.queue_growth < 10  # a scheduler that walked the queue would take 60 times as long


def test_the_curves_are_drawn(report: SchedulerReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "costs.svg"
    plot_scheduler(report, str(path))
    assert "<svg" in path.read_text()
