"""Runs a command over the stand-in for CANN: `python -m standin DEVICES COMMAND [ARGUMENT...]`."""

from __future__ import annotations

import os
import sys

from .environment import environment


def main() -> None:
    devices, *command = sys.argv[1:]
    os.environ.update(environment(int(devices)))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
