"""What the scheduler promises, case by case."""

from __future__ import annotations

import gc

import pytest
from simulation import EOS, VOCAB, Simulation, expected_output, make_config

from nanovllm_dist.errors import ConfigError, InvalidRequestError, QueueFullError
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.scheduler.request import Request

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None)


def test_prefill_chunks_and_decodes_share_one_step_under_the_budget() -> None:
    simulation = Simulation(max_num_batched_tokens=10, max_num_seqs=4)
    simulation.add([1, 2, 3], ignore_eos=True)
    simulation.step()
    simulation.add(list(range(20)), ignore_eos=True)

    plan = simulation.plan()

    assert plan is not None
    assert [row.num_tokens for row in plan.rows] == [1, 9]


def test_a_long_prefill_leaves_every_other_running_request_its_token() -> None:
    simulation = Simulation(max_num_batched_tokens=8, scheduling_policy="priority")
    for _ in range(2):
        simulation.add([1, 2], ignore_eos=True)
    simulation.step()
    simulation.add(list(range(30)), priority=-1, ignore_eos=True)  # takes its share before theirs

    for _ in range(5):
        simulation.step()

    assert [[row.num_tokens for row in plan.rows] for plan in simulation.plans[1:]] == [[1, 1, 6]] * 5


def test_prefill_chunk_size_caps_each_chunk() -> None:
    simulation = Simulation(prefill_chunk_size=7)
    request = simulation.add(list(range(20)), max_tokens=3, ignore_eos=True)
    simulation.run()
    assert [plan.rows[0].num_tokens for plan in simulation.plans] == [7, 7, 6, 1, 1]
    assert simulation.output(request) == expected_output(list(range(20)), GREEDY, 23)


def test_a_prompt_found_whole_in_the_cache_runs_one_token_and_writes_none() -> None:
    simulation = Simulation()
    prompt = list(range(16))
    simulation.add(prompt, max_tokens=2, ignore_eos=True)
    simulation.run()
    again = simulation.add(prompt, max_tokens=2, ignore_eos=True)

    plan = simulation.plan()

    assert plan is not None
    assert [row.num_tokens for row in plan.rows] == [1]
    assert (plan.admitted[0].num_computed, plan.admitted[0].num_cached) == (15, 16)
    assert again.times(simulation.now).num_cached_tokens == 16


def test_identical_prompts_in_the_same_step_share_their_blocks() -> None:
    simulation = Simulation()
    first, second = (simulation.add(list(range(14)), max_tokens=4, ignore_eos=True) for _ in range(2))

    plan = simulation.plan()

    assert plan is not None
    assert sorted(row.num_tokens for row in plan.rows) == [2, 14]
    assert first.blocks[:3] == second.blocks[:3]
    assert first.blocks[3] != second.blocks[3]
    simulation.commit()
    simulation.run()
    assert simulation.output(first) == simulation.output(second)


def test_another_salt_shares_nothing() -> None:
    simulation = Simulation()
    simulation.add(list(range(16)), salt="tenant-a", max_tokens=1)
    simulation.run()
    simulation.add(list(range(16)), salt="tenant-b", max_tokens=1)
    plan = simulation.plan()
    assert plan is not None
    assert plan.rows[0].num_tokens == 16


def test_generated_tokens_are_cached_too() -> None:
    simulation = Simulation()
    request = simulation.add(list(range(8)), max_tokens=9, ignore_eos=True)
    simulation.run()
    simulation.add(request.tokens.tolist(), max_tokens=1)
    simulation.plan()
    assert simulation.scheduler.stats.prefix_hits == 16


def test_the_least_recently_used_prefix_is_evicted_first_and_its_end_before_its_beginning() -> None:
    simulation = Simulation(num_blocks=9)  # 8 blocks of 4
    simulation.add(list(range(12)), max_tokens=1)
    simulation.run()
    simulation.add(list(range(20, 32)), max_tokens=1)
    simulation.run()
    simulation.add(list(range(40, 50)), max_tokens=1)  # takes the two never used, then the end of the oldest
    simulation.run()
    simulation.add(list(range(12)), max_tokens=1)
    simulation.plan()
    assert simulation.plans[-1].rows[0].request.num_cached == 8


