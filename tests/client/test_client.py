"""The client as its user sees it: order, streams, stops, log-probabilities, several answers, several clients."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from nanovllm_dist import LLM, AsyncDistLLM, RequestOutput, SamplingParams
from nanovllm_dist.errors import (
    EngineConnectError,
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
)

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
GREEDY_20 = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> Iterator[LLM]:
    with LLM(str(smollm2), launcher="local", dtype="float32", block_size=16, progress=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(smollm2: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


def test_the_quick_start_of_nano_vllm_runs_with_its_import_changed(llm: LLM) -> None:
    outputs = llm.generate(["Hello"], SamplingParams(temperature=0.6, max_tokens=8))
    assert isinstance(outputs[0]["text"], str)
    assert outputs[0]["token_ids"] == outputs[0].token_ids


def test_chat_answers_and_stops_at_one_of_the_eos_tokens(llm: LLM) -> None:
    (output,) = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    assert "Paris" in output.text
    assert "<|im_end|>" not in output.text
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", 2)


def test_outputs_come_in_the_order_of_the_prompts_with_each_its_own_params(llm: LLM) -> None:
    prompts = ["One", [504, 6376], "Three", "Four"]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (9, 1, 5, 3)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(output.token_ids) for output in outputs] == [9, 1, 5, 3]
    assert [output.prompt for output in outputs] == ["One", None, "Three", "Four"]


def test_metrics_tell_queue_first_token_and_time_per_token(llm: LLM) -> None:
    metrics = llm.generate("Hello", SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)[0].metrics
    assert metrics is not None
    assert 0 <= metrics.queue < metrics.first_token < metrics.total
    assert metrics.per_token == pytest.approx((metrics.total - metrics.first_token) / 7)


def test_steps_are_timed_for_who_asks(llm: LLM) -> None:
    window = llm.trace_steps(4, skip=2)
    llm.generate("Hello", SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
    trace = window.result(5)
    assert [one.rows for one in trace.steps] == [1] * 4
    for step, rank in zip(trace.steps, trace.ranks[0], strict=True):
        assert step.planned <= rank.received <= rank.launched < rank.done <= step.answered <= step.delivered
    with pytest.raises(InvalidRequestError, match="can be traced"):
        llm.trace_steps(-1)


@pytest.mark.parametrize("kind", [None, "delta", "cumulative"])
def test_a_stream_adds_up_to_the_whole_answer(llm: LLM, kind: str | None) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, output_kind=kind)  # type: ignore[arg-type]
    whole = llm.generate("Write 🎉 and 你好 :", GREEDY_20, use_tqdm=False)[0]

    parts = list(llm.stream("Write 🎉 and 你好 :", params))

    if kind == "cumulative":
        assert (parts[-1].text, parts[-1].token_ids) == (whole.text, whole.token_ids)
    else:
        assert "".join(part.text for part in parts) == whole.text
        assert [token for part in parts for token in part.token_ids] == whole.token_ids
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]


def test_a_stop_string_ends_the_text_before_it_even_across_tokens(llm: LLM) -> None:
    whole = llm.generate("Count: 1, 2, 3,", GREEDY_20, use_tqdm=False)[0].text
    stop = whole[7:12]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop=[stop])

    (output,) = llm.generate("Count: 1, 2, 3,", params, use_tqdm=False)
    streamed = "".join(part.text for part in llm.stream("Count: 1, 2, 3,", params))

    assert output.text == streamed == whole[: whole.index(stop)]
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_a_stop_string_can_be_kept_and_waits_for_min_tokens(llm: LLM) -> None:
    whole = llm.generate("Count: 1, 2, 3,", GREEDY_20, use_tqdm=False)[0].text
    stop = whole[7:9]
    kept = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert llm.generate("Count: 1, 2, 3,", kept, use_tqdm=False)[0].text == whole[: whole.index(stop) + len(stop)]
    waiting = SamplingParams(temperature=0.0, max_tokens=20, min_tokens=20, ignore_eos=True, stop=stop)
    assert llm.generate("Count: 1, 2, 3,", waiting, use_tqdm=False)[0].finish_reason == "length"


def test_n_answers_share_the_prompt_and_have_seeds_of_their_own(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    prompt = "Here is a long enough prompt to fill one block of the cache, and then some more of it:"
    first, second = (llm.generate(prompt, params, use_tqdm=False)[0] for _ in range(2))
    texts = [answer.text for answer in first.outputs]
    assert [answer.index for answer in first.outputs] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [answer.text for answer in second.outputs] == texts
    assert all(answer.metrics and answer.metrics.num_cached_tokens >= 16 for answer in second.outputs)


def test_logprobs_equal_those_of_transformers(llm: LLM, reference) -> None:  # type: ignore[no-untyped-def]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    (output,) = llm.generate("The quick brown fox jumps over the lazy dog. " * 4, params, use_tqdm=False)
    sequence = output.prompt_token_ids + output.token_ids
    with torch.inference_mode():
        expected = reference(torch.tensor([sequence])).logits[0].log_softmax(-1)
    start = len(output.prompt_token_ids)
    assert output.logprobs is not None
    for offset, entry in enumerate(output.logprobs):
        row = expected[start - 1 + offset]
        assert set(row.topk(3).indices.tolist()) <= set(entry)
        for token, logprob in entry.items():
            assert math.isclose(logprob.logprob, row[token].item(), abs_tol=1e-3)
            assert logprob.text == llm.tokenizer.token_text(token)
        assert entry[output.token_ids[offset]].rank == 1
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == start
    for position, entry in enumerate(output.prompt_logprobs[1:], start=1):
        assert entry is not None
        token = sequence[position]
        assert math.isclose(entry[token].logprob, expected[position - 1][token].item(), abs_tol=1e-3)


def test_prompt_logprobs_are_whole_though_the_prompt_is_cached(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    prompt = list(range(100, 164))
    llm.generate([prompt], GREEDY, use_tqdm=False)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    assert [list(entry) for entry in output.prompt_logprobs[1:] if entry] == [[token] for token in prompt[1:]]


def test_bad_words_and_allowed_tokens_reach_the_sampler(llm: LLM) -> None:
    prompt = "The capital of France is"
    params = SamplingParams(temperature=0.0, max_tokens=8, bad_words=["Paris"])
    assert "Paris" in llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)[0].text
    assert "Paris" not in llm.generate(prompt, params, use_tqdm=False)[0].text
    params = SamplingParams(temperature=1.0, max_tokens=16, allowed_token_ids=[100, 200], ignore_eos=True)
    assert set(llm.generate(prompt, params, use_tqdm=False)[0].token_ids) <= {100, 200}


def test_bad_words_need_no_text_in_return(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, bad_words=["Paris"], detokenize=False)
    (output,) = llm.generate("The capital of France is", params, use_tqdm=False)
    assert "Paris" not in llm.tokenizer.decode(output.token_ids)


@pytest.mark.parametrize("kind", ["delta", "cumulative", "final"])
def test_generate_returns_the_whole_answer_whatever_the_output_kind(llm: LLM, kind: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, output_kind=kind)  # type: ignore[arg-type]
    assert len(llm.generate("Hello", params, use_tqdm=False)[0].token_ids) == 6


def test_more_answers_than_the_queue_holds_are_an_error_and_not_a_wait(tiny_model: Path) -> None:
    params = SamplingParams(n=8, max_tokens=4, detokenize=False, ignore_eos=True)
    options: dict[str, object] = {"launcher": "local", "load_format": "dummy", "progress": False, "max_num_seqs": 2}
    with LLM(str(tiny_model), max_num_queued_reqs=2, **options) as llm:
        with pytest.raises(QueueFullError):
            llm.generate([[1, 2]], params, use_tqdm=False)
        many = llm.generate([[1, 2]] * 20, SamplingParams(max_tokens=4, detokenize=False), use_tqdm=False)
        assert len(many) == 20


def test_leaving_a_stream_early_ends_its_request(llm: LLM) -> None:
    for part in llm.stream("Once upon a time", SamplingParams(max_tokens=None, ignore_eos=True)):
        if len(part.token_ids) > 0:
            break
    _until_idle(llm)


def test_abort_by_request_id_from_another_thread(llm: LLM) -> None:
    parts: list[RequestOutput] = []
    for part in llm.stream("Once upon a time", SamplingParams(max_tokens=None, ignore_eos=True)):
        parts.append(part)
        if len(parts) == 3:
            threading.Thread(target=llm.abort, args=(part.request_id,)).start()
    assert parts[-1].finish_reason == "abort"
    _until_idle(llm)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, though whoever started the tests may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_during_generate_leaves_nothing_queued(llm: LLM) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Hello"] * 8, SamplingParams(max_tokens=2000, ignore_eos=True), use_tqdm=False)
    _until_idle(llm)


def test_another_client_connects_and_leaves_while_the_engine_goes_on(llm: LLM) -> None:
    with LLM.connect(llm.address) as other:
        assert other.info == llm.info
        assert (
            other.generate("Hello", GREEDY, use_tqdm=False)[0].text
            == llm.generate("Hello", GREEDY, use_tqdm=False)[0].text
        )
        other.close()
    other.close()
    with pytest.raises(EngineDeadError):
        other.generate("Hello", GREEDY, use_tqdm=False)
    assert llm.generate("Hello", GREEDY, use_tqdm=False)


def test_a_client_that_connects_has_the_tokenizer_that_the_engine_was_given(tiny_model: Path, tmp_path: Path) -> None:
    theirs, mine = (word_tokenizer(tmp_path / str(first), first) for first in (7, 9))
    options: dict[str, object] = {"launcher": "local", "load_format": "dummy", "progress": False}
    with LLM(str(tiny_model), tokenizer=str(theirs), **options) as llm:
        with LLM.connect(llm.address) as client:
            assert client.tokenizer.encode("hello") == llm.tokenizer.encode("hello") == [7]
        with LLM.connect(llm.address, tokenizer=str(mine)) as client:
            assert client.tokenizer.encode("hello") == [9]
        with (
            LLM.connect(llm.address, tokenizer=tmp_path / "none") as client,
            pytest.raises(ModelNotFoundError, match=r"none has neither .*: name a directory of this host"),
        ):
            client.generate("hello", use_tqdm=False)


def word_tokenizer(directory: Path, first: int) -> Path:
    """A model directory's tokenizer of one word, `hello`, with the id `first`."""
    directory.mkdir()
    backend = Backend(WordLevel({"hello": first, "?": first + 1}, unk_token="?"))
    backend.save(str(directory / "tokenizer.json"))
    return directory


