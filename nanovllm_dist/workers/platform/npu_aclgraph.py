"""Decodes as captured NPU graphs whose attention gets new lengths before each replay.

Attention takes its lengths from the host, so a capture holds those of its day. Each attention is therefore captured as
a group of tasks behind an event: a replay stops there until the tasks have been given this step's lengths on a stream
of their own. That stream waits for the replay before, which may still be under way, so that no step gets the lengths of
the next one. What a step computes is unknown here.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch_npu import npu

from nanovllm_dist.workers.graphs import Replay, StepBody, T
from nanovllm_dist.workers.platform.npu_graphs import decode_sizes
from nanovllm_dist.workers.platform.npu_layers import NpuLayers


@dataclass(frozen=True)
class _Task:
    """A captured attention: what it waits for, the handle of its tasks, and its arguments."""

    event: Any
    handle: Any
    arguments: dict[str, Any]


class AttentionTasks:
    """The attentions of one graph, in order."""

    def __init__(self) -> None:
        self._tasks: list[_Task] = []
        self._workspace: torch.Tensor | None = None

    def capture(self, arguments: dict[str, Any]) -> torch.Tensor:
        """Put an attention into the graph that is being captured; its output [rows, heads, 1, head_dim]."""
        stream = npu.current_stream()
        event = npu.ExternalEvent()
        event.wait(stream)
        event.reset(stream)
        if self._workspace is None:  # layers follow each other, and are alike
            self._workspace = torch.ops.npu._npu_fused_infer_attention_score_get_max_workspace(**arguments)
        query = arguments["query"]
        out = [torch.empty_like(query), torch.empty(1, dtype=query.dtype, device=query.device)]
        whole = {**arguments, "workspace": self._workspace, "out": out}
        npu.graph_task_group_begin(stream)
        torch.ops.npu.npu_fused_infer_attention_score.out(**whole)
        handle = npu.graph_task_group_end(stream)
        self._tasks.append(_Task(event, handle, whole))
        return out[0]

    def update(self, lengths: list[int], stream: Any) -> None:
        """Give each attention these key lengths, in the order of `stream`, and let the replay pass."""
        for task in self._tasks:
            npu.graph_task_update_begin(stream, task.handle)
            torch.ops.npu.npu_fused_infer_attention_score.out(**{**task.arguments, "actual_seq_lengths_kv": lengths})
            npu.graph_task_update_end(stream)
            task.event.record(stream)


class AclGraphRecorder:
    """A Recorder of the current device. Its graphs share one pool of memory."""

    records_prefills = False
    shares_logits = True
    records_ahead = True

    def __init__(self, layers: NpuLayers) -> None:
        self._layers = layers
        self._pool = npu.graph_pool_handle()
        self._capture_stream, self._update_stream = npu.Stream(), npu.Stream()
        self._replayed = npu.Event()

    def decode_sizes(self, max_num_seqs: int) -> list[int]:
        """See npu_graphs."""
        return decode_sizes(max_num_seqs)

    def record(self, key: Hashable, body: StepBody[T], inputs: list[torch.Tensor], lengths: list[int]) -> Replay[T]:
        """See Recorder."""
        graph, tasks = npu.NPUGraph(), AttentionTasks()
        self._capture_stream.wait_stream(npu.current_stream())
        capture = npu.graph(graph, pool=self._pool, stream=self._capture_stream, capture_error_mode="thread_local")
        with self._layers.attending_with(tasks.capture), capture:
            outputs = body(inputs, lengths)
        npu.current_stream().wait_stream(self._capture_stream)

        def replay(lengths: list[int]) -> T:
            stream = npu.current_stream()
            self._update_stream.wait_event(self._replayed)
            graph.replay()
            with npu.stream(self._update_stream):
                tasks.update(lengths, self._update_stream)
            self._replayed.record(stream)
            return outputs

        return replay
