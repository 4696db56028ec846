"""The other side of TransformersBaseline: Hugging Face `generate` in a process of its own, fed over standard input.

    python -m nanovllm_dist.bench.transformers_worker

The first line is the engine's resolved config as JSON; each later line is one piece of work. The times of a request's
tokens are known where it is alone.
It knows nothing of the engine that it is compared with.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from nanovllm_dist.bench.json_process import reserve_stdout, write_line
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import NanoVLLMError
from nanovllm_dist.workers.platform import get_platform

if TYPE_CHECKING:
    import torch

_PAD = 0


class _TokenClock:
    """What `generate` calls a streamer, here only to see when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._had_prompt = False

    def put(self, _value: object) -> None:
        """The prompt comes first, then each token."""
        if self._had_prompt:
            self.times.append(time.perf_counter())
        self._had_prompt = True

    def end(self) -> None:
        """The answer is whole."""


class Generator:
    """A model of transformers on the engine's kind of device, with the threads that the environment allows.

    `config` is resolved; its weights are random where load_format is dummy.
    """

    def __init__(self, config: EngineConfig) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        self._device = get_platform(config.device).open_device(0, config)
        torch.manual_seed(config.seed)
        dtype = getattr(torch, config.dtype)
        if config.load_format == "dummy":
            shape = AutoConfig.from_pretrained(config.model, **config.hf_overrides)
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype, **config.hf_overrides)
        self._model = model.to(self._device).eval()
        # the checkpoint's own would add an end token, top-k and top-p to what is asked for
        self._model.generation_config = GenerationConfig(pad_token_id=_PAD)

    def run(
        self, prompts: list[list[int]], output_lens: list[int], temperature: float, batch_size: int
    ) -> dict[str, Any]:
        """Generate in static batches, in order, each up to its longest answer.

        Returns wall `seconds` and, of a prompt that is alone, seconds to its `first_token` and `per_token` after it.
        """
        started = time.perf_counter()
        clock = _TokenClock() if len(prompts) == 1 else None
        for first in range(0, len(prompts), batch_size):
            batch = slice(first, first + batch_size)
            self._generate(prompts[batch], max(output_lens[batch]), temperature, clock)
        times = clock.times if clock is not None else []
        return {
            "seconds": time.perf_counter() - started,
            "first_token": [times[0] - started] if times else [],
            "per_token": [(times[-1] - times[0]) / (len(times) - 1)] if len(times) > 1 else [],
        }

    def _generate(
        self, prompts: list[list[int]], num_tokens: int, temperature: float, clock: _TokenClock | None = None
    ) -> list[list[int]]:
        import torch

        input_ids, mask = _left_padded(prompts, self._device)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        with torch.inference_mode():
            ids: torch.Tensor = self._model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                streamer=clock,
                **sampling,
            )
        answers: list[list[int]] = ids[:, input_ids.shape[1] :].tolist()
        if any(len(answer) != num_tokens for answer in answers):
            raise NanoVLLMError(f"generate gave {len(answers[0])} tokens instead of {num_tokens}")
        return answers


def _left_padded(prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, int64 [batch, longest]; padding stands before the prompts."""
    import torch

    longest = max(map(len, prompts))
    ids = [[_PAD] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def main() -> int:
    """Process entry point: answer each line until the input ends."""
    channel = reserve_stdout()
    try:
        generator = Generator(EngineConfig.from_json(sys.stdin.readline()))
        write_line(channel, {"ready": True, "version": version("transformers")})
        for line in sys.stdin:
            write_line(channel, generator.run(**json.loads(line)))
    except Exception as error:
        code = error.code if isinstance(error, NanoVLLMError) else "internal"
        write_line(channel, {"error": f"{type(error).__name__}: {error}", "code": code})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
