"""ModelRunner: one rank's model, cache and batch; turns a step into sampled tokens.

Every rank runs the same step on its own shard. Where the device has a sampler of its own each rank runs it and all
get the same tokens; otherwise rank 0 samples once and the tokens are broadcast: no two ranks can disagree. A step is
started here and awaited by the caller. It knows nothing of sockets or of why a step looks as it does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.loader import dummy_weights, load_weights
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.models.registry import build_model
from nanovllm_dist.wire.messages import NewRow, Step, TokenLogprobs, unpack_ints
from nanovllm_dist.workers import kv_cache
from nanovllm_dist.workers.batch import Batch, Ints, StepRows, StepShape
from nanovllm_dist.workers.decode_step import DecodeStep
from nanovllm_dist.workers.graphs import Graphs, Recorder, chunk_shape, chunk_shapes, decode_size
from nanovllm_dist.workers.logprobs import prompt_logprobs
from nanovllm_dist.workers.platform.base import DeviceSampler, Platform
from nanovllm_dist.workers.profile_steps import profile_steps
from nanovllm_dist.workers.running_step import RunningStep
from nanovllm_dist.workers.sampler import Sampler, SampleResult
from nanovllm_dist.workers.sampling_random import uniform
from nanovllm_dist.workers.sampling_table import SamplingTable
from nanovllm_dist.workers.transfers import Array

# Prompt log-probabilities need logits of every position: this many rows of the vocabulary at once
_LOGIT_ROWS = 256
# Filters sort whole rows: at 151,936 tokens this many take some 300 MB
_SPECIAL_ROWS = 32
# Prompts that come again may have this many blocks, should memory hold them: of a tiny model it would hold millions
_CACHED_BLOCKS = 2**18


class _Decodes(NamedTuple):
    """Decodes as graphs of `sizes` rows, which all run `step`."""

    graphs: Graphs
    sizes: list[int]
    step: DecodeStep


class ModelRunner:
    """Load, measure, allocate, then `start` steps. `config` is resolved."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        platform: Platform,
        comm: Communicator,
        device: torch.device,
    ) -> None:
        self.config = config
        self._platform = platform
        self._comm = comm
        self._device = device
        self._model_config = model_config
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self._kernels = platform.layer_kernels(config, model_config, comm, self.dtype)
        self.model = build_model(model_config, comm, self._kernels, self.dtype, device)
        self._device_sampler = platform.device_sampler(comm, self.model.lm_head)
        self._compiled = platform.compile_kernels(config, model_config, self.model, self._kernels, self._device_sampler)
        self._transfers = platform.transfers(config)
        self._batch = Batch(
            config.max_num_seqs,
            config.max_model_len,
            config.block_size,
            self._transfers,
            device,
            kv_cache.block_stride(platform.cache_layout, config.block_size, self.model.kv_heads),
            getattr(torch, platform.token_dtype),
        )
        self._table = SamplingTable(config.max_num_seqs, model_config.vocab_size, model_config.eos_token_ids, device)
        self._sampler = Sampler(self._table)
        self._decodes: _Decodes | None = None
        self._shapes: list[StepShape] = []
        self._kv_caches: kv_cache.KVCache = []
        self._launched = 0.0  # when the device had the work of the step that is being started

    def load(self, progress: Callable[[int, int], None]) -> None:
        """Fill the weights: from the checkpoint, or random ones with load_format=dummy. Raises WeightsError."""
        if self.config.load_format == "dummy":
            dummy_weights(self.model, self.config.seed)
        else:
            load_weights(self.model, self.config.model, progress)
        self.model.finalize()
        self.model.fused = self._platform.fuse_layers(self.config, self.model, self._kernels, self._comm, self.dtype)
        self._platform.synchronize()  # kernels may read weights ahead of their turn

    def measure_blocks(self) -> int:
        """How many cache blocks this rank can hold, found after steps that take what activations take."""
        config = self.config
        self._compiled()
        self._profile()
        # rows of the longest length fill this many blocks; more are of use only for prompts that come again
        most_useful = config.max_num_seqs * -(-config.max_model_len // config.block_size) + 1
        if config.enable_prefix_caching:
            most_useful = max(most_useful, _CACHED_BLOCKS)
        if config.num_blocks:
            return config.num_blocks
        cache_bytes = self._platform.cache_bytes(config)
        return kv_cache.blocks_that_fit(cache_bytes, self._block_bytes(), config.least_blocks, most_useful)

    def allocate(self, num_blocks: int, report: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Allocate the KV cache; from here on steps may be recorded. `report`: graphs recorded ahead, of how many."""
        self._kv_caches = self._new_cache(num_blocks)
        if self.config.enforce_eager or self._device_sampler is None:
            return
        recorder = self._platform.recorder(self.config, self._model_config, self._kernels, self._comm)
        if recorder is not None:
            self._record_with(recorder, self._device_sampler, report)

    @torch.inference_mode()
    def start(self, step: Step) -> RunningStep | None:
        """Start one step; rank 0 returns it, others only when it is traced. Steps run in the order of their start."""
        for row in step.new_rows:
            self._enter(row)
        rows = self._batch.begin(step)
        if self._decodes is not None and rows.only_decodes:
            sampled = self._replay(rows, self._decodes)
            prompt: list[tuple[int, int, list[TokenLogprobs]]] = []
        else:
            sampled, prompt = self._run(rows)
        if self._comm.rank != 0 and not step.traced:
            return None
        return RunningStep(step, self._launched, self._transfers.download(sampled.token_ids), sampled.logprobs, prompt)

    # --- one step ------------------------------------------------------------------------------------------

    def _enter(self, row: NewRow) -> None:
        bad_words = [unpack_ints(word) for word in row.bad_words]
        self._table.set(row.slot, row.params, row.seed, row.prompt_len, bad_words)

    def _run(self, rows: StepRows) -> tuple[SampleResult, list[tuple[int, int, list[TokenLogprobs]]]]:
        """A step of any shape: the model by graph where there is one that holds it, the rest by operation."""
        shape = chunk_shape(self._shapes, rows.shape)
        if self._decodes is None or shape is None:
            inputs = self._transfers.upload(self._batch.step_arrays(rows, rows.shape))
            attention = self._batch.host_attention(inputs, rows, self._kv_caches)
            self._launched = time.monotonic()
            hidden = self._forward(inputs, attention)
        else:
            arrays = self._batch.step_arrays(rows, shape)
            hidden = self._decodes.graphs.run(shape, arrays, [], lambda inputs, _lengths: self._chunk(inputs, shape))
            self._launched = time.monotonic()
        prompt = [self._prompt_logprobs(hidden, *wanted) for wanted in self._batch.prompt_rows(rows)]
        if not len(rows.sample_slots):
            return SampleResult(torch.empty(0, dtype=torch.int64, device=self._device), []), prompt
        return self._sample(hidden, rows), prompt

    def _chunk(self, inputs: list[torch.Tensor], shape: StepShape) -> torch.Tensor:
        """What the graph of a step with prefill in it records."""
        return self._forward(inputs, self._batch.attention(inputs, shape, self._kv_caches))

    def _forward(self, inputs: list[torch.Tensor], attention: AttentionBatch) -> torch.Tensor:
        token_slots, positions = inputs[:2]
        return self.model.forward(self._batch.input_ids(token_slots, positions), positions, attention)

    def _sample(self, hidden: torch.Tensor, rows: StepRows) -> SampleResult:
        slots, positions = rows.sample_slots, rows.sample_positions
        last_tokens = np.cumsum(rows.counts)[rows.samples] - 1
        arrays = [last_tokens, slots, positions, *self._draws(rows, len(slots))]
        index, device_slots, device_positions, *draws = self._transfers.upload(arrays)
        logits = self.model.lm_head(hidden[index])
        if self._device_sampler is None:
            sampled = self._sample_on_rank_0(logits, slots, positions)
            self._batch.append(device_slots, device_positions, sampled.token_ids)
            return sampled
        tokens = self._device_sampler.sample(logits, *draws)
        self._batch.append(device_slots, device_positions, tokens)
        return self._sample_special(logits, rows, tokens)

    def _replay(self, rows: StepRows, decodes: _Decodes) -> SampleResult:
        """A step of decodes alone, by graph."""
        count = len(rows.slots)
        tokens, logits = self._decode(rows, decodes, decode_size(decodes.sizes, count))
        self._launched = time.monotonic()
        return self._sample_special(logits[:count], rows, tokens[:count])

    def _decode(self, rows: StepRows, decodes: _Decodes, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens int64 [size], this rank's logits [size, columns]) of rows padded to `size`."""
        arrays = self._batch.decode_arrays(rows, size)
        lengths: list[int] = arrays[-1].tolist()
        return decodes.graphs.run(size, [*arrays, *self._draws(rows, size)], lengths, decodes.step.forward)

    def _draws(self, rows: StepRows, size: int) -> list[Array]:
        """float32 inverse temperatures, and uniforms as the device's sampler likes them, padded to `size`."""
        slots = rows.sample_slots
        dtype = np.float64 if self._device_sampler is None else self._device_sampler.uniform_dtype
        inv_temperature, uniforms = np.zeros(size, dtype=np.float32), np.zeros(size, dtype=dtype)
        inv_temperature[: len(slots)] = self._table.inv_temperature[slots]
        uniforms[: len(slots)] = uniform(self._table.seed[slots], rows.sample_positions)
        below_one = np.nextafter(dtype(1), dtype(0))  # which a draw just below it may be rounded to
        return [inv_temperature, np.minimum(uniforms, below_one)]

    def _sample_special(self, logits: torch.Tensor, rows: StepRows, tokens: torch.Tensor) -> SampleResult:
        """Sample again, after `tokens` were appended, the rows that want more than a plain draw; the others keep
        theirs, whoever is beside them. Some rows at a time: what filters need is many times the logits."""
        slots, positions = rows.sample_slots, rows.sample_positions
        special = self._table.special_rows(slots, positions)
        if not len(special):
            return SampleResult(tokens, [])
        slots, positions = slots[special], positions[special]
        index, device_slots, device_positions = self._transfers.upload([special, slots, positions])
        parts = []
        for start in range(0, len(special), _SPECIAL_ROWS):
            part = slice(start, start + _SPECIAL_ROWS)
            parts.append(self._sample_on_rank_0(logits[index[part]], slots[part], positions[part]))
        sampled = torch.cat([part.token_ids for part in parts])
        self._batch.append(device_slots, device_positions, sampled)
        return SampleResult(tokens.index_copy(0, index, sampled), [entry for part in parts for entry in part.logprobs])

    def _sample_on_rank_0(self, logits: torch.Tensor, slots: Ints, positions: Ints) -> SampleResult:
        whole = self.model.lm_head.gather(logits)
        if whole is None:
            sampled = SampleResult(torch.empty(len(logits), dtype=torch.int64, device=self._device), [])
        else:
            sampled = self._sampler.sample(whole.float(), slots, positions, self._batch.token_ids)
        return SampleResult(self._comm.broadcast(sampled.token_ids), sampled.logprobs)

    def _prompt_logprobs(
        self, hidden: torch.Tensor, slot: int, first: int, last: int, index: int
    ) -> tuple[int, int, list[TokenLogprobs]]:
        """Log-probabilities of the tokens after positions [first, last), whose hidden states start at `index`."""
        entries: list[TokenLogprobs] = []
        for start in range(first, last, _LOGIT_ROWS):
            end = min(start + _LOGIT_ROWS, last)
            logits = self.model.compute_logits(hidden[index + start - first : index + end - first])
            if logits is not None:
                targets = self._batch.token_ids[slot, start + 1 : end + 1].long()
                entries += prompt_logprobs(logits, targets, self._table.prompt_logprobs_of(slot))
        return slot, first + 1, entries

    # --- start-up ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _record_with(self, recorder: Recorder, sampler: DeviceSampler, report: Callable[[int, int], None]) -> None:
        config = self.config
        logits = None
        if recorder.shares_logits:
            # one place for the logits of all graphs, which would else each keep their own
            logits = torch.empty(config.max_num_seqs, self.model.lm_head.columns, dtype=self.dtype, device=self._device)
        step = DecodeStep(self.model, sampler, self._batch.token_ids, self._batch.block_tables, self._kv_caches, logits)
        sizes = recorder.decode_sizes(config.max_num_seqs)
        decodes = self._decodes = _Decodes(Graphs(recorder, self._transfers, self._device), sizes, step)
        if recorder.records_prefills:
            self._shapes = chunk_shapes(config.max_num_batched_tokens, config.max_num_seqs)
        if recorder.records_ahead:
            for done, size in enumerate(sizes):
                report(done, len(sizes))
                self._decode(StepRows.none(), decodes, size)
            self._platform.synchronize()

    def _profile(self) -> None:
        """The largest steps there can be, sampler included, on a small cache of their own."""
        steps, num_blocks = profile_steps(self.config, self._platform.profile_tokens(self.config))
        self._kv_caches = self._new_cache(num_blocks)
        for step in steps:
            running = self.start(step)
            if running is not None:
                running.result()
        self._platform.synchronize()
        self._kv_caches = []

    def _block_bytes(self) -> int:
        return kv_cache.bytes_per_block(
            self.model.num_layers, self.config.block_size, self.model.kv_heads, self.model.head_dim, self.dtype
        )

    def _new_cache(self, num_blocks: int) -> kv_cache.KVCache:
        return kv_cache.allocate(
            self.model.num_layers,
            num_blocks,
            self.config.block_size,
            self.model.kv_heads,
            self.model.head_dim,
            self.dtype,
            self._device,
            layout=self._platform.cache_layout,
        )
