"""ModelRunner: one rank's model, cache and batch; turns a step into sampled tokens.

Every rank runs the same step on its own shard. Rank 0 holds the logits, samples once, and the tokens are
broadcast, so no two ranks can disagree. It knows nothing of sockets or of why a step looks as it does.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.loader import dummy_weights, load_weights
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.models.registry import build_model
from nanovllm_dist.wire.messages import NewRow, Step, StepResult, TokenLogprobs, pack_ints, unpack_ints
from nanovllm_dist.workers import kv_cache
from nanovllm_dist.workers.batch import Batch, StepInputs
from nanovllm_dist.workers.logprobs import prompt_logprobs
from nanovllm_dist.workers.platform.base import Platform
from nanovllm_dist.workers.sampler import Sampler
from nanovllm_dist.workers.sampling_table import SamplingTable

# Prompt log-probabilities need logits of every position: this many rows of the vocabulary at once
_LOGIT_ROWS = 256


class ModelRunner:
    """Load, measure, allocate, then `execute` steps. `config` is resolved."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        platform: Platform,
        comm: Communicator,
        device: torch.device,
    ) -> None:
        self.config = config
        self.model_config = model_config
        self._platform = platform
        self._comm = comm
        self._device = device
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        backend = platform.attention_backend(model_config.head_dim, self.dtype)
        self.model = build_model(model_config, comm, backend, self.dtype, device)
        self._batch = Batch(config.max_num_seqs, config.max_model_len, config.block_size, device)
        self._table = SamplingTable(config.max_num_seqs, model_config.vocab_size, model_config.eos_token_ids, device)
        self._sampler = Sampler(self._table)
        self._kv_caches: kv_cache.KVCache = []

    def load(self, progress: Callable[[int, int], None]) -> None:
        """Fill the weights: from the checkpoint, or random ones with load_format=dummy. Raises WeightsError."""
        if self.config.load_format == "dummy":
            dummy_weights(self.model, self.config.seed)
        else:
            load_weights(self.model, self.config.model, progress)
        self.model.finalize()

    def measure_blocks(self) -> int:
        """How many cache blocks this rank can hold, found after a forward that takes what activations take."""
        config = self.config
        self._run_once(self._platform.profile_tokens(config))
        # rows of the longest length fill this many blocks; more could never be used
        most_useful = config.max_num_seqs * -(-config.max_model_len // config.block_size) + 1
        if config.num_blocks:
            return config.num_blocks
        return kv_cache.blocks_that_fit(self._platform.cache_bytes(config), self._block_bytes(), most_useful)

    def allocate(self, num_blocks: int) -> None:
        """Allocate the KV cache."""
        self._kv_caches = self._new_cache(num_blocks)

    @torch.inference_mode()
    def execute(self, step: Step) -> StepResult | None:
        """Run one step; rank 0 returns its result, the others None."""
        started = time.perf_counter()
        for row in step.new_rows:
            self._enter(row)
        self._batch.apply(step)
        inputs = self._batch.prepare(step, self._kv_caches)
        hidden = self.model.forward(inputs.input_ids, inputs.positions, inputs.attention)
        prompt = [self._prompt_logprobs(hidden, *row) for row in inputs.prompt_rows]
        tokens, logprobs = self._sample(hidden, inputs)
        if self._comm.rank != 0:
            return None
        return StepResult(
            epoch=step.epoch,
            step=step.step,
            tokens=pack_ints(tokens.tolist()),
            logprobs=logprobs,
            prompt_logprobs=prompt,
            device_us=int((time.perf_counter() - started) * 1e6),
        )

    # --- inside --------------------------------------------------------------------------------------------

    def _enter(self, row: NewRow) -> None:
        bad_words = [unpack_ints(word) for word in row.bad_words]
        self._table.set(row.slot, row.params, row.seed, row.prompt_len, bad_words)

    def _sample(self, hidden: torch.Tensor, inputs: StepInputs) -> tuple[torch.Tensor, list[tuple[int, TokenLogprobs]]]:
        if not len(inputs.sample_slots):
            return torch.empty(0, dtype=torch.int64, device=self._device), []
        logits = self.model.compute_logits(hidden[inputs.sample_index])
        logprobs: list[tuple[int, TokenLogprobs]] = []
        if logits is None:
            tokens = torch.empty(len(inputs.sample_slots), dtype=torch.int64, device=self._device)
        else:
            sampled = self._sampler.sample(logits, inputs.sample_slots, inputs.sample_positions, self._batch.token_ids)
            tokens, logprobs = sampled.token_ids, sampled.logprobs
        tokens = self._comm.broadcast(tokens)
        self._batch.append(inputs, tokens)
        return tokens, logprobs

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
        )

    def _run_once(self, num_tokens: int) -> None:
        """A forward of one prompt of `num_tokens`, sampler included, on a cache of its own."""
        from nanovllm_dist.sampling_params import SamplingParams

        num_tokens = min(num_tokens, self.config.max_model_len - 1)
        num_blocks = -(-num_tokens // self.config.block_size)
        self._kv_caches = self._new_cache(num_blocks + 1)
        row = NewRow(
            slot=0,
            tokens=pack_ints([0] * num_tokens),
            prompt_len=num_tokens,
            num_computed=0,
            num_cached=0,
            blocks=pack_ints(range(1, num_blocks + 1)),
            seed=0,
            params=SamplingParams(),
            bad_words=[],
        )
        one = Step(-1, -1, pack_ints([0]), pack_ints([num_tokens]), b"", b"", [row])
        self.execute(one)
        self._platform.synchronize()
        self._kv_caches = []
