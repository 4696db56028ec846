"""The first code of every engine process: tie its life to its parent's, then run the module it was started for.

Run as a script: `python child.py PARENT_PID MODULE`. It does not know what the module does.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux; elsewhere the supervisor does)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it went before the call above
        os._exit(1)


def main() -> None:
    """Entry point of the script."""
    die_with_parent(int(sys.argv[1]))
    module = sys.argv[2]
    # a script's own directory comes first on the path, where launcher modules would shadow others of the same name
    package_parent = str(Path(__file__).resolve().parents[2])
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).resolve().parent)]
    if package_parent not in sys.path:
        sys.path.append(package_parent)
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
