"""The report of the scheduler's costs as tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from nanovllm_dist.bench.report import environment_line
from nanovllm_dist.bench.scheduler_cost import RUNNING_BESIDE_A_QUEUE, SchedulerReport, StepCost


def show_scheduler(report: SchedulerReport, console: Console | None = None) -> None:
    """Print the tables of both series."""
    console = console or Console()
    console.print(_table("Scheduler by running requests, none waiting", report.by_running))
    beside = f"{RUNNING_BESIDE_A_QUEUE} running, one ends and one is admitted per step"
    console.print(_table(f"Scheduler by waiting requests, {beside}", report.by_queue))
    console.print(f"longest queue over shortest: {report.queue_growth:.2f} x; {report.steps} steps at every point")
    console.print(environment_line(report.environment))


def _table(title: str, costs: list[StepCost]) -> Table:
    table = Table(title=f"{title}; µs", title_justify="left", title_style="bold")
    for column in ("running", "waiting", "schedule", "commit", "step", "step p99", "submit"):
        table.add_column(column, justify="right")
    for cost in costs:
        times = (f"{value:,.1f}" for value in (cost.schedule, cost.commit, cost.step, cost.step_p99))
        submit = f"{cost.submit:,.1f}" if cost.submit is not None else ""
        table.add_row(f"{cost.running:,}", f"{cost.queued:,}", *times, submit)
    return table
