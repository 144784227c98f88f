"""Which errors are the user's to mend, and what the process says and returns for each."""

from __future__ import annotations

import enum
import errno
import logging
import re
import sys
import traceback
from collections.abc import Callable

log = logging.getLogger(__name__)
OURS = ("pipeline", "jobs", "data_prep")
# Raised on every rank at once: rank 0 says it for all.
_OF_ALL_RANKS = ("ConfigError", "CheckpointError", "NonFiniteLoss")
# What a shared file system says while its server is away: another start may find it again.
_AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN)
# What gloo and NCCL say when the process at the other end is gone.
_LOST = re.compile(r"by peer|connection (was )?(closed|reset|refused)|broken pipe|timed out", re.I)


class Exit(enum.IntEnum):
    """Exit statuses of `reprise`."""

    USER_ERROR = 2
    NON_FINITE = 4
    BUG = 70
    FILES_AWAY = 74
    RANK_LOST = 75
    INTERRUPTED = 130


def guarded(work: Callable[[], int]) -> int:
    """Run the work; an error becomes one line (and its status), a bug of ours a traceback."""
    return judged(work)[0]


def judged(work: Callable[[], int]) -> tuple[int, str]:
    """As `guarded`; the status, and the line that says why."""
    try:
        return work(), ""
    except KeyboardInterrupt:
        return Exit.INTERRUPTED, ""
    except Exception as error:
        if type(error).__name__ == "NonFiniteLoss":
            return Exit.NON_FINITE, _say(error)
        if isinstance(error, OSError) and error.errno in _AWAY:
            return Exit.FILES_AWAY, _say(
                f"{error}: the file system failed, perhaps for a moment; the same command resumes "
                "the run"
            )
        if is_for_user(error):
            return Exit.USER_ERROR, _say(error)
        if is_lost_rank(error):
            return Exit.RANK_LOST, _say(
                "the connection to another rank broke; that rank says why, and the same command "
                f"resumes the run ({str(error)[:200]})"
            )
        log.error("this is a bug of Reprise:\n%s", traceback.format_exc())
        return Exit.BUG, " ".join("".join(traceback.format_exception_only(error)).split())


def is_for_user(error: Exception) -> bool:
    """Whether the error says what the user can mend.

    Our code raises ValueError for users and asserts invariants, so a ValueError that a library
    raised beneath us is our bug; what the operating system refuses is the user's to mend.
    """
    if isinstance(error, OSError):
        return True
    return isinstance(error, ValueError) and _raised_in(error).split(".")[0] in OURS


def is_lost_rank(error: Exception) -> bool:
    """Whether a collective failed because a process at its other end is gone."""
    collective = _raised_in(error).startswith("torch.distributed")
    return isinstance(error, RuntimeError) and collective and bool(_LOST.search(str(error)))


def _raised_in(error: Exception) -> str:
    """Name of the module whose code raised the error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


def _say(error: Exception | str) -> str:
    text = " ".join(str(error).split())
    if logging.getLogger().handlers:
        alike = type(error).__name__ in _OF_ALL_RANKS
        log.error("error: %s", text, extra={"of_all_ranks": alike})
    else:
        print(f"error: {text}", file=sys.stderr)
    return text
