"""The assignment of samples to shards."""

from data_prep.listing import Item
from data_prep.plan import plan

ITEMS = [Item("train", n % 2, f"image {n}", 0, 1) for n in range(1000)] + [
    Item("test", 0, f"other {n}", 0, 1) for n in range(10)
]


def test_every_item_lies_in_one_shard_of_its_split():
    plans = plan(ITEMS, seed=3, samples_per_shard=64)
    assert sorted(item.origin for p in plans for item in p.items) == sorted(
        item.origin for item in ITEMS
    )
    assert all(item.split == p.split for p in plans for item in p.items)


def test_shards_are_even_and_not_too_large():
    sizes = [len(p.items) for p in plan(ITEMS, seed=3, samples_per_shard=64) if p.split == "train"]
    assert len(sizes) == 16
    assert max(sizes) <= 64
    assert max(sizes) - min(sizes) <= 1


def test_names_and_keys_number_the_order():
    plans = [p for p in plan(ITEMS, seed=3, samples_per_shard=300) if p.split == "train"]
    assert [p.stem for p in plans] == [f"train-{n:06d}" for n in range(4)]
    keys = [p.key(n) for p in plans for n in range(len(p.items))]
    assert keys == [f"train-{n:08d}" for n in range(1000)]


def test_the_order_is_that_of_the_seed_not_of_the_listing():
    assert plan(ITEMS, 3, 64) == plan(ITEMS[::-1], 3, 64)
    assert plan(ITEMS, 3, 64) != plan(ITEMS, 4, 64)


def test_the_order_is_shuffled():
    (train,) = (p for p in plan(ITEMS, 0, 1000) if p.split == "train")
    places = [int(item.origin.split()[1]) for item in train.items]
    # Spearman's correlation with the listing; its standard deviation here is 0.03.
    squares = sum((n - place) ** 2 for n, place in enumerate(places))
    assert abs(1 - 6 * squares / (1000 * (1000**2 - 1))) < 0.12
    ones = sum(item.label for item in train.items[:500])
    assert 200 < ones < 300


def test_the_order_stays_the_same_over_releases():
    (train,) = (p for p in plan(ITEMS, 0, 1000) if p.split == "train")
    assert [item.origin for item in train.items[:4]] == [
        "image 581",
        "image 916",
        "image 372",
        "image 978",
    ]
