"""What a shard set is: classes, counts, hashes and how it was prepared.

The manifest is written last, so a folder that has one holds a finished set. Nothing in it changes
from one run to the next: it has no time stamps and no absolute paths.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import write_atomically

MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"
DUPLICATES_NAME = "duplicates.jsonl"
CARD_NAME, CARD_PICTURE_NAME = "card.md", "card.png"
LOCK_NAME, OWNER_NAME = ".prepare.lock", ".prepare.owner"
SCHEMA_VERSION = 2
TRAIN, VAL = "train", "val"
CLASSIFICATION, DENOISING = TASKS = ("classification", "denoising")

_CURE = "delete the folder and prepare the set again with `reprise prep ...`"


@dataclass(frozen=True)
class Shard:
    """One tar of samples and its DALI index; both names are relative to the set's root."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index: str
    index_sha256: str


@dataclass(frozen=True)
class Split:
    """A named part of the set; ``counts[i]`` is the number of samples of class id ``i``."""

    name: str
    shards: tuple[Shard, ...]
    counts: tuple[int, ...]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def sha256(self) -> str:
        """Identity of its samples and of the order that they lie in."""
        text = "".join(f"{shard.sha256}\n" for shard in self.shards)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """A finished shard set.

    ``classes`` gives the name of each class id, and ``names`` what people call it where those are
    codes. ``image_size`` is (min height, max height, min width, max width) in pixels over all
    accepted images. ``channel_mean`` and ``channel_std`` are those of the train split's pixels in
    RGB, in 0..1. Of images of more than 16,384 pixels only the first 256 of each shard count, with
    some of their rows; of a set that was trusted or resized the first 16 of each shard, whatever
    their size.

    ``found = accepted + rejected`` images, and the rejected ones stand with their reasons in
    ``rejected.jsonl``. ``reencoded`` of the accepted are stored as other bytes than were found.
    ``duplicates`` are images outside of train whose bytes a training image has, too; they are
    listed in ``duplicates.jsonl``. ``settings`` holds all that decides the bytes, ``tools`` the
    versions that wrote them.

    ``task`` is what the images are for. Images for denoising are their own targets: they have no
    labels, and their set has the one class that all of them are of. ``evaluation_split`` names the
    split to evaluate on in a set that has several besides ``train`` and no ``val`` among them, or
    that has no ``train`` and is for evaluation alone.

    ``copies`` are folders that hold some or all of the shards, too: no part of the set, but set by
    whoever reads it.
    """

    root: Path = field(compare=False)
    name: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    image_size: tuple[int, int, int, int]
    channel_mean: tuple[float, float, float]
    channel_std: tuple[float, float, float]
    found: int
    accepted: int
    rejected: int
    settings: dict[str, Any]
    tools: dict[str, str]
    task: str = CLASSIFICATION
    evaluation_split: str | None = None
    reencoded: int = 0
    duplicates: int = 0
    names: tuple[str, ...] = ()
    copies: tuple[Path, ...] = field(default=(), compare=False)

    def folder_of(self, shard: Shard) -> Path:
        """Where to read a shard: the first of ``copies`` that has all of it, else ``root``."""
        for folder in self.copies:
            tar, index = folder / shard.name, folder / shard.index
            if tar.is_file() and index.is_file() and tar.stat().st_size == shard.bytes:
                return folder
        return self.root

    @property
    def class_map_sha256(self) -> str:
        """Identity of the id -> name list: two sets with the same hash mean the same by a label."""
        text = json.dumps(list(self.classes), ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def train(self) -> Split:
        if TRAIN not in self.splits:
            raise ValueError(
                f"{self.root} has no split {TRAIN!r}, only {_listed(self.splits)}: "
                f"prepare a source that has one"
            )
        return self.splits[TRAIN]

    @property
    def measured(self) -> str:
        """The split whose pixels the channel mean and std are of: train where there is one."""
        return TRAIN if TRAIN in self.splits else self.evaluation.name

    @property
    def evaluation(self) -> Split:
        """The split that the set says to evaluate on, or the one that is not for training.

        Of several it is val: the others are held out for the end. Raises ValueError where there is
        none.
        """
        if self.evaluation_split is not None:
            return self.splits[self.evaluation_split]
        others = [split for name, split in self.splits.items() if name != TRAIN]
        if not others:
            raise ValueError(
                f"{self.root} has no split besides {TRAIN!r} to evaluate on: add val/ or test/ to "
                "the source and prepare it into another folder"
            )
        if len(others) > 1 and VAL not in self.splits:
            raise ValueError(
                f"{self.root} has the splits {_listed(self.splits)}, and does not say which to "
                f"evaluate on: name one of them {VAL} and prepare it into another folder"
            )
        return self.splits[VAL] if len(others) > 1 else others[0]

    @classmethod
    def load(cls, root: Path) -> "Manifest":
        """Read the manifest of the set at ``root``.

        Raises FileNotFoundError where there is none and ValueError where it is damaged, of another
        schema version, or disagrees with itself.
        """
        root = Path(root)
        path = root / MANIFEST_NAME
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(_no_set(root)) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is damaged ({error}): {_CURE}") from None
        try:
            content = json.loads(text)
            version = content["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): {_CURE}") from None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema version {version!r}, this release reads {SCHEMA_VERSION}: "
                f"{_CURE}"
            )
        try:
            manifest = _from_content(root, content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): {_CURE}") from None
        problem = manifest.inconsistency()
        if content.get("class_map_sha256") != manifest.class_map_sha256:
            problem = "class_map_sha256 is not the hash of its classes"
        if problem:
            raise ValueError(f"{path} contradicts itself: {problem}: {_CURE}")
        return manifest

    def save(self) -> None:
        """Write the manifest into ``root``: aside, fsync, rename. Equal manifests, equal bytes."""
        content = asdict(self)
        del content["root"], content["copies"]
        content["schema_version"] = SCHEMA_VERSION
        content["class_map_sha256"] = self.class_map_sha256
        text = json.dumps(content, sort_keys=True, indent=1) + "\n"
        write_atomically(self.root / MANIFEST_NAME, text.encode())

    def inconsistency(self) -> str | None:
        """The first contradiction between the manifest's own numbers, or None."""
        if len(set(self.classes)) != len(self.classes):
            return "a class name occurs twice"
        if len(self.names) not in (0, len(self.classes)):
            return f"it names {len(self.names)} of {len(self.classes)} classes"
        if self.task not in TASKS:
            return f"task {self.task!r} is not one of {', '.join(TASKS)}"
        if self.task == DENOISING and len(self.classes) != 1:
            return f"a set for {DENOISING} has {len(self.classes)} classes and not one"
        if TRAIN not in self.splits and self.evaluation_split is None:
            return f"it has no split {TRAIN!r} and names none to evaluate on"
        if self.evaluation_split not in (None, *(self.splits.keys() - {TRAIN})):
            return f"the split to evaluate on, {self.evaluation_split!r}, is none of its splits"
        for key, split in self.splits.items():
            if not split.samples:
                return f"split {key!r} holds no samples"
            if key != split.name:
                return f"split {key!r} calls itself {split.name!r}"
            if len(split.counts) != len(self.classes):
                return f"split {key!r} counts {len(split.counts)} classes of {len(self.classes)}"
            if sum(split.counts) != split.samples:
                return (
                    f"split {key!r} counts {sum(split.counts)} samples by class and "
                    f"{split.samples} by shard"
                )
        names = [n for s in self.splits.values() for h in s.shards for n in (h.name, h.index)]
        if len(set(names)) != len(names):
            return "two shards share a file"
        for name in names:
            if name in (".", "..", "") or Path(name).name != name:
                return f"the shard file {name!r} is not a plain name"
        if self.accepted != sum(split.samples for split in self.splits.values()):
            return f"accepted is {self.accepted} but the splits hold another number of samples"
        if self.accepted + self.rejected != self.found:
            return f"accepted {self.accepted} + rejected {self.rejected} is not found {self.found}"
        return None


