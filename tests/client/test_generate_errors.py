"""What becomes of the other prompts of a batch when one cannot be sent, or when the engine ends half-way."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import pytest
from scripted_engine import TIMES, ScriptedEngine, engine_info

from nanovllm_dist import LLM, RequestOutput, SamplingParams
from nanovllm_dist.errors import EngineDeadError, WireError
from nanovllm_dist.wire import messages as wire

IDS = SamplingParams(detokenize=False)


def connect(engine: ScriptedEngine, aside: ThreadPoolExecutor, max_queued: int) -> LLM:
    connecting: Future[LLM] = aside.submit(LLM.connect, engine.address)
    engine.welcome(engine_info(max_queued))
    return connecting.result(10)


def answer(engine: ScriptedEngine, token: int) -> bytes:
    """End the next request with one token; the client."""
    client, request = engine.receive()
    assert isinstance(request, wire.AddRequest)
    ids = wire.pack_ints([request.id])
    engine.send(client, wire.Outputs(ids, wire.pack_ints([token]), [wire.Finished(request.id, "length", TIMES)]))
    return client


@pytest.mark.timeout(30)
def test_what_was_answered_is_kept_when_the_engine_dies_while_prompts_still_wait(
    engine: ScriptedEngine, aside: ThreadPoolExecutor
) -> None:
    llm = connect(engine, aside, max_queued=2)  # so one at a time is sent

    generating: Future[list[RequestOutput]] = aside.submit(
        llm.generate, [[1], [2], [3], [4]], IDS, use_tqdm=False, return_errors=True
    )
    client = answer(engine, token=7)
    engine.receive()
    engine.send(client, wire.EngineStatus("failed", error=wire.ErrorInfo("engine_dead", "rank 0 is gone")))

    outputs = generating.result(10)
    assert outputs[0].token_ids == [7]
    assert outputs[0].error is None
    for output in outputs[1:]:
        assert isinstance(output.error, EngineDeadError)
        assert output.finish_reason == "error"
    llm.close()


@pytest.mark.timeout(30)
def test_a_prompt_too_large_to_be_sent_leaves_the_others_their_answers(
    engine: ScriptedEngine, aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "CLIENT_FRAME_LIMIT", 1000)
    llm = connect(engine, aside, max_queued=8)

    generating: Future[list[RequestOutput]] = aside.submit(
        llm.generate, [[1], [2] * 400, [3]], IDS, use_tqdm=False, return_errors=True
    )
    answer(engine, token=7)
    answer(engine, token=8)

    first, large, last = generating.result(10)
    assert (first.token_ids, last.token_ids) == ([7], [8])
    assert isinstance(large.error, WireError)
    assert large.prompt_token_ids == [2] * 400
    llm.close()


@pytest.mark.timeout(30)
def test_without_return_errors_a_prompt_that_cannot_be_sent_is_raised(
    engine: ScriptedEngine, aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "CLIENT_FRAME_LIMIT", 1000)
    llm = connect(engine, aside, max_queued=8)
    with pytest.raises(WireError, match=r"prompt 1: .*1000"):
        llm.generate([[1], [2] * 400], IDS, use_tqdm=False)
    llm.close()


@pytest.mark.timeout(30)
def test_each_output_is_told_as_soon_as_its_prompt_has_ended(
    engine: ScriptedEngine, aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "CLIENT_FRAME_LIMIT", 1000)
    llm = connect(engine, aside, max_queued=8)
    told: SimpleQueue[tuple[int, RequestOutput]] = SimpleQueue()

    generating: Future[list[RequestOutput]] = aside.submit(
        llm.generate,
        [[1], [2] * 400, [], [3]],
        IDS,
        use_tqdm=False,
        return_errors=True,
        on_output=lambda index, output: told.put((index, output)),
    )
    (client, first), (_, last) = engine.receive(), engine.receive()
    for request, place in ((last, 3), (first, 0)):
        assert isinstance(request, wire.AddRequest)
        ids = wire.pack_ints([request.id])
        engine.send(client, wire.Outputs(ids, wire.pack_ints([7]), [wire.Finished(request.id, "length", TIMES)]))
        while (entry := told.get(timeout=10))[1].error is not None:
            assert entry[0] in (1, 2)
        assert entry[0] == place

    outputs = generating.result(10)
    assert [output.error is None for output in outputs] == [True, False, False, True]
    assert told.empty()
    llm.close()
