"""What a person sees: bars on a terminal, plain lines elsewhere, and always a plain log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm

from jobs import describe

if TYPE_CHECKING:
    from data_prep.prepare import Progress
    from pipeline.tasks import Summary

log = logging.getLogger(__name__)
LINE = "%(asctime)s %(levelname)s %(message)s"


class TrainingDisplay:
    """A bar over all optimizer steps on a terminal; a line now and then in the log."""

    def __init__(self, bar: bool) -> None:
        self._wants_bar = bar
        self._bar: tqdm | None = None
        self._last: Mapping[str, float] | None = None
        self.idle = True  # whether this call, not the run, has done nothing

    def stepped(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self.idle = False
        fresh, self._last = metrics is not self._last, metrics
        rate = metrics.get("train/images_per_second")
        shown = "" if rate is None else f"loss {metrics['train/loss']:.3f}, {rate:.0f} images/s"
        if self._wants_bar:
            if self._bar is None:
                self._bar = tqdm(total=total, initial=step - 1, unit="step", dynamic_ncols=True)
            self._bar.update()
            self._bar.set_postfix_str(shown, refresh=False)
        if shown and fresh:
            log.info("step %d of %d: %s", step, total, shown)

    def evaluated(self, summary: Summary) -> None:
        self.idle = False
        log.info("%s: %s", summary.split, describe.in_short(summary))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _ThroughBar(logging.Handler):
    """Console lines that do not tear a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _OwnOrSerious(logging.Filter):
    """Our own records, and errors of the libraries beneath."""

    def filter(self, record: logging.LogRecord) -> bool:
        own = record.name.split(".")[0] in ("pipeline", "jobs", "data_prep")
        return own or record.levelno >= logging.ERROR


def configure(quiet: bool, log_file: Path | None = None, rank: int = 0) -> None:
    """Send log records to the console (warnings only if quiet) and, in full, to a file.

    Ranks other than 0 show the console their own errors only: what all ranks have to say alike,
    and mark with the attribute `of_all_ranks`, rank 0 says.
    """
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    shown = _ThroughBar()
    if rank == 0:
        shown.setLevel(logging.WARNING if quiet else logging.INFO)
        shown.setFormatter(logging.Formatter("%(message)s"))
    else:
        shown.setLevel(logging.ERROR)
        shown.setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
        shown.addFilter(lambda record: not getattr(record, "of_all_ranks", False))
    handlers: list[logging.Handler] = [shown]
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        kept = logging.FileHandler(log_file)
        kept.setFormatter(logging.Formatter(LINE))
        handlers.append(kept)
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        handler.addFilter(_OwnOrSerious())
        root.addHandler(handler)


def wants_bar(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


class Report(Protocol):
    def __call__(self, done: int, total: int, before: int = 0, note: str = "") -> None:
        """Of `total`, `done` are done, of them `before` in an earlier call; a note goes with it."""


@contextmanager
def preparation(what: str, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """`progress` of a preparation: with MB/s, and the images rejected so far."""
    started = time.monotonic()
    before: int | None = None
    with progress(what, quiet) as report:

        def show(now: Progress) -> None:
            nonlocal before
            before = now.images if before is None else before
            rate = now.bytes / 1e6 / max(time.monotonic() - started, 1e-3)
            note = f"{rate:.1f} MB/s, {now.rejected} rejected"
            report(now.images, now.total, before, note)

        yield show


@contextmanager
def progress(what: str, quiet: bool) -> Iterator[Report]:
    """A callback that moves a bar on a terminal and writes tenths elsewhere."""
    bar = tqdm(desc=what, unit=" images", dynamic_ncols=True, disable=not wants_bar(quiet))
    started, tenth = time.monotonic(), 0

    def report(done: int, total: int, before: int = 0, note: str = "") -> None:
        nonlocal tenth
        bar.total, bar.initial = total, before
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)
        if bar.disable and done > before and done * 10 // total > tenth:
            tenth = done * 10 // total
            rate = (done - before) / max(time.monotonic() - started, 1e-3)
            said = f"{note}, " if note else ""
            log.info(
                "%s: %d of %d images, %.0f images/s, %s%s left",
                what,
                done,
                total,
                rate,
                said,
                tqdm.format_interval((total - done) / rate),
            )

    try:
        yield report
    finally:
        bar.close()