def _no_set(root: Path) -> str:
    """That there is none, and how to make one; never among other files, such as those of a run."""
    where, out = "", str(root)
    if not root.is_absolute():
        where = f" (a relative path starts at the current folder, here {Path.cwd()})"
    if root.is_file() or (root.is_dir() and any(root.glob("[!.]*"))):
        out = "FOLDER"
    return (
        f"{root} holds no {MANIFEST_NAME}{where}, so no finished shard set: "
        f"make one with `reprise prep KIND --source IMAGES --out {out}`"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _from_content(root: Path, content: dict[str, Any]) -> Manifest:
    splits = {
        name: Split(
            name=split["name"],
            shards=tuple(Shard(**shard) for shard in split["shards"]),
            counts=tuple(int(count) for count in split["counts"]),
        )
        for name, split in content["splits"].items()
    }
    low_height, high_height, low_width, high_width = map(int, content["image_size"])
    red, green, blue = map(float, content["channel_mean"])
    red_std, green_std, blue_std = map(float, content["channel_std"])
    return Manifest(
        root=root,
        name=str(content["name"]),
        classes=tuple(str(name) for name in content["classes"]),
        splits=splits,
        image_size=(low_height, high_height, low_width, high_width),
        channel_mean=(red, green, blue),
        channel_std=(red_std, green_std, blue_std),
        found=int(content["found"]),
        accepted=int(content["accepted"]),
        rejected=int(content["rejected"]),
        settings=dict(content["settings"]),
        tools=dict(content["tools"]),
        task=str(content.get("task", CLASSIFICATION)),
        evaluation_split=content.get("evaluation_split"),
        reencoded=int(content.get("reencoded", 0)),
        duplicates=int(content.get("duplicates", 0)),
        names=tuple(str(name) for name in content.get("names", ())),
    )
