"""Which sample goes to which shard: a pure function of the listing and the seed."""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from data_prep.listing import Item


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be: its items in order, the first one at ``start`` of its split's order."""

    split: str
    number: int
    start: int
    items: tuple[Item, ...]

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


def plan(items: Iterable[Item], seed: int, samples_per_shard: int) -> list[ShardPlan]:
    """Shuffle each split and cut it into shards of at most ``samples_per_shard``, of even sizes.

    The order is that of a hash of seed and origin: uniform, the same under every version of every
    library, and independent of the order in which a file system lists.
    """
    splits: dict[str, list[Item]] = {}
    for item in items:
        splits.setdefault(item.split, []).append(item)
    plans = []
    for split in sorted(splits):
        order = sorted(splits[split], key=lambda item: _draw(seed, item))
        shards = -(-len(order) // samples_per_shard)
        cuts = [len(order) * number // shards for number in range(shards + 1)]
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            plans.append(ShardPlan(split, number, start, tuple(order[start:stop])))
    return plans


def _draw(seed: int, item: Item) -> bytes:
    text = f"{seed}\n{item.split}\n{item.origin}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
