"""Packing of planned shards: small picklable callables that work here or on any other machine.

A preparation under way is a folder: ``plan/`` says what is to be packed, ``set/`` has the shards
that are finished, and ``records/`` what is to be said of each. A shard is finished once its record
is there, so whoever comes next, wherever, goes on with the others.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from data_prep.facts import Facts
from data_prep.files import write_atomically
from data_prep.images import (
    CheckedImage,
    RejectedImageError,
    Treatment,
    check,
    counted_size,
    own_pixel_limit,
)
from data_prep.items import Item
from data_prep.listing import Reader, Rejection
from data_prep.manifest import Shard
from data_prep.parallel import run_parallel
from data_prep.plan import Plan, ShardPlan, load_items
from data_prep.writer import ShardWriter

NO_MARK = 0
"""Of an image that is not in the set."""


@dataclass(frozen=True)
class Work:
    """The folder of a preparation under way."""

    root: Path

    @property
    def plan(self) -> Path:
        return self.root / "plan"

    @property
    def set(self) -> Path:
        return self.root / "set"

    @property
    def records(self) -> Path:
        return self.root / "records"

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    def record(self, shard: ShardPlan) -> Path:
        return self.records / f"{shard.stem}.json"

    def is_finished(self, shard: ShardPlan) -> bool:
        """Whether the shard is there with its record; one that lost bytes is not."""
        if not self.record(shard).exists():
            return False
        written = Record.load(self.record(shard)).shard
        if written is None:
            return True
        tar, index = self.set / written.name, self.set / written.index
        return tar.is_file() and tar.stat().st_size == written.bytes and index.is_file()


@dataclass
class Record:
    """What is to be said of one shard once it is packed; ``shard`` is None where it has no sample.

    ``marks`` has a number for the bytes of each item as they were found, in order: equal bytes have
    equal marks.
    """

    shard: Shard | None
    facts: Facts
    bytes_read: int = 0
    reencoded: int = 0
    rejected: list[Rejection] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)

    @property
    def packed(self) -> Packed:
        """What packing it did, for whoever watches."""
        return Packed(len(self.marks), self.bytes_read, len(self.rejected))

    def save(self, path: Path) -> None:
        content = {
            **self.__dict__,
            "shard": self.shard and asdict(self.shard),
            "facts": self.facts.to_json(),
            "rejected": [[entry.split, entry.origin, entry.reason] for entry in self.rejected],
        }
        write_atomically(path, json.dumps(content).encode("ascii"))

    @classmethod
    def load(cls, path: Path) -> Record:
        content = json.loads(path.read_bytes())
        content["shard"] = content["shard"] and Shard(**content["shard"])
        content["facts"] = Facts.of_json(content["facts"])
        content["rejected"] = [Rejection(*entry) for entry in content["rejected"]]
        return cls(**content)


@dataclass(frozen=True)
class Packed:
    """What packing one shard did, for whoever watches."""

    images: int
    bytes: int
    rejected: int


@dataclass(frozen=True)
class PackShard:
    """Packs one planned shard; picklable, needs no other state than the folder."""

    work: Work
    reader: Reader
    classes: int
    treatment: Treatment

    def __call__(self, shard: ShardPlan) -> Packed:
        record = self._pack(shard, load_items(self.work.plan, shard))
        record.save(self.work.record(shard))
        return record.packed

    def _pack(self, shard: ShardPlan, items: list[Item]) -> Record:
        record = Record(None, Facts([0] * self.classes))
        writer = ShardWriter(self.work.set, shard.stem)
        try:
            with own_pixel_limit():
                for position, item in enumerate(items):
                    image = self._take(item, record)
                    if image is not None:
                        crc = None if image.reencoded else record.marks[-1] >> 32
                        key = shard.key(position)
                        writer.add(key, image.data, image.extension, item.label, crc)
            record.shard = writer.close()
        except BaseException:
            writer.discard()
            raise
        return record

    def _take(self, item: Item, record: Record) -> CheckedImage | None:
        """Read and check one image and account for it; None where it is rejected."""
        data = self.reader.read(item)
        record.bytes_read += len(data)
        record.marks.append(crc32(data) << 32 | len(data))
        try:
            counted = counted_size(self.treatment, sum(record.facts.sides))
            image = check(data, self.treatment, counted)
        except RejectedImageError as reason:
            record.rejected.append(Rejection(item.split, item.origin, str(reason)))
            record.marks[-1] = NO_MARK
            return None
        record.reencoded += image.reencoded
        record.facts.count(image, item.label)
        return image


@dataclass(frozen=True)
class PackShards:
    """Packs those of a range of planned shards that are not finished: the share of one job."""

    pack: PackShard
    first: int
    stop: int
    workers: int | None = None

    def __call__(self) -> None:
        for _ in self.run():
            pass

    def run(self) -> Iterator[Packed]:
        """Pack the shards and tell of each; ValueError where the disk is full."""
        plan = Plan.load(self.pack.work.plan)
        shards = self.unfinished(plan)
        left = sum(plan.bytes_of(shard) for shard in shards)
        try:
            for position, packed in run_parallel(self.pack, shards, self.workers):
                left -= plan.bytes_of(shards[position])
                yield packed
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ValueError(
                f"the disk of {self.pack.work.root} is full, and {left / 1e9:,.3f} GB more are "
                "needed at most: make room, and the same command goes on with what is left"
            ) from None

    def unfinished(self, plan: Plan) -> list[ShardPlan]:
        """The shards of the range that are still to be packed."""
        shards = plan.shards[self.first : self.stop]
        return [shard for shard in shards if not self.pack.work.is_finished(shard)]
