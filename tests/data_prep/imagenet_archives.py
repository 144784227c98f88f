"""ImageNet in small, in the form of the published archives."""

import io
import tarfile
from pathlib import Path

import numpy as np
from pictures import jpeg
from scipy.io import savemat

WNIDS = ("n01440764", "n01443537", "n02012849")
WORDS = ("tench, Tinca tinca", "goldfish, Carassius auratus", "crane")
IDS = (3, 1, 2)  # of the classes in the ground truth, which is in another order
TRUTH = (1, 1, 3, 2, 3, 2)
TRAIN, VALIDATION = 8, len(TRUTH)  # images per class, images


def images() -> dict[str, dict[str, bytes]]:
    """The training images of each class by name."""
    return {
        wnid: {
            f"{wnid}_{10 * number + 7}.JPEG": jpeg(100 * label + number, 20 + number, 30 + label)
            for number in range(TRAIN)
        }
        for label, wnid in enumerate(WNIDS)
    }


def validation() -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(1000 + n, 24, 31) for n in range(1, 7)}


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def meta() -> bytes:
    """The table of synsets with one node above the classes, as the kit has it."""
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    kinds += [("gloss", object), ("num_children", object)]
    rows = [
        *(
            (number, wnid, words, "", 0)
            for number, wnid, words in zip(IDS, WNIDS, WORDS, strict=True)
        ),
        (1001, "n00001740", "entity", "", 2),
    ]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=kinds)})
    return buffer.getvalue()


def devkit(truth: tuple[int, ...] = TRUTH) -> dict[str, bytes]:
    top = "ILSVRC2012_devkit_t12/data"
    lines = "".join(f"{number}\n" for number in truth)
    return {
        f"{top}/meta.mat": meta(),
        f"{top}/ILSVRC2012_validation_ground_truth.txt": lines.encode(),
    }


def write(root: Path, classes: dict[str, dict[str, bytes]] | None = None) -> Path:
    """The three archives in a folder."""
    root.mkdir(parents=True)
    inner = {f"{wnid}.tar": tar(files) for wnid, files in (classes or images()).items()}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar(validation()))
    write_devkit(root)
    return root


def write_devkit(root: Path, truth: tuple[int, ...] = TRUTH) -> None:
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        for name, data in devkit(truth).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
