"""The report of a load as tables in the terminal."""

from __future__ import annotations

from rich.console import Console

from nanovllm_dist.bench.load import LoadReport, RateResult
from nanovllm_dist.bench.report import plain_table, show_engine, times_table
from nanovllm_dist.bench.report_steps import show_steps


def show_load(report: LoadReport, console: Console | None = None) -> None:
    """Print the tables of every rate."""
    console = console or Console()
    for result in report.results:
        _show_rate(result, console)
        show_steps(result.steps, console)
        show_engine(console, result.counters, result.seconds, report.engine, report.environment)


def _show_rate(result: RateResult, console: Console) -> None:
    work = result.workload
    sums = f"{work.num_requests:,} requests, {work.prompt_tokens:,} tokens in, {work.output_tokens:,} out"
    table = plain_table(f"Load: {result.rate:g} requests/s ({sums}), temperature {work.temperature:g}")
    table.add_row("requests/s answered", f"{result.requests_per_second:,.2f}")
    table.add_row("output tokens/s", f"{result.output_tokens_per_second:,.1f}")
    table.add_row("seconds", f"{result.seconds:,.1f}")
    if result.refused:
        table.add_row("refused: the queue was full", f"{result.refused:,}")
    table.add_row("cores that the client kept busy", f"{result.client_cpu:.2f}")
    console.print(table)
    console.print(
        times_table(
            {
                "TTFT": result.ttft,
                "ITL": result.itl,
                "TPOT": result.tpot,
                "E2E": result.e2e,
                "sent late by": result.lateness,
            }
        )
    )
