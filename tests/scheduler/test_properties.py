"""Promises that hold for every mix of requests, cache size, budget and number of steps in flight."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import EOS, VOCAB, Simulation, expected_output

from nanovllm_dist.sampling_params import SamplingParams

prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)
shared = st.sampled_from([[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9, 9, 1, 1, 1, 1]])


@st.composite
def workloads(draw: st.DrawFn) -> list[dict[str, object]]:
    """Requests that share prefixes, with arrival steps and some aborts."""
    return [
        {
            "prompt": draw(shared) + draw(prompts),
            "max_tokens": draw(st.integers(1, 30)),
            "ignore_eos": draw(st.booleans()),
            "priority": draw(st.integers(-1, 1)),
            "arrives": draw(st.integers(0, 20)),
            "aborted_after": draw(st.one_of(st.none(), st.integers(0, 15))),
        }
        for _ in range(draw(st.integers(1, 14)))
    ]


@st.composite
def engines(draw: st.DrawFn) -> dict[str, object]:
    """Schedulers from roomy to so small that one request fills the cache."""
    max_num_seqs = draw(st.integers(1, 8))
    return {
        "num_blocks": draw(st.integers(14, 60)),
        "block_size": draw(st.sampled_from([4, 8])),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": draw(st.integers(max_num_seqs, 40)),
        "prefill_chunk_size": draw(st.sampled_from([0, 1, 3, 7])),
        "enable_prefix_caching": draw(st.booleans()),
        "scheduling_policy": draw(st.sampled_from(["fcfs", "priority"])),
        "max_steps_in_flight": draw(st.integers(1, 2)),
    }


@settings(max_examples=150, deadline=None)
@given(engine=engines(), work=workloads())
def test_every_request_gives_its_own_tokens_and_ends_once_whatever_runs_beside_it(
    engine: dict[str, object], work: list[dict[str, object]]
) -> None:
    simulation = Simulation(**engine)  # type: ignore[arg-type]
    limit = simulation.scheduler.max_total_tokens
    pending = sorted(work, key=lambda item: item["arrives"])  # type: ignore[arg-type,return-value]
    live: list[tuple[dict[str, object], object, int]] = []
    for step in range(10_000):
        while pending and pending[0]["arrives"] <= step:  # type: ignore[operator]
            item = pending.pop(0)
            request = simulation.add(
                item["prompt"],  # type: ignore[arg-type]
                priority=item["priority"],  # type: ignore[arg-type]
                max_tokens=item["max_tokens"],
                ignore_eos=item["ignore_eos"],
            )
            live.append((item, request, step))
        for item, request, start in live:
            if item["aborted_after"] is not None and step - start == item["aborted_after"]:
                simulation.abort(request)  # type: ignore[arg-type]
        if not simulation.step() and not pending:
            break
    assert not simulation.scheduler.has_unfinished
    assert simulation.scheduler.pool.num_free == simulation.scheduler.pool.num_usable
    assert Counter(id(request) for request in simulation.ended) == Counter(id(request) for _, request, _ in live)
    for item, request, _start in live:
        params = SamplingParams(temperature=0.0, max_tokens=item["max_tokens"], ignore_eos=item["ignore_eos"])  # type: ignore[arg-type]
        expected = expected_output(item["prompt"], params, limit)  # type: ignore[arg-type]
        output = simulation.output(request)  # type: ignore[arg-type]
        if request.finish_reason == "abort":  # type: ignore[attr-defined]
            assert output == expected[: len(output)]
        else:
            assert output == expected
            assert request.finish_reason == ("stop" if request.stop_token == EOS else "length")  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None)
@given(engine=engines(), work=workloads())
def test_a_step_is_planned_whenever_something_fits(engine: dict[str, object], work: list[dict[str, object]]) -> None:
    simulation = Simulation(**engine)  # type: ignore[arg-type]
    for item in work:
        simulation.add(item["prompt"], max_tokens=item["max_tokens"], ignore_eos=True)  # type: ignore[arg-type]
    while simulation.scheduler.has_unfinished:
        assert simulation.step(), "requests are left, none in flight, and none was planned"


@settings(max_examples=60, deadline=None)
@given(engine=engines(), work=workloads())
def test_first_come_first_served_starts_requests_in_order_and_starves_nobody(
    engine: dict[str, object], work: list[dict[str, object]]
) -> None:
    simulation = Simulation(**(engine | {"scheduling_policy": "fcfs"}))  # type: ignore[arg-type]
    requests = [
        simulation.add(
            item["prompt"],  # type: ignore[arg-type]
            priority=item["priority"],  # type: ignore[arg-type]
            max_tokens=item["max_tokens"],
            ignore_eos=True,
        )
        for item in work
    ]
    oldest, preemptions, standing = None, 0, 0
    while simulation.scheduler.has_unfinished:
        now_oldest = min(simulation.scheduler.requests(), key=lambda request: request.order)
        if now_oldest is not oldest:
            oldest, preemptions, standing = now_oldest, now_oldest.num_preemptions, 0
        computed = oldest.num_computed
        simulation.step()
        assert oldest.num_preemptions == preemptions, "the first in order was preempted"
        # steps that were planned before it came first may pass it over, and no later one
        standing = 0 if oldest.num_computed > computed or oldest.finish_reason else standing + 1
        assert standing < engine["max_steps_in_flight"], "a step took the first in order no further"  # type: ignore[operator]
    starts = [request.first_scheduled for request in requests]
    assert starts == sorted(starts)
