"""Compiles the kernels of a model side by side, in threads, while its weights are being loaded.

One after the other, as the first steps meet them, they would take many seconds on an empty cache. Each is called once
on rows of nothing, with the types and sizes that real steps have. What they compute is not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from triton.runtime.errors import OutOfResources

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.decoder import DecoderLM
from nanovllm_dist.models.layers.linear import PackedLinear
from nanovllm_dist.workers.kernels.activation import FEW_ROWS, silu_mul
from nanovllm_dist.workers.kernels.paged_decode import row_limits
from nanovllm_dist.workers.kernels.rope_cache import FEW_TOKENS
from nanovllm_dist.workers.platform.cuda_decoder import can_defer_norms, is_plain
from nanovllm_dist.workers.platform.cuda_layers import TritonLayers
from nanovllm_dist.workers.platform.cuda_linear import CudaLinear
from nanovllm_dist.workers.platform.cuda_sampler import ShardedSampler
from nanovllm_dist.workers.platform.cuda_sum_norm import rehearse_sum_norm

# Kernels are cut in one way up to some rows and in another from there on
_ROWS, _MANY_ROWS = 16, max(FEW_ROWS, FEW_TOKENS) + 1
# Sizes of decode graphs that may have linear kernels of their own
_FEW_ROWS = (1, 2, 4)


def compile_in_threads(
    config: EngineConfig, model_config: ModelConfig, model: DecoderLM, kernels: TritonLayers, sampler: ShardedSampler
) -> Callable[[], None]:
    """Start compiling what steps of this model need; returns what waits for the end of it, and raises what failed."""
    device = torch.device("cuda", torch.cuda.current_device())
    calls = _Rehearsal(config, model_config, model, kernels, sampler, device).calls()
    pool = ThreadPoolExecutor(min(len(calls), os.cpu_count() or 1), thread_name_prefix="compile")

    def run(call: Callable[[], object]) -> None:
        torch.cuda.set_device(device)  # each thread has its own
        with torch.inference_mode():
            call()

    futures: list[Future[None]] = [pool.submit(run, call) for call in calls]

    def wait() -> None:
        try:
            for future in futures:
                future.result()
        except OutOfResources as error:
            raise ConfigError(
                f"head_dim={model_config.head_dim} of the model: a kernel needs more than this GPU has ({error}); "
                "use a larger one, or device=cpu"
            ) from error
        finally:
            pool.shutdown()

    return wait


class _Rehearsal:
    """The launches of a model's steps, one each, on nothing. Made before weights are loaded: later, the layers have
    handed theirs over to kernels."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        model: DecoderLM,
        kernels: TritonLayers,
        sampler: ShardedSampler,
        device: torch.device,
    ) -> None:
        layer = model.layers[0]
        self._config, self._model, self._kernels, self._sampler, self._device = config, model, kernels, sampler, device
        self._hidden_size, self._eps = model_config.hidden_size, model_config.rms_norm_eps
        self._dtype = model.norm.weight.dtype
        self._attention, self._mlp = layer.attention, layer.mlp
        self._deferred = can_defer_norms(model, config.tensor_parallel_size)
        self._joined = config.tensor_parallel_size > 1 and is_plain(model)
        qkv, o = layer.attention.qkv_proj, layer.attention.o_proj
        gate_up, down = layer.mlp.gate_up_proj, layer.mlp.down_proj
        self._qkv, self._gate_up = (CudaLinear(_weight(one), one.bias) for one in (qkv, gate_up))
        self._row = [CudaLinear(_weight(one), None) for one in (o, down)]
        self._vocab = CudaLinear(model.output_vocab.weight, None)

    def calls(self) -> list[Callable[[], object]]:
        """What to call, each of them once and in any thread."""
        limits = row_limits(self._model.kv_heads)
        rows = [1, *(limit + 1 for limit in limits if limit < self._config.max_num_seqs)]
        return [
            partial(self._norm, added=False),
            *([] if self._deferred else [partial(self._norm, added=True)]),
            *([self._sum] if self._joined else []),
            *(partial(self._activate, count) for count in (_ROWS, _MANY_ROWS)),
            *(partial(self._attend, count, 0) for count in rows),
            *(partial(self._attend, 0, count) for count in (1, _MANY_ROWS)),
            *(partial(self._project, self._qkv, count) for count in self._few_rows(self._qkv)),
            *(partial(self._gate, count) for count in self._few_rows(self._gate_up)),
            *(partial(self._add, one, count) for one in self._row for count in self._few_rows(one)),
            *(partial(self._project, self._vocab, count) for count in self._few_rows(self._vocab)),
            lambda: self._sampler.rehearse(self._zeros(_ROWS, self._model.lm_head.columns)),
        ]

    def _zeros(self, rows: int, columns: int) -> torch.Tensor:
        return torch.zeros(rows, columns, dtype=self._dtype, device=self._device)

    def _norm(self, added: bool) -> None:
        x = self._zeros(1, self._hidden_size)
        self._kernels.add_rms_norm(x, x.clone() if added else None, self._model.norm.weight, self._eps)

    def _sum(self) -> None:
        rehearse_sum_norm(self._config.tensor_parallel_size, self._zeros(0, self._hidden_size))

    def _activate(self, rows: int) -> None:
        gate_up = self._zeros(rows, self._mlp.gate_up_proj.out_features)
        if self._deferred:
            silu_mul(gate_up, self._zeros(rows, self._hidden_size), self._eps)
        else:
            silu_mul(gate_up)

    def _attend(self, decodes: int, prefills: int) -> None:
        tokens, attention = decodes + 2 * prefills, self._attention
        qkv = self._zeros(tokens, attention.qkv_proj.out_features)
        batch = _batch(self._config, self._model, decodes, prefills, self._dtype, self._device)
        positions = torch.zeros(tokens, dtype=torch.int64, device=self._device)
        plan = self._kernels.prepare(batch, positions, self._model.rotary)
        heads = attention.num_heads, attention.num_kv_heads, attention.qk_norm
        if self._deferred:
            hidden = self._zeros(tokens, self._hidden_size)
            self._kernels.attend(qkv, *heads, 0, batch, plan, attention.qkv_proj.bias, hidden, self._eps)
        else:
            self._kernels.attend(qkv, *heads, 0, batch, plan)

    def _few_rows(self, linear: CudaLinear) -> list[int]:
        """Rows at which its product is a kernel of ours; to load cuBLAS in these threads would keep memory for each."""
        own = linear.bias is None or self._deferred
        return [count for count in _FEW_ROWS if own and count <= linear.few_rows]

    def _project(self, linear: CudaLinear, rows: int) -> None:
        x = self._zeros(rows, linear.weight.shape[1])
        if self._deferred:
            linear.product(x)
        else:
            linear(x)

    def _gate(self, rows: int) -> None:
        x = self._zeros(rows, self._hidden_size)
        if self._deferred or self._joined:
            self._gate_up.gated(x, self._eps if self._deferred else None)
        if not self._deferred:  # joined or not: whether the ranks share memory is not known yet
            self._gate_up(x)

    def _add(self, linear: CudaLinear, rows: int) -> None:
        outputs, inputs = linear.weight.shape
        if self._deferred:
            linear.add_to(self._zeros(rows, outputs), self._zeros(rows, inputs))
        else:
            linear(self._zeros(rows, inputs))


def _weight(linear: PackedLinear) -> torch.Tensor:
    assert linear.weight is not None
    return linear.weight


def _batch(
    config: EngineConfig, model: DecoderLM, decodes: int, prefills: int, dtype: torch.dtype, device: torch.device
) -> AttentionBatch:
    """Rows of one or two tokens on a cache of the null block alone."""
    rows, tokens = decodes + prefills, decodes + 2 * prefills
    lengths = [1] * decodes + [2] * prefills
    cache = torch.zeros(1, model.kv_heads, config.block_size, model.head_dim, dtype=dtype, device=device)
    starts = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0).to(torch.int32)
    blocks = -(-config.max_model_len // config.block_size) + 1
    return AttentionBatch(
        slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=device),
        block_tables=torch.zeros(rows, blocks, dtype=torch.int32, device=device),
        context_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        query_start=starts,
        num_decodes=decodes,
        host_query_lens=lengths,
        host_context_lens=lengths,
        kv_caches=[(cache.transpose(1, 2), cache.clone().transpose(1, 2))],
    )
