"""Prints the CPU seconds of a command with all it starts, also of what it does not wait for.

python -m benchmarks.cpu_time COMMAND [ARGUMENT]...
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

PR_SET_CHILD_SUBREAPER = 36  # of prctl(2): orphans below this process become its children


def main() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl refuses to make this process a subreaper")
    subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    times = os.times()
    print(times.children_user + times.children_system)


if __name__ == "__main__":
    main()
