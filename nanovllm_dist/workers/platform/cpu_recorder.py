"""Steps of decodes as one C call each, the CPU's kind of graph: see cpu_decoder.c.

Nothing is recorded: what lasts from step to step is written down once, and a size is where its inputs lie. What
is in the layers is the business of cpu_step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from typing import Any, cast

import torch

from nanovllm_dist.models.layers.kernels import LayerKernels
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.workers.decode_step import DecodeStep
from nanovllm_dist.workers.graphs import Replay, StepBody, T
from nanovllm_dist.workers.platform.cpu_group import CpuGroup
from nanovllm_dist.workers.platform.cpu_kernels import kernel_library
from nanovllm_dist.workers.platform.cpu_layers import CpuLayers, Matrix, PanelLinear
from nanovllm_dist.workers.platform.cpu_step import CpuStep

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Decoder(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("layers", "of", "final", "embeddings")),
        ("head", Matrix),
        *((name, _POINTER) for name in ("cos", "sin", "known", "tables", "logits", "space", "group", "starts")),
        ("table_stride", _LONG),
        *((name, _INT) for name in ("columns", "few")),
    ]


class _Decodes(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("places", "slots", "positions", "cache_slots", "lengths")),
        *((name, _POINTER) for name in ("inv_temperature", "uniforms", "tokens")),
        ("rows", _INT),
    ]


class CpuRecorder:
    """A Recorder for bfloat16 on one rank or the ranks of one host.

    Models that `cpu_step` does not take run by operation.
    """

    records_prefills = False
    shares_logits = True
    records_ahead = False

    def __init__(self, library: ctypes.CDLL, comm: Communicator) -> None:
        self._group = comm if isinstance(comm, CpuGroup) else None
        self._decode: Any = library.decode_tokens
        self._decode.argtypes, self._decode.restype = [_POINTER, _POINTER], None
        self._space_of: Any = library.decoder_space
        self._space_of.argtypes, self._space_of.restype = [_POINTER, _LONG], _LONG
        self._decoder: _Decoder | None = None
        self._kept: list[Any] = []

    def decode_sizes(self, max_num_seqs: int) -> list[int]:
        """All: there is nothing to record, so nothing need be padded."""
        return list(range(1, max_num_seqs + 1))

    def record(self, key: Hashable, body: StepBody[T], inputs: list[torch.Tensor], lengths: list[int]) -> Replay[T]:
        """See Recorder; `body` is the `forward` of a DecodeStep."""
        step = body.__self__  # type: ignore[attr-defined]
        if self._decoder is None:
            self._decoder = self._describe(step)
        decoder, logits = self._decoder, step.logits
        if decoder is None:
            return lambda lengths: body(inputs, lengths)
        tokens = torch.empty(len(lengths), dtype=torch.int64)
        now = _Decodes(*(each.data_ptr() for each in (*inputs, tokens)), len(lengths))

        def replay(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            if self._group is not None:
                self._group.check()
            self._decode(ctypes.byref(decoder), ctypes.byref(now))
            if self._group is not None:
                self._group.check()
            return tokens, logits[: len(tokens)]

        return cast(Replay[T], replay)

    def _describe(self, step: DecodeStep) -> _Decoder | None:
        """What lasts from step to step, or None if a part of the model is not for the C kernels."""
        model = step.model
        layers, head = model.fused, model.lm_head.kernel
        if not isinstance(layers, CpuStep) or not isinstance(head, PanelLinear) or step.logits is None:
            return None
        starts = torch.tensor([0, *(end for _start, end in model.vocab.ranges)], dtype=torch.int32)
        decoder = _Decoder(
            *layers.pointers(step.kv_caches),
            embeddings=model.vocab.weight.data_ptr(),
            head=head.matrix,
            cos=model.rotary.cos_table.data_ptr(),
            sin=model.rotary.sin_table.data_ptr(),
            known=step.known.data_ptr(),
            tables=step.block_tables.data_ptr(),
            logits=step.logits.data_ptr(),
            group=None if self._group is None else self._group.pointer,
            starts=starts.data_ptr(),
            table_stride=step.block_tables.stride(0),
            columns=model.lm_head.columns,
            few=layers.few_rows,
        )
        space = torch.empty(self._space_of(ctypes.byref(decoder), len(step.logits)), dtype=torch.uint8)
        decoder.space = space.data_ptr()
        self._kept = [starts, space, step]
        return decoder


def cpu_recorder(comm: Communicator, kernels: LayerKernels) -> CpuRecorder | None:
    """The recorder where the layers are C kernels and ranks, if there are several, are on one host."""
    library = kernel_library() if isinstance(kernels, CpuLayers) else None
    together = comm.world_size == 1 or isinstance(comm, CpuGroup)
    return CpuRecorder(library, comm) if library is not None and together else None
