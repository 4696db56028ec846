"""What a caller hands over is text, token ids or messages, and a SamplingParams: else it is refused, not run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from scripted_engine import ScriptedEngine, engine_info

from nanovllm_dist import LLM, AsyncDistLLM, SamplingParams
from nanovllm_dist.errors import EngineConnectError, InvalidRequestError, InvalidSamplingParamsError
from nanovllm_dist.inputs import as_batch, as_conversations, params_for

pytestmark = pytest.mark.timeout(30)

IDS = SamplingParams(detokenize=False)
MESSAGE = {"role": "user", "content": "hi"}


@pytest.fixture
def llm(engine: ScriptedEngine, aside: ThreadPoolExecutor) -> Iterator[LLM]:
    """A client of an engine that answers nothing, so what is sent by mistake hangs."""
    connecting: Future[LLM] = aside.submit(LLM.connect, engine.address)
    engine.welcome(engine_info(max_queued=8))
    llm = connecting.result(10)
    yield llm
    llm.close()


@pytest.mark.parametrize(
    ("prompts", "batch"),
    [("a", ["a"]), ([1, 2], [[1, 2]]), (range(2), [range(2)]), (["a", [1]], ["a", [1]]), (("a",), ["a"]), ([], [])],
    ids=str,
)
def test_one_prompt_needs_no_list(prompts: Any, batch: list[Any]) -> None:
    assert as_batch(prompts) == batch


@pytest.mark.parametrize(
    "prompts", [None, 5, b"abc", {"prompt": "a"}, {"a"}, iter(["a"]), (text for text in "ab")], ids=repr
)
def test_prompts_that_are_no_list_are_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"a text, a list of token ids, or a list of these is expected, not "):
        llm.generate(prompts, IDS, use_tqdm=False)


@pytest.mark.parametrize("prompt", [None, 5, b"abc", bytearray(b"abc"), memoryview(b"abc"), {"prompt": "a"}], ids=repr)
def test_a_prompt_that_is_neither_text_nor_ids_is_refused_and_not_run_as_ids(llm: LLM, prompt: Any) -> None:
    async def generate() -> None:
        await AsyncDistLLM(llm).generate(prompt, IDS)

    asked: list[Callable[[], object]] = [
        lambda: llm.generate([[1], prompt], IDS, use_tqdm=False),
        lambda: next(llm.stream(prompt, IDS)),
        lambda: asyncio.run(generate()),
    ]
    for ask in asked:
        with pytest.raises(InvalidRequestError, match="a prompt is text or a list of token ids, not "):
            ask()


@pytest.mark.parametrize("params", [{"max_tokens": 1}, {}, 0, "greedy", b"", iter([IDS])], ids=repr)
def test_sampling_params_of_another_type_are_refused(llm: LLM, params: Any) -> None:
    async def generate() -> None:
        await AsyncDistLLM(llm).generate([1], params)

    asked: list[Callable[[], object]] = [
        lambda: llm.generate([[1]], params, use_tqdm=False),
        lambda: llm.generate([[1]], [params], use_tqdm=False, return_errors=True),
        lambda: next(llm.stream([1], params)),
        lambda: asyncio.run(generate()),
    ]
    for ask in asked:
        with pytest.raises(InvalidSamplingParamsError, match="a SamplingParams is expected, not "):
            ask()


def test_each_prompt_has_the_one_params_or_its_own() -> None:
    other = SamplingParams(max_tokens=1)
    assert params_for(2, None) == [SamplingParams()] * 2
    assert params_for(2, other) == [other] * 2
    assert params_for(2, (IDS, other)) == [IDS, other]


@pytest.mark.parametrize("conversations", [[[MESSAGE], [MESSAGE]], [], ([MESSAGE],)], ids=str)
def test_several_conversations_are_taken_as_they_are(conversations: Any) -> None:
    assert as_conversations(conversations) == list(conversations)


def test_one_conversation_needs_no_list() -> None:
    assert as_conversations([MESSAGE, MESSAGE]) == [[MESSAGE, MESSAGE]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages: a conversation is a list"),
        (5, "messages: a conversation is a list"),
        ("hello", "messages: a conversation is a list"),
        (MESSAGE, "messages: a conversation is a list"),
        ([None], "conversation 0: a conversation is a list of .*, not None"),
        (["hello"], "conversation 0: .* 'hello' of type str"),
        ([[MESSAGE], MESSAGE], "conversation 1: .* of type dict"),
    ],
    ids=str,
)
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any, message: str) -> None:
    llm.__dict__["tokenizer"] = None  # it is not asked
    with pytest.raises(InvalidRequestError, match=message):
        llm.chat(messages, IDS, use_tqdm=False)


@pytest.mark.parametrize("address", [None, 5, b"ipc://here"], ids=repr)
def test_an_address_that_is_no_text_is_a_connect_error(address: Any) -> None:
    with pytest.raises(EngineConnectError, match="not an engine address"):
        LLM.connect(address)


@pytest.mark.parametrize("timeout", [float("nan"), float("inf"), 0, -1.0, "10", None], ids=repr)
def test_a_timeout_is_a_positive_number_of_seconds(engine: ScriptedEngine, timeout: Any) -> None:
    with pytest.raises(EngineConnectError, match="is not positive seconds"):
        LLM.connect(engine.address, timeout=timeout)
