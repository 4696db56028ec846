"""A model's name leads to a directory, or to a list of the places where it is not."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from hub_server import COMMIT, serving

from nanovllm_dist.errors import ConfigError, ModelNotFoundError
from nanovllm_dist.launcher.model_store import model_roots, resolve_model

CHECKPOINT = {
    "config.json": b"{}",
    "generation_config.json": b"{ }",
    "tokenizer.json": b'{"a": 1}',
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"template",
    "model.safetensors": b"weights",
}
UNWANTED = {
    "modeling.py": b"print()",
    "pytorch_model.bin": b"pickle",
    "training_args.pt": b"a pickle",
    "original/params.json": b"[]",
    "consolidated.safetensors": b"again",
    "README.md": b"text",
}


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """No model of this machine is in sight."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOVLLM_MODEL_ROOTS", os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))


def model_dir(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def resolve_in_process(names, tmp_path, endpoint, **environment):
    """(paths, error text): huggingface_hub reads its environment once per process."""
    program = (
        "import sys; from nanovllm_dist.launcher.model_store import resolve_model\n"
        "for name in sys.argv[1:]: print(resolve_model(name))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *names],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.stdout.splitlines(), result.stderr


def cached_snapshot(tmp_path, repo, files):
    """The layout of huggingface_hub's cache after a download of `files`."""
    root = tmp_path / "hf" / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


def test_a_directory_is_taken_as_it_is(tmp_path):
    assert resolve_model(str(model_dir(tmp_path / "x"))) == tmp_path / "x"


def test_a_directory_without_a_config_is_no_model(tmp_path):
    (tmp_path / "x").mkdir()

    with pytest.raises(ModelNotFoundError, match=r"x has no config\.json"):
        resolve_model(str(tmp_path / "x"))


@pytest.mark.parametrize("name", ["/no/where", "./model", "~/model-x", "a/b/c", "../x", "", "a b", "-x"])
def test_what_can_only_be_a_path_is_never_asked_of_a_hub(name):
    with pytest.raises(ModelNotFoundError, match="is not a directory"):
        resolve_model(name)


@pytest.mark.parametrize("root", ["a", "b", "cache/models"])
@pytest.mark.parametrize("name", ["Qwen3-32B", "Qwen/Qwen3-32B", "my-own"])
def test_a_name_is_looked_up_under_the_model_roots(tmp_path, root, name):
    expected = model_dir(tmp_path / root / name)

    assert resolve_model(name) == expected


def test_without_a_setting_the_roots_are_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOVLLM_MODEL_ROOTS")
    monkeypatch.delenv("NANOVLLM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))

    names = ["huggingface", "models", ".cache/nanovllm_dist/models"]
    assert model_roots() == [tmp_path / name for name in names]


def test_a_name_of_no_known_family_lists_where_it_was_looked_for(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no known family") as caught:
        resolve_model("Unheard-7B")

    for place in ("a/Unheard-7B", "b/Unheard-7B", "cache/models/Unheard-7B", "NANOVLLM_MODEL_ROOTS", "smollm2-135m"):
        assert place in str(caught.value)


def test_an_unknown_hub_is_a_config_error():
    with pytest.raises(ConfigError, match="hub='other'"):
        resolve_model("Qwen3-32B", hub="other")


def test_modelscope_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)

    with pytest.raises(ConfigError, match=r"nanovllm_dist\[modelscope\]"):
        resolve_model("Qwen3-32B", hub="modelscope")


def test_offline_a_bare_name_is_found_in_the_hubs_cache_of_its_family(tmp_path):
    names = ["Qwen3-32B", "Qwen2.5-7B-Instruct", "Llama-3.1-8B", "SmolLM2-360M", "MiniCPM4-8B"]
    families = ["Qwen", "Qwen", "meta-llama", "HuggingFaceTB", "openbmb"]
    repos = [f"{family}/{name}" for family, name in zip(families, names, strict=True)]
    snapshots = [cached_snapshot(tmp_path, repo, CHECKPOINT) for repo in repos]

    paths, error = resolve_in_process(names, tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")

    assert paths == [str(snapshot) for snapshot in snapshots], error


def test_offline_an_unfinished_download_is_not_taken_for_a_model(tmp_path):
    index = json.dumps({"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "model-1.safetensors": b"w"}
    cached_snapshot(tmp_path, "org/name", files)

    paths, error = resolve_in_process(["org/name"], tmp_path, "http://127.0.0.1:9")

    assert paths == []
    assert "ModelNotFoundError" in error


def test_with_no_network_all_places_are_listed(tmp_path):
    paths, error = resolve_in_process(["Qwen3-32B"], tmp_path, "http://127.0.0.1:9")

    assert paths == []
    for place in ("a/Qwen3-32B", "cache/models/Qwen3-32B", "local cache of huggingface", "huggingface: Qwen/Qwen3-32B"):
        assert place in error


@pytest.mark.slow
def test_from_a_hub_comes_data_and_no_code(tmp_path):
    with serving("org/name", {**CHECKPOINT, **UNWANTED}) as hub:
        paths, error = resolve_in_process(["org/name"], tmp_path, hub.url)
        assert len(paths) == 1, error
        assert set(hub.fetched) == set(CHECKPOINT)
        assert {name: (tmp_path / paths[0] / name).read_bytes() for name in CHECKPOINT} == CHECKPOINT

    again, error = resolve_in_process(["org/name"], tmp_path, "http://127.0.0.1:9")
    assert again == paths, error


@pytest.mark.slow
def test_a_repository_that_the_hub_does_not_know_is_said_to_be_missing(tmp_path):
    with serving("org/name", CHECKPOINT) as hub:
        paths, error = resolve_in_process(["org/other"], tmp_path, hub.url)

    assert paths == []
    assert "there is no org/other, or it is private" in error


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up_soon(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        paths, error = resolve_in_process(["org/name"], tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")

    assert paths == []
    assert "huggingface said" in error
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_the_alias_is_resolved_without_importing_anything_heavy(monkeypatch):
    monkeypatch.delenv("NANOVLLM_CACHE")
    directory = resolve_model("smollm2-135m", progress=False)
    program = (
        "import sys; from nanovllm_dist.launcher import model_store; print(model_store.resolve_model('SmolLM2-135M'));"
        "print([m for m in ('torch', 'gguf', 'numpy', 'tqdm', 'huggingface_hub', 'tokenizers') if m in sys.modules])"
    )

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert result.stdout.splitlines() == [str(directory), "[]"]


@pytest.mark.slow
def test_the_alias_answers_a_question(monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    from nanovllm_dist.text.tokenizer import Tokenizer

    monkeypatch.delenv("NANOVLLM_CACHE")
    directory = resolve_model("smollm2-135m", progress=False)
    tokenizer = Tokenizer.from_directory(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])

    answer = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()

    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.encode("<|im_end|>")[0]