def test_a_block_that_gave_the_cache_nothing_is_reused_before_any_that_did() -> None:
    simulation = Simulation(num_blocks=5)  # 4 blocks of 4
    simulation.add(list(range(12)), max_tokens=1)
    simulation.run()
    for _ in range(2):
        simulation.add([40, 41], max_tokens=1)  # too short to be cached: its block is the next one's, the fourth
        simulation.run()
    again = simulation.add(list(range(12)), max_tokens=1)
    simulation.plan()
    assert again.num_cached == 12


def test_when_blocks_run_out_the_last_to_come_is_preempted_and_nothing_is_lost() -> None:
    simulation = Simulation(num_blocks=9)
    prompts = [[1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]]
    first, second = (simulation.add(prompt, max_tokens=20, ignore_eos=True) for prompt in prompts)
    simulation.run()
    assert (first.num_preemptions, second.num_preemptions > 0) == (0, True)
    for prompt, request in zip(prompts, (first, second), strict=True):
        assert simulation.output(request) == expected_output(prompt, GREEDY, len(prompt) + 20)


def test_an_admission_leaves_those_already_running_a_hundredth_of_the_cache_to_grow_into() -> None:
    simulation = Simulation(num_blocks=101, max_model_len=400)  # 100 blocks of 4
    running = simulation.add([1, 2, 3], max_tokens=8, ignore_eos=True)
    simulation.step()
    filling = simulation.add([5] * 4 * 99, max_tokens=2, ignore_eos=True)  # all but the one block that `running` has
    simulation.run()
    assert (running.num_preemptions, filling.num_preemptions) == (0, 0)
    assert filling.first_scheduled > running.first_scheduled + 7


def test_a_request_that_runs_alone_may_have_the_whole_cache() -> None:
    simulation = Simulation(num_blocks=101, max_model_len=400)
    request = simulation.add([5] * 399, max_tokens=1, ignore_eos=True)
    simulation.run()
    assert request.finish_reason == "length"


def test_a_lone_request_that_outgrows_the_cache_ends_with_length() -> None:
    simulation = Simulation(num_blocks=5)  # 16 tokens
    request = simulation.add([1, 2, 3], max_tokens=None, ignore_eos=True)
    simulation.run()
    assert request.finish_reason == "length"
    assert request.num_tokens == 16


def test_priority_goes_before_order() -> None:
    simulation = Simulation(scheduling_policy="priority", max_num_seqs=1)
    late = simulation.add([1, 2], priority=5, max_tokens=2, ignore_eos=True)
    urgent = simulation.add([3, 4], priority=-5, max_tokens=2, ignore_eos=True)
    simulation.run()
    assert urgent.first_scheduled < late.first_scheduled


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([VOCAB], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        ([1] * 64, "at most 63 fit"),
    ],
)
def test_a_request_that_can_never_run_is_refused_at_submission(prompt: list[int], message: str) -> None:
    simulation = Simulation()
    with pytest.raises(InvalidRequestError, match=message):
        simulation.add(prompt)


def test_a_prompt_longer_than_the_cache_is_refused_and_blocks_nobody() -> None:
    simulation = Simulation(num_blocks=5)
    with pytest.raises(InvalidRequestError, match="at most 15 fit"):
        simulation.add([1] * 17)
    other = simulation.add([1, 2], max_tokens=2, ignore_eos=True)
    simulation.run()
    assert other.finish_reason == "length"


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
def test_token_ids_in_params_must_be_in_the_vocabulary(field: str) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        Simulation().add([1], **{field: [VOCAB]})


def test_the_queue_is_bounded() -> None:
    simulation = Simulation(max_num_queued_reqs=2)
    for _ in range(2):
        simulation.add([1])
    with pytest.raises(QueueFullError, match="max_num_queued_reqs=2"):
        simulation.add([1])


