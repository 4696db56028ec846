"""Small real tokenizers, one of each kind of decoder."""

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

CORPUS = ["the quick brown fox", "नमस्ते दुनिया", "日本語の文字", "👩‍👩‍👧‍👦 and 🏳️‍🌈", "naïve café, the end"] * 4


def byte_level_backend() -> Backend:
    """Byte-level BPE as Qwen, Llama-3 and SmolLM2 have it; ids 0 and 1 are special."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_fallback_backend() -> Backend:
    """SentencePiece-like BPE as Llama-2 and MiniCPM have it: `▁` for spaces, `<0xNN>` for bytes of other characters."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz日\ufffd",
    ]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("日", "日")]
    tokens += ["".join(merge) for merge in merges]
    backend = Backend(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    return backend


def word_backend() -> Backend:
    """Whole words and no decoder, which puts a space between any two tokens."""
    words = ["<s>", "</s>", "the", "quick", "fox"]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(word, special=True) for word in words[:2]])
    return backend


BACKENDS = {"byte_level": byte_level_backend(), "byte_fallback": byte_fallback_backend(), "word": word_backend()}
