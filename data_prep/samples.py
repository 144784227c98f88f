"""Samples of finished shards, and pictures of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

SHEET_COLUMNS = 8
TILE = 112  # pixels
_CAPTION = 14  # pixels
_BACKGROUND, _INK = "white", "black"


class Sample(NamedTuple):
    """One sample of a shard: its image as stored, and its class id."""

    key: str
    extension: str
    image: bytes
    label: int


def read_samples(shard: Path) -> Iterator[Sample]:
    """The samples of a shard in order, one at a time.

    Raises ValueError where it is no shard of this project, or damaged.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                key, _, extension = member.name.partition(".")
                image = _content(tar, member)
                label = tar.next()
                if label is None or label.name != f"{key}.cls":
                    raise ValueError(f"{shard}: no label after {member.name}: run `reprise verify`")
                yield Sample(key, extension, image, int(_content(tar, label)))
    except tarfile.TarError as error:
        raise ValueError(f"{shard} cannot be read as a shard ({error}): give a .tar") from None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "a shard holds plain files only"
    return file.read()


def contact_sheet(pictures: Iterable[tuple[bytes, str]]) -> bytes:
    """A PNG of small squares, the middles of encoded images, each over its caption."""
    tiles = [_tile(data, caption) for data, caption in pictures]
    rows = -(-len(tiles) // SHEET_COLUMNS)
    columns = min(len(tiles), SHEET_COLUMNS)
    sheet = Image.new("RGB", (columns * TILE, rows * (TILE + _CAPTION)), _BACKGROUND)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, SHEET_COLUMNS)
        sheet.paste(tile, (column * TILE, row * (TILE + _CAPTION)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _tile(data: bytes, caption: str) -> Image.Image:
    tile = Image.new("RGB", (TILE, TILE + _CAPTION), _BACKGROUND)
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (TILE, TILE))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").resize(
            (TILE, TILE), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
        )
    tile.paste(square)
    # Pillow's own bitmap font: what it draws depends on no library and no file of the machine.
    font = ImageFont.load_default_imagefont()
    text = caption.encode("latin-1", "replace").decode("latin-1")
    while text and font.getlength(text) > TILE - 2:
        text = text[:-1]
    ImageDraw.Draw(tile).text((1, TILE + 1), text, _INK, font)
    return tile
