"""Real tokenizers for the text room: small ones, and SmolLM2's own."""

import pytest
from small_tokenizers import BACKENDS

from nanovllm_dist.launcher.model_store import resolve_model
from nanovllm_dist.text.tokenizer import Tokenizer


@pytest.fixture(params=sorted(BACKENDS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each of the small tokenizers in turn."""
    return Tokenizer(BACKENDS[request.param])


@pytest.fixture
def byte_level() -> Tokenizer:
    return Tokenizer(BACKENDS["byte_level"])


@pytest.fixture
def byte_fallback() -> Tokenizer:
    return Tokenizer(BACKENDS["byte_fallback"])


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    """The real one; its model is fetched once per machine."""
    return Tokenizer.from_directory(resolve_model("smollm2-135m", progress=False))
