"""Every error a user can meet, typed, each with a stable `code` that crosses the wire.

A message says what is wrong, where (field, tensor, file or rank) and what to do about it.
This module knows nothing of sockets, models or processes.
"""

from __future__ import annotations


class NanoVLLMError(Exception):
    """Root of all errors raised on purpose. `code` is stable and machine-readable."""

    code = "internal"


class ConfigError(NanoVLLMError, ValueError):
    """An engine option is unknown, out of range, or contradicts another one."""

    code = "config"


class ModelNotFoundError(NanoVLLMError, FileNotFoundError):
    """No checkpoint under that name; the message lists where it was looked for."""

    code = "model_not_found"


class UnsupportedModelError(NanoVLLMError):
    """The checkpoint is readable, but its architecture, RoPE type or an option of it is not supported."""

    code = "unsupported_model"


class WeightsError(NanoVLLMError):
    """A tensor is missing, unexpected, misshapen or unreadable; the message names tensor and file."""

    code = "weights"


class InvalidRequestError(NanoVLLMError, ValueError):
    """A request that can never run: empty, too long, a token id out of range, a bad parameter."""

    code = "invalid_request"


class InvalidSamplingParamsError(InvalidRequestError):
    """A sampling parameter is out of range or contradicts another one; the message names the field."""

    code = "invalid_sampling_params"


class QueueFullError(NanoVLLMError):
    """The waiting queue is at its bound; try again when requests have finished."""

    code = "queue_full"


class WireError(NanoVLLMError):
    """A frame that is too large, not MessagePack, or not a message of the expected kind."""

    code = "wire"


class EngineConnectError(NanoVLLMError, ConnectionError):
    """No engine answers at that address, or it refuses the key."""

    code = "connect"


class EngineStartError(NanoVLLMError, RuntimeError):
    """A process of the engine failed before it was ready; carries that process' error and log tail."""

    code = "engine_start"


class EngineDeadError(NanoVLLMError, RuntimeError):
    """The engine stopped while requests were running."""

    code = "engine_dead"


_BY_CODE: dict[str, type[NanoVLLMError]] = {
    cls.code: cls
    for cls in (
        ConfigError,
        ModelNotFoundError,
        UnsupportedModelError,
        WeightsError,
        InvalidRequestError,
        InvalidSamplingParamsError,
        QueueFullError,
        WireError,
        EngineConnectError,
        EngineStartError,
        EngineDeadError,
    )
}


def error_from_code(code: str, message: str) -> NanoVLLMError:
    """Rebuild the typed error that another process reported; an unknown code gives the root type."""
    return _BY_CODE.get(code, NanoVLLMError)(message)
