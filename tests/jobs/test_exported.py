"""What a finished run leaves for others to use: a network that needs neither run nor shard set."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.io import ImageReadMode, decode_image

from data_prep.manifest import Manifest
from pipeline import evaluate, exported
from pipeline.config import Augmentation, ConfigError
from pipeline.data.augment import resize
from pipeline.data.shards import ShardSet
from pipeline.run_directory import RunDirectory


def test_it_answers_as_the_evaluation_did(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "weights.safetensors", tmp_path / "alone.safetensors")
    found = exported.load(tmp_path / "alone.safetensors")
    config = RunDirectory(finished).read_config()
    manifest = Manifest.load(config.data.path)
    assert found.classes == manifest.classes
    assert not found.network.training
    shards = ShardSet(manifest, manifest.evaluation)
    stored = shards.read(np.arange(len(shards)))
    images = [decode_image(torch.from_numpy(s.data), ImageReadMode.RGB) for s in stored]
    with torch.inference_mode():
        logits = found.network(found.prepare(images)).logits
    shards.close()
    summary, samples = evaluate.load(RunDirectory(finished).evaluation_of(manifest))
    assert summary.step == found.step
    assert logits.argmax(1).tolist() == samples.predictions.tolist()
    losses = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(samples.labels), reduction="none"
    )
    torch.testing.assert_close(losses, torch.from_numpy(samples.losses), rtol=1e-4, atol=1e-5)


def test_large_images_are_scaled_and_cropped_in_the_centre(finished: Path) -> None:
    network = exported.load(finished).network
    augment = Augmentation(size=8, eval_resize=12)
    made = exported.Exported(network, ("a", "b"), (0.5, 0.4, 0.3), (0.2, 0.1, 0.3), augment, 1)
    image = torch.randint(0, 256, (3, 30, 20), generator=torch.Generator().manual_seed(0)).byte()
    (prepared,) = made.prepare([image])
    square = resize(image.permute(1, 2, 0), 12)[2:10, 2:10].permute(2, 0, 1).float() / 255
    for channel, (mean, std) in enumerate(((0.5, 0.2), (0.4, 0.1), (0.3, 0.3))):
        torch.testing.assert_close(prepared[channel], (square[channel] - mean) / std)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*weights.safetensors.*finished run"):
        exported.load(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ConfigError, match=r"bare.safetensors does not say what network it is of"):
        exported.load(tmp_path / "bare.safetensors")
