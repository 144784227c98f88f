"""Which errors are the user's to mend, and what the process says and returns for each."""

from __future__ import annotations

import enum
import logging
import sys
import traceback
from collections.abc import Callable

log = logging.getLogger(__name__)
OURS = ("pipeline", "jobs", "data_prep")


class Exit(enum.IntEnum):
    """Exit statuses of `reprise`."""

    USER_ERROR = 2
    NON_FINITE = 4
    BUG = 70
    INTERRUPTED = 130


def guarded(work: Callable[[], int]) -> int:
    """Run the work; an error becomes one line (and its status), a bug of ours a traceback."""
    try:
        return work()
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except Exception as error:
        if type(error).__name__ == "NonFiniteLoss":
            _say(error)
            return Exit.NON_FINITE
        if is_for_user(error):
            _say(error)
            return Exit.USER_ERROR
        log.error("this is a bug of Reprise:\n%s", traceback.format_exc())
        return Exit.BUG


def is_for_user(error: Exception) -> bool:
    """Whether the error says what the user can mend.

    Our code raises ValueError for users and asserts invariants, so a ValueError that a library
    raised beneath us is our bug; what the operating system refuses is the user's to mend.
    """
    if isinstance(error, OSError):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, ValueError) and module.split(".")[0] in OURS


def _say(error: Exception) -> None:
    text = " ".join(str(error).split())
    if logging.getLogger().handlers:
        log.error("error: %s", text)
    else:
        print(f"error: {text}", file=sys.stderr)
