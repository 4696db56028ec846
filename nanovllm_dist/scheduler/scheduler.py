"""Scheduler: which tokens of which requests run in the next step, in which cache blocks.

One rule for prefill and decode: a running request gets as many of its not yet scheduled tokens as the budget
allows. Running requests come first and each gets at least one token; then waiting ones are admitted in order.
When a block is missing, the last in order is preempted and later recomputed. Steps may be planned before
earlier ones have returned; a token still being sampled counts as known without its value.
It knows nothing of sockets, tensors or time: the time comes in as an argument.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Sequence

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import InvalidRequestError, QueueFullError
from nanovllm_dist.scheduler.block_pool import BlockPool
from nanovllm_dist.scheduler.plan import Committed, Row, SchedulerStats, StepPlan
from nanovllm_dist.scheduler.prefix_cache import PrefixCache, extend_block_hashes
from nanovllm_dist.scheduler.request import Request
from nanovllm_dist.wire.messages import NewRow, pack_ints

# An admission leaves this share of the blocks free for those already running, so that it is not undone at once
_ADMISSION_RESERVE = 0.01


class Scheduler:
    """Requests of one engine and the block tables of its cache.

    `config` is resolved: no field is 0 for "automatic". `num_blocks` counts the null block.
    """

    def __init__(self, config: EngineConfig, num_blocks: int, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.stats = SchedulerStats()
        self._block_size = config.block_size
        self._max_num_seqs = config.max_num_seqs
        self._budget = config.max_num_batched_tokens
        self._chunk = config.prefill_chunk_size or config.max_num_batched_tokens
        self._max_in_flight = config.max_steps_in_flight
        self._max_queued = config.max_num_queued_reqs
        self._by_priority = config.scheduling_policy == "priority"
        self._caching = config.enable_prefix_caching
        self._vocab_size = vocab_size
        self._eos = frozenset(eos_token_ids)
        self.cache = PrefixCache()
        self.pool = BlockPool(num_blocks, on_reuse=self.cache.forget)
        self._reserve = int(self.pool.num_usable * _ADMISSION_RESERVE)
        self.max_total_tokens = min(config.max_model_len, self.pool.num_usable * config.block_size)
        self._requests: dict[tuple[bytes, int], Request] = {}
        self._waiting: list[tuple[tuple[int, int], Request]] = []  # a heap; ended ones are half of it at most
        self.num_waiting = 0
        self.running: list[Request] = []  # by sort_key
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._in_flight: deque[StepPlan] = deque()
        self._order = 0

    # --- requests come and go ------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: it could never run: empty, too long for model or cache, tokens out of range.
            QueueFullError: the waiting queue is at its bound.
        """
        self._validate(request)
        if self.num_waiting >= self._max_queued:
            raise QueueFullError(
                f"{self.num_waiting} requests are waiting already (max_num_queued_reqs={self._max_queued}): try later"
            )
        params = request.params
        request.max_total = self.max_total_tokens
        if params.max_tokens is not None:
            request.max_total = min(self.max_total_tokens, request.prompt_len + params.max_tokens)
        request.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        self._order += 1
        request.order = self._order
        if not self._by_priority:
            request.priority = 0
        self._requests[request.key] = request
        self._enqueue(request)

    def abort(self, key: tuple[bytes, int], reason: str = "abort") -> Request | None:
        """End a request now; None when there is none of that key."""
        request = self._requests.get(key)
        if request is None:
            return None
        self._end(request, reason)
        return request

    def requests(self) -> list[Request]:
        """All that have not ended."""
        return list(self._requests.values())

    def get(self, key: tuple[bytes, int]) -> Request | None:
        """The live request of that key."""
        return self._requests.get(key)

    # --- one step ------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None when nothing can run now (or enough steps are in flight)."""
        if len(self._in_flight) >= self._max_in_flight or not (self.running or self.num_waiting):
            return None
        plan = StepPlan(self.stats.steps)
        budget = self._schedule_running(plan)
        self._admit(plan, budget, now)
        if not (plan.rows or plan.chunks):
            return None
        plan.rows += plan.chunks
        self.stats.steps += 1
        self._in_flight.append(plan)
        return plan

    def commit(self, tokens: Sequence[int], now: float) -> Committed:
        """Take the sampled tokens of the oldest step in flight, one for each sampling row in its order."""
        plan = self._in_flight.popleft()
        sampled = iter(tokens)
        result = Committed()
        block_size = self._block_size
        for request, _slot, count, samples, incarnation in plan.rows:
            token = next(sampled) if samples else -1
            if request.finish_reason is not None:
                continue
            if incarnation == request.incarnation:
                request.num_computed += count
                request.num_scheduled -= count
            if not samples:
                continue
            request.num_pending -= 1
            known = request.tokens
            known.append(token)
            result.tokens.append((request, token))
            if request.first_token < 0:
                request.first_token = now
            if request.num_computed % block_size == 0:
                self._register_blocks(request)
            if token in request.stop_ids:
                request.stop_token = token
                self._finish(request, "stop", result)
            elif len(known) >= request.max_total:
                self._finish(request, "length", result)
        self.stats.generated_tokens += len(result.tokens)
        return result

    @property
    def oldest_in_flight(self) -> StepPlan | None:
        """The step whose result is due next."""
        return self._in_flight[0] if self._in_flight else None

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._requests)

    # --- inside --------------------------------------------------------------------------------------------

    def _validate(self, request: Request) -> None:
        length, limit = request.prompt_len, self.max_total_tokens
        if request.key in self._requests:
            raise InvalidRequestError(f"request id {request.key} is already running: choose another id")
        if length == 0:
            raise InvalidRequestError("the prompt is empty: it needs at least one token")
        if length >= limit:
            raise InvalidRequestError(
                f"the prompt has {length} tokens, but at most {limit - 1} fit (model length and KV cache allow "
                f"{limit} with one generated): shorten it, or raise max_model_len or the KV cache"
            )
        low, high = min(request.tokens), max(request.tokens)
        if low < 0 or high >= self._vocab_size:
            raise InvalidRequestError(
                f"token id {low if low < 0 else high} is outside the vocabulary [0, {self._vocab_size})"
            )
        params = request.params
        for name, ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("logit_bias", params.logit_bias or ()),
        ):
            if len(ids) > self._vocab_size:
                raise InvalidRequestError(f"{name}: {len(ids)} entries for a vocabulary of {self._vocab_size}")
            if ids and max(ids) >= self._vocab_size:
                raise InvalidRequestError(f"{name}: {max(ids)} is outside the vocabulary [0, {self._vocab_size})")

    def _enqueue(self, request: Request) -> None:
        heapq.heappush(self._waiting, (request.sort_key, request))
        self.num_waiting += 1

    def _left_queue(self) -> None:
        """One waits no longer. Ended requests lie in the heap until they are met, or outnumber those that wait."""
        self.num_waiting -= 1
        if len(self._waiting) > 2 * self.num_waiting:  # so its cost is that of the ends since the last time
            self._waiting = [entry for entry in self._waiting if entry[1].finish_reason is None]
            heapq.heapify(self._waiting)

    def _schedule_running(self, plan: StepPlan) -> int:
        """Give every running request its tokens, preempting from the end when blocks run out."""
        budget, index = self._budget, 0
        block_size, chunk = self._block_size, self._chunk
        running, rows = self.running, plan.rows
        while index < len(running):
            request = running[index]
            index += 1
            start = request.num_computed + request.num_scheduled
            known = len(request.tokens) + request.num_pending
            if start >= known or (request.num_pending and known >= request.max_total):
                continue  # a step in flight ends it, or must return first
            later = len(running) - index
            count = min(known - start, chunk, max(1, budget - later))
            missing = (start + count + block_size - 1) // block_size - len(request.blocks)
            if missing > 0 and not self._grow(request, missing, plan):
                break
            budget -= count
            if start + 1 == known and start >= request.prompt_len:  # a decode: _add_row without what it cannot need
                request.num_scheduled += 1
                request.num_pending += 1
                rows.append(Row(request, request.slot, 1, True, request.incarnation))
            else:
                self._add_row(plan, request, start, count, known)
        return budget

    def _grow(self, request: Request, missing: int, plan: StepPlan) -> bool:
        """Append blocks to a table; preempt the last in order until they are there. False: it was itself."""
        while self.pool.num_free < missing:
            victim = self.running.pop()
            self._preempt(victim)
            if victim is request:
                return False
        blocks = self.pool.allocate(missing)
        request.blocks += blocks
        plan.grow_slots += [request.slot] * missing
        plan.grow_blocks += blocks
        return True

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.incarnation += 1
        request.num_computed = request.num_scheduled = 0
        request.num_preemptions += 1
        self.stats.preemptions += 1
        self._enqueue(request)

    def _admit(self, plan: StepPlan, budget: int, now: float) -> None:
        """Admit waiting requests in order while slots, budget and blocks last."""
        while self._waiting and budget > 0 and self._free_slots:
            request = self._waiting[0][1]
            if request.finish_reason is not None:
                heapq.heappop(self._waiting)
                continue
            if request.num_pending or not self._allocate_table(request):
                break
            heapq.heappop(self._waiting)
            self._left_queue()
            insort(self.running, request, key=_sort_key)
            request.slot = self._free_slots.pop()
            if request.first_scheduled < 0:
                request.first_scheduled, request.first_cached = now, request.num_cached
            start, known = request.num_computed, request.num_tokens
            count = min(known - start, self._chunk, budget)
            budget -= count
            plan.admitted.append(_new_row(request))
            self._add_row(plan, request, start, count, known)

    def _allocate_table(self, request: Request) -> bool:
        """Give a waiting request blocks for all its known tokens, cached ones first. False: too few are free."""
        hits: list[int] = []
        if self._caching:
            extend_block_hashes(request.block_hashes, request.tokens, self._block_size, request.cache_salt)
            if not request.wants_prompt_logprobs:
                hits = self.cache.match(request.block_hashes)
        missing = -(-request.num_tokens // self._block_size) - len(hits)
        free = self.pool.num_free - sum(map(self.pool.is_free, hits))
        if missing + (self._reserve if self.running else 0) > free:
            return False
        self.pool.share(hits)
        request.blocks = hits + self.pool.allocate(missing)
        request.num_registered = len(hits)
        request.num_cached = len(hits) * self._block_size
        # a prompt found whole still runs its last token, for the logits
        request.num_computed = min(request.num_cached, request.num_tokens - 1)
        self.stats.prefix_queries += request.num_tokens
        self.stats.prefix_hits += request.num_cached
        return True

    def _add_row(self, plan: StepPlan, request: Request, start: int, count: int, known: int) -> None:
        samples = start + count == known
        rows = plan.chunks if count > 1 else plan.rows
        rows.append(Row(request, request.slot, count, samples, request.incarnation))
        request.num_scheduled += count
        if samples:
            request.num_pending += 1
        if start < request.prompt_len:
            self.stats.prompt_tokens += min(count, request.prompt_len - start)
        self._register_blocks(request)

    def _register_blocks(self, request: Request) -> None:
        """Offer full blocks of known tokens to the cache. Steps run in order, so a block that a planned step
        fills can be shared by the very same step."""
        if not self._caching:
            return
        end = min(request.num_computed + request.num_scheduled, len(request.tokens)) // self._block_size
        if end <= request.num_registered:
            return
        extend_block_hashes(request.block_hashes, request.tokens, self._block_size, request.cache_salt)
        for index in range(request.num_registered, end):
            self.cache.register(request.block_hashes[index], request.blocks[index])
        request.num_registered = end

    def _finish(self, request: Request, reason: str, result: Committed) -> None:
        self._end(request, reason)
        result.finished.append(request)

    def _release(self, request: Request) -> None:
        """Give back slot and blocks. Steps in flight may still write to them; later ones run after those."""
        self.pool.release(request.blocks, keep=self.cache.holds)
        request.blocks = []
        request.num_registered = 0
        self._free_slots.append(request.slot)
        request.slot = -1

    def _end(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        if request.running:
            self.running.remove(request)
            self._release(request)
        else:  # it waited, perhaps because it was preempted while its last token was on its way
            self._left_queue()
        del self._requests[request.key]
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1

    def check_integrity(self) -> None:
        """Assert what must hold between any two calls. For tests and idle moments."""
        self.pool.check_integrity(request.blocks for request in self.running)
        self.cache.check_integrity()
        assert self.running == sorted(self.running, key=_sort_key), "running requests are out of order"
        slots = [request.slot for request in self.running]
        assert sorted(slots + self._free_slots) == list(range(self._max_num_seqs)), "slots leaked or shared"
        waiting = [request for _key, request in self._waiting if request.finish_reason is None]
        assert len(waiting) == self.num_waiting, "waiting requests are miscounted"
        assert len(self._waiting) <= 2 * self.num_waiting, "requests that have ended pile up in the queue"
        assert {r.key for r in self.running} | {r.key for r in waiting} == set(self._requests), "a request is lost"
        for request in self.running:
            assert request.num_computed + request.num_scheduled <= request.num_tokens + request.num_pending
            covered = len(request.blocks) * self._block_size
            assert request.num_computed + request.num_scheduled <= covered, "tokens without a block"
            assert request.num_tokens <= request.max_total <= self.max_total_tokens
        for request in waiting:
            assert not request.blocks
            assert request.num_computed == request.num_scheduled == 0


def _sort_key(request: Request) -> tuple[int, int]:
    return request.sort_key


def _new_row(request: Request) -> NewRow:
    return NewRow(
        slot=request.slot,
        tokens=request.tokens.tobytes(),
        prompt_len=request.prompt_len,
        num_computed=request.num_computed,
        num_cached=request.num_cached,
        blocks=pack_ints(request.blocks),
        seed=request.seed,
        params=request.params,
        bad_words=request.bad_words,
    )
