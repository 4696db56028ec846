"""Conversations become text as the model's template says, and a template can do nothing else."""

import json

import pytest
from small_tokenizers import byte_level_backend

from nanovllm_dist.errors import InvalidRequestError, UnsupportedModelError
from nanovllm_dist.launcher.model_store import resolve_model
from nanovllm_dist.text.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}[assistant]{% endif %}"
    "{% if thinking %}<think>{% endif %}"
)
USER = [{"role": "user", "content": "the fox"}]


def model(directory, template=TEMPLATE, **config):
    byte_level_backend().save(str(directory / "tokenizer.json"))
    content = {"bos_token": "<|start|>", **({"chat_template": template} if template else {}), **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return Tokenizer.from_directory(directory)


def test_messages_are_rendered_with_the_models_special_tokens(tmp_path):
    assert model(tmp_path).render_chat(USER) == "<|start|>[user]the fox[assistant]"


def test_the_ids_are_those_of_the_text_without_more_special_tokens(tmp_path):
    tokenizer = model(tmp_path)

    ids = tokenizer.apply_chat_template(USER)

    assert ids[0] == 0
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.render_chat(USER)


def test_the_generation_prompt_can_be_left_out(tmp_path):
    assert model(tmp_path).render_chat(USER, add_generation_prompt=False) == "<|start|>[user]the fox"


def test_tools_and_variables_reach_the_template(tmp_path):
    text = model(tmp_path).render_chat(USER, tools=[{"name": "é"}], thinking=True)

    assert text == '<|start|>[user]the fox[{"name": "é"}][assistant]<think>'


def test_a_jinja_file_replaces_the_config(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("from the file")

    assert model(tmp_path).render_chat(USER) == "from the file"


def test_of_named_templates_the_one_for_tools_is_used_with_tools(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = model(tmp_path, named)

    assert tokenizer.render_chat(USER) == "plain"
    assert tokenizer.render_chat(USER, tools=[{"name": "f"}]) == "tools"


def test_a_model_without_a_template_says_so(tmp_path):
    tokenizer = model(tmp_path, None)

    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.apply_chat_template(USER)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ({"role": "user"}, "non-empty list"),
        (["hello"], r"messages\[0\] is of type str"),
        ([{"content": "x"}], r"messages\[0\].role is None"),
        ([*USER, {"role": "user", "content": 3}], r"messages\[1\].content is of type int, not text or parts"),
    ],
)
def test_messages_of_a_wrong_shape_are_refused(tmp_path, messages, said):
    with pytest.raises(InvalidRequestError, match=said):
        model(tmp_path).apply_chat_template(messages)


@pytest.mark.parametrize("tools", ["f", {"name": "f"}, ["f"]])
def test_tools_of_a_wrong_shape_are_refused(tmp_path, tools):
    with pytest.raises(InvalidRequestError, match="tools"):
        model(tmp_path).apply_chat_template(USER, tools=tools)


@pytest.mark.parametrize("name", ["chat_template", "conversations", "tokenize", "return_assistant_tokens_mask"])
def test_variables_cannot_replace_the_renderers_own_arguments(tmp_path, name):
    with pytest.raises(InvalidRequestError, match=name):
        model(tmp_path).apply_chat_template(USER, **{name: "{{ 1 }}"})


def test_what_the_template_refuses_is_a_typed_error_with_its_words(tmp_path):
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        model(tmp_path, "{{ raise_exception('roles must alternate') }}").apply_chat_template(USER)


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ range(10**9) | list }}"],
)
def test_a_template_cannot_leave_the_sandbox(tmp_path, template):
    with pytest.raises(InvalidRequestError, match="refuses"):
        model(tmp_path, template).apply_chat_template(USER)


def test_a_template_that_is_not_jinja_is_the_models_fault(tmp_path):
    with pytest.raises(UnsupportedModelError, match="not valid Jinja"):
        model(tmp_path, "{% for %}").apply_chat_template(USER)


@pytest.mark.slow
def test_smollm2_conversations_are_those_of_transformers(smollm2):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m", progress=False))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 17 times 23? 👩‍👩‍👧"}]

    assert (
        smollm2.apply_chat_template(messages)
        == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )
