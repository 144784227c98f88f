"""The assignment of samples to shards."""

import tarfile

import numpy as np
import pytest

from data_prep.items import Item, Items
from data_prep.plan import Plan, load_items, plan
from data_prep.writer import ShardWriter

ITEMS = [Item("train", n % 2, f"image {n}", 0, 1) for n in range(1000)] + [
    Item("test", 0, f"other {n}", 0, 1) for n in range(10)
]


def shards(items=ITEMS, seed=3, samples_per_shard=64, **options):
    """Each shard with the origins of its items."""
    planned = plan(items, seed, samples_per_shard=samples_per_shard, **options)
    return [(shard, planned.of(shard)) for shard in planned.shards]


def origins(*arguments, split="train", **options):
    made = shards(*arguments, **options)
    return [[item.origin for item in items] for shard, items in made if shard.split == split]


def test_every_item_lies_in_one_shard_of_its_split():
    made = shards()
    found = sorted((item for _, items in made for item in items), key=lambda item: item.origin)
    assert found == sorted(ITEMS, key=lambda item: item.origin)
    assert all(item.split == shard.split for shard, items in made for item in items)


def test_shards_are_even_and_not_too_large():
    sizes = [len(items) for items in origins()]
    assert len(sizes) == 16
    assert max(sizes) <= 64
    assert max(sizes) - min(sizes) <= 1


def test_shards_of_a_size_in_bytes_are_even_and_not_too_large(tmp_path):
    """As written: the plan knows the size of an image's part of a tar to the byte."""
    random = np.random.default_rng(0)
    sizes = random.integers(1, 20_000, len(ITEMS)).tolist()
    items = [item._replace(size=size) for item, size in zip(ITEMS, sizes, strict=True)]
    limit = 200_000
    planned = plan(items, 3, shard_bytes=limit)
    held = [planned.bytes_of(shard) for shard in planned.shards if shard.split == "train"]
    assert max(held) <= limit
    assert min(held) > limit - 2 * 20_000
    shard = planned.shards[-1]
    writer = ShardWriter(tmp_path, shard.stem)
    for position, item in enumerate(planned.of(shard)):
        writer.add(shard.key(position), bytes(item.size), "jpg", item.label)
    written = writer.close()
    assert 0 <= written.bytes - planned.bytes_of(shard) <= tarfile.RECORDSIZE
    assert [i.origin for s in planned.shards for i in planned.of(s)] == [
        origin for split in ("test", "train") for shard in origins(split=split) for origin in shard
    ]


def test_an_image_larger_than_a_shard_is_refused():
    with pytest.raises(ValueError, match=r"image of 5000 bytes .* shard of 4096: give a larger"):
        plan([Item("train", 0, "image", 0, 5000)], 0, shard_bytes=4096)


def test_names_and_keys_number_the_order():
    made = [shard for shard, _ in shards(samples_per_shard=300) if shard.split == "train"]
    assert [shard.stem for shard in made] == [f"train-{n:06d}" for n in range(4)]
    keys = [shard.key(n) for shard in made for n in range(shard.samples)]
    assert keys == [f"train-{n:08d}" for n in range(1000)]


def test_the_order_is_that_of_the_seed_not_of_the_listing():
    assert shards(ITEMS, 3) == shards(ITEMS[::-1], 3)
    assert shards(ITEMS, 3) != shards(ITEMS, 4)


def test_a_split_may_keep_the_order_of_its_names():
    for items in (ITEMS, ITEMS[::-1]):
        (order,) = origins(items, split="test", ordered=("test",))
        assert order == [f"other {n}" for n in range(10)]
        assert origins(items, ordered=("test",)) == origins()


def test_the_order_is_shuffled():
    (order,) = origins(ITEMS, 0, 1000)
    places = [int(origin.split()[1]) for origin in order]
    # Spearman's correlation with the listing; its standard deviation here is 0.03.
    squares = sum((n - place) ** 2 for n, place in enumerate(places))
    assert abs(1 - 6 * squares / (1000 * (1000**2 - 1))) < 0.12
    assert 200 < sum(place % 2 for place in places[:500]) < 300


def test_the_order_stays_the_same_over_releases():
    (order,) = origins(ITEMS, 0, 1000)
    assert order[:4] == ["image 581", "image 916", "image 372", "image 978"]


def test_a_plan_on_disk_is_the_plan(tmp_path):
    planned = plan(ITEMS, 3, samples_per_shard=64)
    planned.save(tmp_path)
    loaded = Plan.load(tmp_path)
    assert loaded.shards == planned.shards
    assert [loaded.of(shard) for shard in loaded.shards] == [
        planned.of(shard) for shard in planned.shards
    ]
    assert load_items(tmp_path, planned.shards[3]) == planned.of(planned.shards[3])


def test_names_that_are_no_text_are_kept_in_columns():
    items = [Item("train", 0, "ant/\udcff.jpg", 0, 1), Item("train", 1, "bär.jpg", 7, 2, 3)]
    assert list(Items.of(iter(items))) == items
