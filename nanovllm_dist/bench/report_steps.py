"""The breakdown of a step as a table in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from nanovllm_dist.bench.distribution import Distribution
from nanovllm_dist.bench.step_breakdown import StepBreakdown

_PHASES = {
    "schedule": "schedule, encode, hand to the sockets",
    "send": "send: until rank 0 has it",
    "prepare": "prepare: until the device has its work",
    "queued": "queued behind the step before",
    "device": "device (sampling is part of it)",
    "back": "return: until the tokens are back",
    "commit": "commit",
    "next_step": "the next steps leave first",
    "deliver": "deliver: outputs to the clients' sockets",
    "span": "sum: from its plan to its outputs",
}
_DEVICE = {
    "interval": "from one end on the device to the next",
    "device_idle": "of it, the device idle",
}


def show_steps(steps: StepBreakdown | None, console: Console) -> None:
    """Print where the time of a step goes, in microseconds; nothing when no step was traced."""
    if steps is None:
        return
    title = f"A step, µs: {steps.span.count} steps in a row, {steps.rows:,.1f} rows and {steps.tokens:,.1f} tokens each"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("mean", "p50", "p90", "p99"):
        table.add_column(column, justify="right")
    for field, name in _PHASES.items():
        _add(table, name, getattr(steps, field))
    table.add_section()
    for field, name in _DEVICE.items():
        _add(table, name, getattr(steps, field))
    console.print(table)


def _add(table: Table, name: str, times: Distribution) -> None:
    table.add_row(name, *(f"{value:,.0f}" for value in (times.mean, times.p50, times.p90, times.p99)))
