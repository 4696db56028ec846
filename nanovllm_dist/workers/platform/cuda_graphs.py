"""Steps as CUDA graphs that share one pool of memory. What a step computes is unknown here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable

import torch

from nanovllm_dist.workers.graphs import Replay, StepBody, T, decode_sizes


class CudaRecorder:
    """A Recorder of the current device. A graph reads lengths from the device's memory and needs none from the host."""

    records_prefills = True
    shares_logits = True
    records_ahead = False

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def decode_sizes(self, max_num_seqs: int) -> list[int]:
        """Many: a graph is recorded in milliseconds."""
        return decode_sizes(max_num_seqs)

    def record(self, key: Hashable, body: StepBody[T], inputs: list[torch.Tensor], lengths: list[int]) -> Replay[T]:
        """See Recorder."""
        outputs: list[T] = []
        launch = self._capture(lambda: outputs.append(body(inputs, [])))

        def replay(lengths: list[int]) -> T:
            launch()
            return outputs[0]

        return replay

    def _capture(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # what broke the recording is worth telling, not that it did
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay
