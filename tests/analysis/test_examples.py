"""Which images are called easy and hard, and that they are the right images."""

import base64
import io
import shutil

import numpy as np
import pytest
from finished_runs import CLASSES, PER_CLASS, prepared
from PIL import Image

from data_prep.manifest import Manifest
from pipeline import evaluate
from pipeline.analysis import contents, examples, restorations
from pipeline.analysis.contents import Evaluation
from pipeline.analysis.examples import Pick
from pipeline.data.shards import ShardSet
from pipeline.tasks import denoising
from pipeline.tasks.classification import Samples


def made_up(labels, steps, losses):
    """Samples of one gated cell; none where `steps` is None."""
    labels = np.array(labels)
    taken = np.array(steps)[:, None] if steps is not None else np.zeros((len(labels), 0), int)
    keys = np.array([f"key {i}" for i in range(len(labels))])
    return Samples(keys, labels, labels, np.array(losses, np.float32), taken)


def test_fewest_and_most_steps_of_each_category():
    samples = made_up([0] * 6 + [1] * 4, [3, 1, 5, 2, 4, 6, 9, 7, 8, 6], [0.1] * 10)
    assert examples.pick(samples) == [
        Pick(0, easiest=(1, 3), hardest=(2, 5)),
        Pick(1, easiest=(9, 7), hardest=(8, 6)),
    ]


def test_steps_of_all_cells_count():
    samples = made_up([0, 0], [2, 1], [0.1, 0.1])
    steps = np.array([[2, 0], [1, 3]])
    samples = Samples(samples.keys, samples.labels, samples.labels, samples.losses, steps)
    assert examples.pick(samples) == [Pick(0, easiest=(0,), hardest=(1,))]


def test_ties_are_decided_by_the_loss():
    samples = made_up([0] * 4, [2] * 4, [0.3, 0.1, 0.4, 0.2])
    assert examples.pick(samples) == [Pick(0, easiest=(1, 3), hardest=(0, 2))]


def test_without_steps_the_loss_decides():
    samples = made_up([0] * 4, None, [0.3, 0.1, 0.4, 0.2])
    assert examples.pick(samples) == [Pick(0, easiest=(1, 3), hardest=(0, 2))]


def test_no_image_is_easiest_and_hardest_at_once():
    samples = made_up([0, 1, 1, 1], [1, 1, 2, 3], [0.1] * 4)
    assert examples.pick(samples) == [Pick(1, easiest=(1,), hardest=(3,))]


def test_of_many_categories_those_with_the_widest_range():
    count = examples.COLUMNS + 3
    labels = np.repeat(np.arange(count), 2)
    ranges = np.arange(count) % 7
    steps = np.stack([np.zeros(count, int), ranges], 1).ravel()
    losses = np.stack([np.zeros(count), np.arange(count)], 1).ravel()
    widest = sorted(range(count), key=lambda c: (ranges[c], c))[-examples.COLUMNS :]
    assert [found.label for found in examples.pick(made_up(labels, steps, losses))] == sorted(
        widest
    )


def test_images_are_those_of_the_samples(make_run, shards):
    run = contents.read(make_run())
    samples = run.main.samples
    shard_set = ShardSet(shards, shards.evaluation)
    stored = {sample.key: sample for sample in shard_set.read(np.arange(len(shard_set)))}
    columns = examples.columns(run, run.main)
    assert [column.category for column in columns] == list(CLASSES)
    for label, column in enumerate(columns):
        assert len(column.easiest) == len(column.hardest) == min(examples.ROWS, PER_CLASS // 2)
        for example in column.easiest + column.hardest:
            kind, _, data = example.image.partition(",")
            assert kind == "data:image/png;base64"
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
            original = np.asarray(Image.open(io.BytesIO(stored[example.key].data.tobytes())))
            np.testing.assert_array_equal(shown, original)
            index = samples.keys.tolist().index(example.key)
            assert samples.labels[index] == label
            assert example.steps == samples.steps[index].sum()
            right = samples.predictions[index] == label
            predicted = CLASSES[samples.predictions[index]]
            assert example.mistaken_for == (None if right else predicted)
    shown = [e for column in columns for e in column.easiest + column.hardest]
    assert {example.mistaken_for is None for example in shown} == {True, False}


def test_large_images_are_shown_small(make_run, tmp_path):
    manifest = prepared(tmp_path / "large", classes=("one",), size=(300, 600))
    run = contents.read(make_run(manifest=manifest))
    (column,) = examples.columns(run, run.main)
    data = base64.b64decode(column.easiest[0].image.partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (64, 32)


def test_restorations_are_called_what_they_are():
    views = np.stack([np.full((1, 2, 2), grey, np.uint8) for grey in (10, 20, 30)], 1)
    samples = denoising.Samples(
        keys=np.array(["key"]),
        psnr=np.array([30.0]),
        noisy_psnr=np.array([20.0]),
        examples=views,
        steps=np.zeros((1, 0), np.int64),
    )
    (shown,) = restorations.restorations(Evaluation("set-test", None, samples))
    clean, noisy, restored = (examples.data_uri(Image.fromarray(view)) for view in views[0])
    assert shown == restorations.Restoration("key", clean, noisy, restored, 20, 30)


def elsewhere(directory, shards, other):
    """The run with another shard set at its place, and the evaluation as it was."""
    text = directory.config_file.read_text()
    directory.config_file.write_text(text.replace(str(shards.root), str(other.root)))
    evaluate.save(directory.evaluation_of(other), *evaluate.load(directory.evaluation_of(shards)))
    return contents.read(directory)


def test_shard_set_with_other_counts_is_not_taken_for_the_evaluated_one(make_run, shards, tmp_path):
    other = prepared(tmp_path / "other", classes=(*CLASSES, "zebra"))
    run = elsewhere(make_run(), shards, other)
    with pytest.raises(ValueError, match="is not the shard set that was evaluated"):
        examples.columns(run, run.main)


def test_shard_set_in_another_order_is_not_taken_for_the_evaluated_one(make_run, shards, tmp_path):
    """Keys and counts are the same; the categories at the places are not."""
    other = prepared(tmp_path / "other", seed=1)
    run = elsewhere(make_run(), shards, other)
    with pytest.raises(ValueError, match="is not the shard set that was evaluated"):
        examples.columns(run, run.main)


def test_missing_shard_is_named(make_run, shards, tmp_path):
    shutil.copytree(shards.root, tmp_path / "copy")
    (tmp_path / "copy" / shards.evaluation.shards[0].name).unlink()
    run = elsewhere(make_run(), shards, Manifest.load(tmp_path / "copy"))
    with pytest.raises(ValueError, match=shards.evaluation.shards[0].name):
        examples.columns(run, run.main)
