"""Small images and sources that the tests of preparation are made of."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, height: int = 12, width: int = 10) -> Image.Image:
    """A smooth colour image, different for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int, height: int = 12, width: int = 10, **options: object) -> bytes:
    return encoded(picture(seed, height, width), **options)


def lossless_jpeg(height: int, width: int) -> bytes:
    """A grey JPEG of one value in lossless frames, which no encoder here writes."""

    def segment(code: int, content: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, code, len(content) + 2) + content

    one_code = bytes([0, 1, *[0] * 15, 0])  # of one bit, for a difference of nothing
    return b"".join(
        (
            b"\xff\xd8",
            segment(0xC3, struct.pack(">BHHBBBB", 8, height, width, 1, 1, 0x11, 0)),
            segment(0xC4, one_code),
            segment(0xDA, bytes([1, 1, 0, 1, 0, 0])),
            bytes(-(-height * width // 8)),
            b"\xff\xd9",
        )
    )


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its data holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def class_folders(root: Path, train: int = 6, test: int = 3) -> Path:
    """Three classes with ``train`` and ``test`` JPEGs each, all different in size or content."""
    number = 0
    for split, count in (("train", train), ("test", test)):
        for name in ("ant", "bee", "cow"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                (folder / f"{n:03d}.jpg").write_bytes(jpeg(number, 8 + n, 10 + 2 * n))
                number += 1
    return root


def pack(folder: Path, archive: Path, leading: str = "") -> Path:
    """The folder as an archive; ``leading`` is put before each name."""
    mode = "w:gz" if archive.name.endswith("gz") else "w"
    with tarfile.open(archive, mode) as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, f"{leading}{path.relative_to(folder)}", recursive=False)
    return archive


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones included, with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
