"""nanovllm_dist: a tensor-parallel LLM runtime of separate processes, readable in an afternoon.

`from nanovllm_dist import LLM, SamplingParams` is the public face. Names load on first use, so that importing
a room of the package does not import torch or the client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nanovllm_dist.async_client import AsyncDistLLM
    from nanovllm_dist.client import LLM, DistLLM
    from nanovllm_dist.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from nanovllm_dist.sampling_params import SamplingParams

_HOME = {
    "DistLLM": "client",
    "LLM": "client",
    "AsyncDistLLM": "async_client",
    "SamplingParams": "sampling_params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "RequestMetrics": "outputs",
    "Logprob": "outputs",
}

__all__ = [
    "LLM",
    "AsyncDistLLM",
    "CompletionOutput",
    "DistLLM",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