def test_connecting_to_nothing_fails_in_time(tmp_path: Path) -> None:
    with pytest.raises(EngineConnectError):
        LLM.connect(f"ipc://{tmp_path}/none")


def test_the_asyncio_twin_streams_and_generates(llm: LLM) -> None:
    async def main() -> tuple[str, list[str]]:
        async with await AsyncDistLLM.connect(llm.address) as client:

            async def text() -> str:
                return "".join([part.text async for part in client.stream("Hello", GREEDY_20)])

            outputs = await asyncio.gather(*(client.generate("Hello", GREEDY_20) for _ in range(3)))
            early = client.stream("Once", SamplingParams(max_tokens=None, ignore_eos=True))
            await anext(early)
            del early
            return await text(), [output.text for output in outputs]

    streamed, whole = asyncio.run(main())
    assert [streamed] * 3 == whole
    _until_idle(llm)


def test_an_async_request_that_is_refused_raises_its_error(llm: LLM) -> None:
    async def main() -> None:
        async with await AsyncDistLLM.connect(llm.address) as client:
            await client.generate([10**6])

    with pytest.raises(InvalidRequestError, match="vocabulary"):
        asyncio.run(main())


def test_chat_variables_must_not_hide_the_conversation(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs"):
        llm.chat(QUESTION, chat_template_kwargs={"messages": []})
    with pytest.raises(InvalidRequestError):
        llm.chat([{"role": "user"}])


def test_close_twice_and_del_free_every_process(tiny_model: Path) -> None:
    options: dict[str, object] = {"launcher": "local", "load_format": "dummy", "progress": False}
    llm = LLM(str(tiny_model), **options)
    assert llm.engine is not None
    processes = [psutil.Process(pid) for pid in llm.engine.pids.values()]
    llm.close()
    llm.close()
    assert _all_gone(processes)

    llm = LLM(str(tiny_model), **options)
    assert llm.engine is not None
    processes = [psutil.Process(pid) for pid in llm.engine.pids.values()]
    del llm
    gc.collect()
    assert _all_gone(processes)


def test_two_engines_run_side_by_side(tiny_model: Path) -> None:
    ids = SamplingParams(temperature=0.0, max_tokens=4, detokenize=False, ignore_eos=True)
    options: dict[str, object] = {"launcher": "local", "load_format": "dummy", "progress": False}
    with LLM(str(tiny_model), seed=1, **options) as one, LLM(str(tiny_model), seed=2, **options) as two:
        assert one.address != two.address
        assert (
            one.generate([[5]], ids, use_tqdm=False)[0].token_ids
            != two.generate([[5]], ids, use_tqdm=False)[0].token_ids
        )


def _until_idle(llm: LLM, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while (stats := llm.stats()).running + stats.waiting and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)


def _all_gone(processes: list[psutil.Process], seconds: float = 10.0) -> bool:
    _gone, alive = psutil.wait_procs(processes, timeout=seconds)
    return not alive
