"""Suite: several workloads and a load against one engine, so that a start is paid for once.

Each report is handed over as soon as it is there: a run that is cut short keeps what it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from nanovllm_dist.bench.environment import describe_environment
from nanovllm_dist.bench.load import LoadReport, LoadSettings, load_of
from nanovllm_dist.bench.session import open_session
from nanovllm_dist.bench.throughput import ThroughputReport, ThroughputSettings, throughput_of
from nanovllm_dist.bench.workloads import Workload
from nanovllm_dist.client import DistLLM
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.launcher.engine import Engine

SUITE_WORKLOADS = ("upstream_seed0", "upstream_seed1", "upstream_seed2", "single")


def run_suite(
    config: EngineConfig,
    workloads: Sequence[Workload],
    throughput: ThroughputSettings,
    load: LoadSettings | None,
    notify: Callable[[str], None],
    keep: Callable[[str, ThroughputReport | LoadReport], None],
    trace_directory: Path | None = None,
) -> None:
    """Start an engine, measure each workload and then `load`, stop it; `keep` gets every report with a name for it.

    Traces go to `NAME.trace` in `trace_directory`, if there is one.

    Raises NanoVLLMError; ConfigError, when a request is longer than the engine takes, before it starts.
    """
    session = open_session(config, *workloads, *(load.workloads() if load is not None else ()))
    environment = describe_environment()
    with DistLLM.from_engine(Engine.start(config, progress=True)) as llm:
        for workload in workloads:
            notify(f"workload {workload.name}")
            name = f"throughput-{workload.name}"
            settings = replace(throughput, trace_file=_trace_file(trace_directory, name))
            keep(name, throughput_of(llm, session, environment, workload, settings, notify))
        if load is not None:
            load = replace(load, trace_file=_trace_file(trace_directory, "load"))
            keep("load", load_of(llm, session, environment, load, notify))


def _trace_file(directory: Path | None, name: str) -> str | None:
    return None if directory is None else str(directory / f"{name}.trace")