def test_requests_that_were_aborted_while_they_waited_are_not_kept() -> None:
    simulation = Simulation(max_num_seqs=1)
    simulation.add([1], max_tokens=None, ignore_eos=True)
    simulation.step()
    waiting = simulation.add([2], max_tokens=1)
    for _ in range(500):
        simulation.abort(simulation.add([3] * 40))
        simulation.ended.clear()

    kept = sum(isinstance(thing, Request) for thing in gc.get_objects())

    assert kept < 20
    simulation.run()
    assert waiting.finish_reason == "length"


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_aborts_of_waiting_requests_leave_the_others_in_their_order(policy: str) -> None:
    simulation = Simulation(max_num_seqs=1, scheduling_policy=policy)
    simulation.add([1], max_tokens=1, ignore_eos=True)
    simulation.step()
    requests = [simulation.add([2], priority=index % 3, max_tokens=1, ignore_eos=True) for index in range(60)]
    kept = [request for index, request in enumerate(requests) if index % 5 == 0]
    for request in requests:
        if request not in kept:
            simulation.abort(request)
    simulation.run()
    order = sorted(kept, key=lambda request: request.sort_key)
    assert [request.first_scheduled for request in order] == sorted(request.first_scheduled for request in kept)
    assert {request.finish_reason for request in kept} == {"length"}


def test_stop_tokens_end_a_request_unless_eos_is_ignored() -> None:
    prompt = next([p] for p in range(VOCAB) if EOS in expected_output([p], GREEDY, 60)[:20])
    simulation = Simulation()
    stopped = simulation.add(prompt, max_tokens=30)
    ignoring = simulation.add(prompt, max_tokens=30, ignore_eos=True)
    simulation.run()
    assert (stopped.finish_reason, stopped.stop_token) == ("stop", EOS)
    assert (ignoring.finish_reason, len(ignoring.tokens) - ignoring.prompt_len) == ("length", 30)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_step_in_flight_when_a_request_stops_gives_it_no_further_token(in_flight: int) -> None:
    prompt = next([p] for p in range(VOCAB) if EOS in expected_output([p], GREEDY, 60)[:20])
    simulation = Simulation(max_steps_in_flight=in_flight)
    request = simulation.add(prompt, max_tokens=30)
    simulation.run()
    assert simulation.output(request)[-1] == EOS
    assert simulation.ended == [request]


def test_with_two_steps_in_flight_the_second_leaves_before_the_first_returns() -> None:
    simulation = Simulation(max_steps_in_flight=2)
    simulation.add([1, 2, 3], ignore_eos=True)
    first, second, third = simulation.plan(), simulation.plan(), simulation.plan()
    assert first is not None
    assert second is not None
    assert [row.num_tokens for row in second.rows] == [1]
    assert third is None


def test_abort_frees_waiting_and_running_requests_at_once() -> None:
    simulation = Simulation(max_num_seqs=1)
    running, waiting = (simulation.add([1, 2], ignore_eos=True) for _ in range(2))
    simulation.step()
    simulation.abort(running)
    simulation.abort(waiting)
    assert (running.finish_reason, waiting.finish_reason) == ("abort", "abort")
    assert not simulation.step()
    assert simulation.scheduler.pool.num_free == simulation.scheduler.pool.num_usable


def test_aborting_an_unknown_request_is_nothing() -> None:
    assert Simulation().scheduler.abort((b"nobody", 1)) is None


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
def test_the_smallest_cache_that_a_config_allows_serves_one_token_and_one_more(block_size: int) -> None:
    least = make_config(block_size=block_size).least_blocks
    simulation = Simulation(num_blocks=least, block_size=block_size)
    request = simulation.add([3], max_tokens=None, ignore_eos=True)
    simulation.run()
    assert simulation.output(request)[:1] == expected_output([3], GREEDY, 2)
    with pytest.raises(ConfigError, match=f"at least {least}"):
        make_config(block_size=block_size, num_blocks=least - 1)
