"""Which sample goes to which shard: a pure function of the listing and the seed."""

from __future__ import annotations

import hashlib
import itertools
import json
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.items import Item, Items

_OWN_BLOCKS = 3  # of a sample: the headers of image and label, and the label


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be: ``samples`` items from place ``start`` of its split's order on.

    ``first`` is the place of its first item in the order of all splits.
    """

    split: str
    number: int
    start: int
    first: int
    samples: int

    @property
    def stem(self) -> str:
        """File name without extension, such as ``train-000003``."""
        return f"{self.split}-{self.number:06d}"

    def key(self, position: int) -> str:
        """Key of the shard's item at ``position``, unique over the set: ``train-00000042``.

        It numbers the shuffled order of all images found, so a rejected one leaves a gap and moves
        no other.
        """
        return f"{self.split}-{self.start + position:08d}"


@dataclass(frozen=True, eq=False)
class Plan:
    """All shards to be, and the items in their order: the n-th is number ``order[n]``."""

    items: Items
    order: npt.NDArray[np.int64]
    shards: tuple[ShardPlan, ...]

    def of(self, shard: ShardPlan) -> list[Item]:
        """The items of a shard."""
        places = self.order[shard.first : shard.first + shard.samples]
        return self.items.take(places)

    def bytes_of(self, shard: ShardPlan) -> int:
        """Size of a shard whose images are stored as they are."""
        places = self.order[shard.first : shard.first + shard.samples]
        return int(_stored_sizes(self.items.size[places]).sum())

    def save(self, folder: Path) -> None:
        """Write the plan into ``folder``, the list of shards last."""
        self.items.save(folder)
        np.save(folder / "order.npy", self.order)
        (folder / "shards.json").write_text(json.dumps([asdict(shard) for shard in self.shards]))

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """A plan that is read from disk where it is needed, so that any number of workers can."""
        shards = json.loads((folder / "shards.json").read_text())
        order = np.load(folder / "order.npy", mmap_mode="r")
        return cls(Items.load(folder), order, tuple(ShardPlan(**shard) for shard in shards))


def load_items(folder: Path, shard: ShardPlan) -> list[Item]:
    """The items of one shard of a plan on disk, without the list of the others."""
    order = np.load(folder / "order.npy", mmap_mode="r")
    return Plan(Items.load(folder), order, ()).of(shard)


def plan(
    items: Iterable[Item],
    seed: int,
    *,
    samples_per_shard: int | None = None,
    shard_bytes: int | None = None,
    ordered: tuple[str, ...] = (),
) -> Plan:
    """Shuffle each split and cut it into shards of even sizes, none over the limit that is given.

    The order is that of a hash of seed and origin: uniform, the same under every version of every
    library, and independent of the order in which a file system lists. The splits in ``ordered``
    keep the order of their origins. ``shard_bytes`` is of images that are stored as they are.

    Raises ValueError where an image alone exceeds ``shard_bytes``.
    """
    items = Items.of(items)
    orders, shards, first = [], [], 0
    for split in sorted(items.splits):
        members = np.flatnonzero(items.split == items.splits.index(split))
        order = members[_sorted(items, members, seed, split, split in ordered)]
        if shard_bytes is None:
            assert samples_per_shard is not None, "one of the limits is given"
            cuts = _even_cuts(len(order), -(-len(order) // samples_per_shard))
        else:
            cuts = _cuts_by_size(items.size[order], shard_bytes).tolist()
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            shards.append(ShardPlan(split, number, start, first + start, stop - start))
        orders.append(order)
        first += len(order)
    return Plan(items, np.concatenate(orders), tuple(shards))


def _sorted(
    items: Items, members: npt.NDArray[np.int64], seed: int, split: str, by_name: bool
) -> npt.NDArray[np.int64]:
    """Places that sort the ``members`` of a split."""
    names = items.names(members)
    if by_name:
        return np.array(sorted(range(len(members)), key=list(names).__getitem__), np.int64)
    prefix = f"{seed}\n{split}\n".encode()
    # Half a digest: that two of 10^9 names share it has a chance of 10^-21.
    draws = b"".join(hashlib.sha256(prefix + name).digest()[:16] for name in names)
    high, low = np.frombuffer(draws, ">u8").astype(np.uint64).reshape(-1, 2).T
    return np.lexsort((low, high))


def _even_cuts(samples: int, shards: int) -> list[int]:
    return [samples * number // shards for number in range(shards + 1)]


def _cuts_by_size(sizes: npt.NDArray[np.int64], limit: int) -> npt.NDArray[np.int64]:
    stored = _stored_sizes(sizes)
    if stored.max() > limit:
        raise ValueError(
            f"an image of {sizes.max()} bytes does not fit into a shard of {limit}: give a larger "
            "--shard-size"
        )
    ends = np.cumsum(stored)
    shards = -(-int(ends[-1]) // limit)
    while True:
        targets = [int(ends[-1]) * number // shards for number in range(1, shards)]
        cuts = np.unique([0, *np.searchsorted(ends, targets) + 1, len(ends)])
        if np.add.reduceat(stored, cuts[:-1]).max() <= limit:
            return cuts
        shards += 1


def _stored_sizes(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bytes that samples of these images take in a shard."""
    blocks = -(-sizes // tarfile.BLOCKSIZE) + _OWN_BLOCKS
    return blocks * tarfile.BLOCKSIZE
