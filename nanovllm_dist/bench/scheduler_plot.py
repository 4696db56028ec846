"""The scheduler's costs as a picture: two curves in one SVG file. It needs matplotlib, an optional package."""

from __future__ import annotations

import importlib
from typing import Any

from nanovllm_dist.bench.scheduler_cost import RUNNING_BESIDE_A_QUEUE, SchedulerReport, StepCost
from nanovllm_dist.errors import ConfigError


def load_figure() -> Any:
    """matplotlib's Figure class. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: install nanovllm_dist[bench]") from None


def plot_scheduler(report: SchedulerReport, path: str) -> None:
    """Write both curves, with logarithmic axes, to `path`. Raises ConfigError without matplotlib."""
    figure = load_figure()(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _curves(left, report.by_running, [cost.running for cost in report.by_running])
    left.set(xlabel="running requests (none waiting)", ylabel="µs per step, median")
    _curves(right, report.by_queue, [cost.queued for cost in report.by_queue])
    right.set(xlabel=f"waiting requests ({RUNNING_BESIDE_A_QUEUE} running, one ends per step)")
    left.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


def _curves(axes: Any, costs: list[StepCost], places: list[int]) -> None:
    axes.loglog(places, [cost.step for cost in costs], "o-", label="step")
    axes.loglog(places, [cost.schedule for cost in costs], ".--", label="schedule")
    axes.loglog(places, [cost.commit for cost in costs], ".:", label="commit")
    axes.grid(alpha=0.3)
