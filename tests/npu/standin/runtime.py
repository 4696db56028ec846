"""The stand-in's own entry points, for Python: is a stream's work held back, submit a task, hold everything.

A task is a function without arguments. It runs when its stream comes to it, perhaps many times, if it was captured.
An error in it is printed, and the next wait for a stream raises it. Knows nothing of tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import traceback
from collections.abc import Callable, Iterator

from .build import library

_FINISHED, _FAILED = 0, 2
_tasks: dict[int, Callable[[], None]] = {}
_numbers = itertools.count(1)

_library = ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)
_library.standin_is_deferred.argtypes = [ctypes.c_void_p]
_library.standin_submit.argtypes = [ctypes.c_void_p, ctypes.c_int64]
_library.standin_submit.restype = None
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64)
# greater than 0 while any stream holds work back
deferring = ctypes.c_int.in_dll(_library, "standin_deferring")


def is_deferred(stream: int) -> bool:
    """Whether work for a stream (its address) has to be submitted, because it is captured, waiting or held."""
    return bool(_library.standin_is_deferred(stream))


def submit(stream: int, task: Callable[[], None]) -> None:
    """Gives a task to a stream, which runs it in its turn, or captures it."""
    number = next(_numbers)
    _tasks[number] = task
    _library.standin_submit(stream, number)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """No task runs before somebody waits for it, as on a busy device."""
    _library.standin_hold(1)
    try:
        yield
    finally:
        _library.standin_hold(0)


def _run(number: int) -> int:
    try:
        _tasks[number]()
    except Exception as error:
        traceback.print_exc()
        _library.standin_tell(f"{type(error).__name__}: {error}".encode())
        return _FAILED
    return _FINISHED


def _forget(number: int) -> int:
    _tasks.pop(number, None)
    return 0


_callbacks = (_Callback(_run), _Callback(_forget))
_library.standin_set_callbacks(*_callbacks)
