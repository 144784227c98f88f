"""Checkpoints: one atomic, hashed directory each; no pickle.

A state is a nested dictionary of tensors and JSON values. Each named state is one safetensors file
whose header carries the JSON values. `manifest.json` lists the files with their sha256, and the
directory gets its final name only after everything in it is on disk: a checkpoint that can be seen
is complete, and one that was damaged later is recognised.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data_prep.files import sync, write_atomically
from pipeline.distributed import World

log = logging.getLogger(__name__)

State = Mapping[str, Any]
MANIFEST = "manifest.json"
VERSION = 1
SUFFIX = ".safetensors"
PARTIAL = ".partial-"
DAMAGED = "damaged-"
_NAME = re.compile(r"step-(\d{9})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used; the message names it and the cure."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; not `evaluated` where the step's evaluation is still due."""

    path: Path
    step: int
    world_size: int
    score: float | None
    states: tuple[str, ...]
    evaluated: bool = True

    def load(self, name: str) -> dict[str, Any]:
        """The state saved under this name: nested, tensors on the CPU."""
        return read_state(self.path / f"{name}{SUFFIX}")


class CheckpointStore:
    """The checkpoints of one run, in the order of their steps (never of their times).

    `record` is a file elsewhere that knows the newest step that was saved: without it, a folder
    that was emptied would look like that of a run that never saved.
    """

    def __init__(
        self, folder: Path, world: World, keep_last: int, record: Path | None = None
    ) -> None:
        self.folder = folder
        self.world = world
        self.keep_last = keep_last
        self.record = record

    def save(
        self,
        step: int,
        states: Mapping[str, State],
        own: State,
        score: float | None = None,
        *,
        evaluated: bool = True,
    ) -> Checkpoint:
        """Write a checkpoint; every rank calls this with the same step.

        Args:
            states: name -> state that all ranks share; rank 0 writes them.
            own: state of this rank alone, saved as `rank-<rank>`.
            score: of the evaluation at this step, higher is better; the best is never pruned.
            evaluated: whether there is no evaluation to come at this step; see `grade`.

        Raises:
            CheckpointError: on every rank, if any rank could not write; what was there before is
                untouched and the partial directory is gone.
        """
        name = f"step-{step:09d}"
        partial = self.folder / f"{PARTIAL}{name}"
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        self.world.gather(None)  # nobody writes before the leftovers are gone
        mine = {f"rank-{self.world.rank:05d}": own} | (dict(states) if self.world.is_main else {})
        hashes, failure = _attempt(lambda: _write_states(partial, mine))
        self._agree(partial, failure)
        files: dict[str, str] = {}
        for part in self.world.gather(hashes):
            files |= part
        manifest = {
            "version": VERSION,
            "step": step,
            "world_size": self.world.world_size,
            "score": score,
            "evaluated": evaluated,
            "files": dict(sorted(files.items())),
        }
        final = self.folder / name
        failure = None
        if self.world.is_main:
            _, failure = _attempt(lambda: _publish(partial, final, manifest))
        self._agree(partial, failure)
        if self.world.is_main:
            # After the checkpoint: a record that says too little refuses no run that is good.
            self._record(step)
            self._prune()
        return _checkpoint(final, manifest)

    def grade(self, step: int, score: float | None) -> None:
        """Add the score of the evaluation, if it has one, to the checkpoint saved before it.

        Every rank calls this. Raises CheckpointError on all of them where it cannot be written; the
        checkpoint is then as it was.
        """
        path = self.folder / f"step-{step:09d}" / MANIFEST
        failure = None
        if self.world.is_main:
            _, failure = _attempt(lambda: _grade(path, score))
        if failure := self.world.broadcast(failure):
            raise CheckpointError(
                f"cannot write the score of {path.parent}: {failure}: free disk space or repair "
                "the folder; a run that is resumed from it evaluates again"
            )
        if self.world.is_main:
            self._prune()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there never was one.

        A damaged one is named in the log and renamed aside.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged; or there were.
        """
        found: Checkpoint | str | None = None
        if self.world.is_main:
            try:
                found = self._find()
            except CheckpointError as error:
                found = str(error)
        found = self.world.broadcast(found)
        if isinstance(found, str):
            raise CheckpointError(found)
        return found

    def best(self) -> Checkpoint | None:
        """The checkpoint with the highest score; of equals, the earliest."""
        scored = [c for c in map(_describe, _directories(self.folder)) if c and c.score is not None]
        return max(scored, key=_rank, default=None)

    def _find(self) -> Checkpoint | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(leftover)
        for path in reversed(_directories(self.folder)):
            damage = inspect(path)
            if damage is None:
                found = _describe(path)
                self._compare(found)
                return found
            aside = self.folder / f"{DAMAGED}{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("checkpoint %s is damaged (%s): set aside as %s", path, damage, aside.name)
        if damaged := sorted(self.folder.glob(f"{DAMAGED}*")):
            raise CheckpointError(
                f"all {len(damaged)} checkpoints in {self.folder} are damaged: restore one from a "
                "backup and remove its prefix 'damaged-', or start a new run directory"
            )
        if self.record is not None and self.record.is_file():
            raise CheckpointError(
                f"{self.folder} is empty, though this run had saved step {self._recorded()}: "
                "restore a checkpoint from a backup, or start a new run with another --run folder"
            )
        return None

    def _compare(self, found: Checkpoint | None) -> None:
        """The newest checkpoint there is with the newest that there was."""
        recorded = self._recorded()
        if found is None or recorded == found.step:
            return
        if recorded is not None and recorded > found.step:
            if not (self.folder / f"{DAMAGED}step-{recorded:09d}").exists():
                log.warning(
                    "step %d was saved and is gone: going on from step %d", recorded, found.step
                )
        else:
            self._record(found.step)

    def _recorded(self) -> int | None:
        """The newest step that was saved; None where it is not known."""
        try:
            return None if self.record is None else int(json.loads(self.record.read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _record(self, step: int) -> None:
        if self.record is None:
            return
        try:
            write_atomically(self.record, json.dumps({"step": step}).encode())
        except OSError as error:
            log.warning("cannot record that step %d is saved: %s", step, error)

    def _agree(self, partial: Path, failure: str | None) -> None:
        failures = [text for text in self.world.gather(failure) if text]
        if failures:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"cannot write a checkpoint to {self.folder}: {failures[0]}: free disk space or "
                "repair the folder; the checkpoints before it are untouched"
            )

    def _prune(self) -> None:
        best = self.best()
        for path in _directories(self.folder)[: -self.keep_last]:
            if best is None or path != best.path:
                try:
                    # Renamed first, so that a kill in mid-removal leaves no half checkpoint.
                    doomed = path.rename(self.folder / f"{PARTIAL}{path.name}")
                    shutil.rmtree(doomed)
                except OSError as error:
                    log.warning("cannot remove the old checkpoint %s: %s", path, error)


def find(folder: Path, best: bool = False, at: int | None = None) -> Checkpoint:
    """The newest (or best) whole checkpoint, for a reader: nothing in the folder is changed.

    Args:
        at: only the one of this step will do.

    Raises:
        CheckpointError: there is none.
    """
    complete = [c for path in _directories(folder) if (c := _describe(path))]
    if at is not None:
        complete = [c for c in complete if c.step == at]
    if best:
        complete = sorted((c for c in complete if c.score is not None), key=_rank)
    for checkpoint in reversed(complete):
        if damage := inspect(checkpoint.path):
            log.warning("checkpoint %s is damaged (%s): not used", checkpoint.path, damage)
        else:
            return checkpoint
    kind = " with a score" if best else "" if at is None else f" of step {at}"
    raise CheckpointError(
        f"{folder.parent} has no whole checkpoint{kind} yet: reprise train {folder.parent}"
    )


def inspect(path: Path) -> str | None:
    """What is wrong with a checkpoint directory; None if every hash is as recorded."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files: dict[str, str] = manifest["files"]
        if manifest.pop("sha256") != _own_hash(manifest):
            return f"{MANIFEST}: its own sha256 is another"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {error!r}"
    for name, expected in files.items():
        try:
            actual = _sha256(path / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if actual != expected:
            return f"{name}: sha256 is {actual[:12]}, recorded {expected[:12]}"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The nested state of one file, tensors on the CPU."""
    try:
        with safe_open(path, framework="pt") as file:
            state: dict[str, Any] = json.loads((file.metadata() or {}).get("values", "{}"))
            for key in file.keys():  # noqa: SIM118  (not a dictionary)
                _insert(state, key.split("/"), file.get_tensor(key))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    return state


def write_state(path: Path, state: State) -> None:
    """Write one state and wait until it is on disk."""
    tensors: dict[str, torch.Tensor] = {}
    values = _split(state, (), tensors)
    save_file(tensors, path, metadata={"values": json.dumps(values)})
    sync(path)


def _split(state: State, path: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in state.items():
        assert "/" not in key, key
        if isinstance(value, Mapping):
            values[key] = _split(value, (*path, key), tensors)
        elif isinstance(value, torch.Tensor):
            # A copy: safetensors refuses tensors that share memory or are not contiguous.
            copied = value.detach().cpu().contiguous().clone()
            tensors["/".join((*path, key))] = copied
        else:
            values[key] = value
    return values


def _insert(state: dict[str, Any], path: list[str], tensor: torch.Tensor) -> None:
    for key in path[:-1]:
        state = state.setdefault(key, {})
    state[path[-1]] = tensor


def _write_states(folder: Path, states: Mapping[str, State]) -> dict[str, str]:
    """Write the states; file name -> sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for name, state in states.items():
        path = folder / f"{name}{SUFFIX}"
        write_state(path, state)
        hashes[path.name] = _sha256(path)
    return hashes


def _publish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    _write_manifest(partial / MANIFEST, manifest)
    assert not final.exists(), final
    partial.rename(final)
    sync(final.parent)


def _grade(path: Path, score: float | None) -> None:
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    _write_manifest(path, manifest | {"score": score, "evaluated": True})


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    whole = {**manifest, "sha256": _own_hash(manifest)}
    write_atomically(path, json.dumps(whole, indent=1).encode())


def _own_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _attempt(write: Any) -> tuple[dict[str, str], str | None]:
    try:
        return write() or {}, None
    except (OSError, SafetensorError) as error:
        return {}, str(error)


def _describe(path: Path) -> Checkpoint | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        return _checkpoint(path, manifest)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _directories(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _rank(checkpoint: Checkpoint) -> tuple[float, int]:
    """Higher is better; of equal scores the earliest."""
    assert checkpoint.score is not None
    return checkpoint.score, -checkpoint.step


def _checkpoint(path: Path, manifest: Mapping[str, Any]) -> Checkpoint:
    states = tuple(name.removesuffix(SUFFIX) for name in manifest["files"])
    return Checkpoint(
        path=path,
        step=manifest["step"],
        world_size=manifest["world_size"],
        score=manifest["score"],
        states=states,
        evaluated=manifest["evaluated"],
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
