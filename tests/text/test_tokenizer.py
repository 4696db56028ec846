"""The tokenizer does what the files of the model say, and says what is wrong with them."""

import json
import subprocess
import sys

import pytest
from small_tokenizers import byte_level_backend
from tokenizers import AddedToken, processors

from nanovllm_dist.errors import InvalidRequestError, ModelNotFoundError, UnsupportedModelError
from nanovllm_dist.text.tokenizer import Tokenizer

TEXTS = ["the quick brown fox", "नमस्ते दुनिया", "日本語の文字", "👩‍👩‍👧‍👦 🏳️‍🌈", "naïve\tcafé\r\n\x00 end  "]


def saved(directory, backend=None, **config):
    """A model directory with a tokenizer."""
    (backend or byte_level_backend()).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_text_comes_back_unchanged(byte_level, text):
    assert byte_level.decode(byte_level.encode(text)) == text


def test_a_special_token_in_the_text_is_one_id(byte_level):
    assert byte_level.encode("<|start|>the")[0] == 0


def test_the_models_own_special_tokens_are_added_unless_refused(tmp_path):
    backend = byte_level_backend()
    backend.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 0)])
    tokenizer = Tokenizer.from_directory(saved(tmp_path, backend))

    assert tokenizer.encode("the") == [0, *tokenizer.encode("the", add_special_tokens=False)]


def test_truncation_and_padding_in_the_file_do_not_shorten_prompts(tmp_path):
    backend = byte_level_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_directory(saved(tmp_path, backend))

    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"
    assert len(tokenizer.encode("a")) == 1


def test_tokens_that_only_the_config_declares_are_added(tmp_path):
    size = byte_level_backend().get_vocab_size()
    entry = {"content": "<think>", "special": False, "normalized": False}
    tokenizer = Tokenizer.from_directory(saved(tmp_path, added_tokens_decoder={str(size): entry}))

    assert tokenizer.encode("<think>") == [size]
    assert tokenizer._backend.get_vocab_size() == size + 1
    assert tokenizer.decode([size]) == "<think>"


def test_files_that_disagree_about_an_id_are_refused(tmp_path):
    entry = {"content": "<think>", "special": False}

    with pytest.raises(UnsupportedModelError, match="the id 500"):
        Tokenizer.from_directory(saved(tmp_path, added_tokens_decoder={"500": entry}))


def test_a_named_token_is_special_even_if_the_file_does_not_mark_it(tmp_path):
    backend = byte_level_backend()
    backend.add_tokens([AddedToken("<|eos|>", special=False)])
    tokenizer = Tokenizer.from_directory(saved(tmp_path, backend, eos_token={"content": "<|eos|>"}))

    assert tokenizer.decode(tokenizer.encode("the<|eos|>")) == "the"


def test_a_named_token_outside_the_vocabulary_adds_no_id(tmp_path):
    tokenizer = Tokenizer.from_directory(saved(tmp_path, pad_token="[PAD]"))

    assert tokenizer._backend.get_vocab_size() == byte_level_backend().get_vocab_size()


def test_the_text_of_one_token_keeps_its_leading_space(byte_level, byte_fallback):
    assert byte_level.token_text(byte_level.encode(" the")[0]) == " the"
    assert byte_fallback.token_text(byte_fallback.encode("the")[0]) == " the"


def test_the_text_of_part_of_a_character_is_a_replacement(byte_level, byte_fallback):
    assert byte_fallback.token_text(3 + 0xE4) == "\ufffd"
    assert byte_level.token_text(byte_level.encode("Ā")[0]) == "\ufffd"


def test_the_text_of_an_id_without_a_token_is_empty(tokenizer):
    assert tokenizer.token_text(tokenizer._backend.get_vocab_size()) == ""


@pytest.mark.parametrize("text", [None, 3, "\ud800"])
def test_what_is_no_text_is_refused(byte_level, text):
    with pytest.raises(InvalidRequestError, match="cannot be tokenized"):
        byte_level.encode(text)


def test_half_a_surrogate_pair_is_called_no_valid_unicode(byte_level):
    with pytest.raises(InvalidRequestError, match=r"not valid Unicode, character 2 is '\\udcff'"):
        byte_level.encode("ab\udcff")


def test_a_directory_without_tokenizer_files_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"neither tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


def test_a_git_lfs_pointer_is_called_one(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")

    with pytest.raises(UnsupportedModelError, match="Git-LFS pointer"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_no_json_is_named(tmp_path, name):
    (saved(tmp_path) / name).write_text("{")

    with pytest.raises(UnsupportedModelError, match=name):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.slow
def test_a_sentencepiece_file_that_cannot_be_converted_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")

    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.model"):
        Tokenizer.from_directory(tmp_path)


def test_the_text_room_imports_neither_torch_nor_transformers(tmp_path):
    program = (
        "import sys\n"
        "from nanovllm_dist.text import bad_words, detokenizer, stop, tokenizer\n"
        "tokenizer.Tokenizer.from_directory(sys.argv[1]).encode('the')\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(saved(tmp_path))], capture_output=True, text=True, timeout=60, check=True
    )

    assert result.stdout == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_text_comes_back_unchanged(smollm2, text):
    assert smollm2.decode(smollm2.encode(text)) == text


@pytest.mark.slow
def test_smollm2_control_tokens_are_single_ids(smollm2):
    assert smollm2.encode("<|im_start|>user<|im_end|>") == [1, *smollm2.encode("user"), 2]
    assert smollm2._backend.get_vocab_size() == 49152


@pytest.mark.slow
def test_smollm2_digits_are_single_tokens(smollm2):
    assert [smollm2.token_text(token) for token in smollm2.encode("in 1984")] == ["in", " ", "1", "9", "8", "4"]
