"""One image: may it enter a set, and as which bytes."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

PIXEL_LIMIT = 50_000_000
"""Checked in the header, before decoding: a 140 KB file can hold 144 megapixels."""
BYTE_LIMIT = 256 * 2**20
"""Larger files are not even read: no image within the pixel limit needs them."""

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}
_REENCODED = ("BMP", "PPM", "GIF")
_FORMATS = ("JPEG", "PNG", *_REENCODED)
_MARKER = 0xFF
_START_OF_SCAN = 0xDA
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class RejectedImageError(Exception):
    """The image stays out of the set; the message is the reason, equal in every run."""


@dataclass(frozen=True)
class CheckedImage:
    """An accepted image: the bytes to store, and what the manifest wants to know of its pixels.

    ``histogram`` counts the values of its RGB pixels: 256 numbers each for red, green and blue.
    """

    data: bytes
    extension: str
    height: int
    width: int
    histogram: list[int]


@contextmanager
def own_pixel_limit() -> Iterator[None]:
    """Silence Pillow's warning on large images while this module's own, lower limit decides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def check(data: bytes) -> CheckedImage:
    """Decode ``data`` once and say what to store of it.

    JPEG and PNG bytes are kept as they are, whatever the file was called; BMP, PPM and GIF of one
    frame become PNG. Images that DALI and Pillow decode differently (CMYK, 16 bits) are refused,
    because the two readers would train on different pixels. Raises RejectedImageError.
    """
    if not data:
        raise RejectedImageError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise RejectedImageError(_too_large(f"{image.width}x{image.height} pixels"))
            return _decoded(image, data)
    except UnidentifiedImageError:
        raise RejectedImageError(f"not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}") from None
    except Image.DecompressionBombError:
        raise RejectedImageError(_too_large("size")) from None
    except (RejectedImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever the damage leads them to
        reason = _ADDRESS.sub("", f"{type(error).__name__}: {error}")
        raise RejectedImageError(f"cannot be decoded: {reason}") from None


def encode_png(image: Image.Image) -> bytes:
    """The image as PNG, without loss and without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _decoded(image: Image.Image, data: bytes) -> CheckedImage:
    name = image.format or ""
    frames = getattr(image, "n_frames", 1)
    image.load()
    if name in _REENCODED:
        if frames > 1:
            raise RejectedImageError(f"{name} with {frames} frames: store one image per file")
        if image.mode not in ("1", "L", "P", "RGB") or "transparency" in image.info:
            raise RejectedImageError(
                f"{name} in mode {image.mode} cannot be stored as 8-bit PNG without loss"
            )
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
        data = encode_png(image)
    elif name == "PNG":
        _refuse_png(data, frames)
    else:
        _refuse_jpeg(image, data)
    pixels = image.convert("RGB")
    return CheckedImage(
        data=data,
        extension=_EXTENSIONS.get(name, "png"),
        height=pixels.height,
        width=pixels.width,
        histogram=pixels.histogram(),
    )


def _refuse_jpeg(image: Image.Image, data: bytes) -> None:
    if image.mode not in ("L", "RGB"):
        raise RejectedImageError(f"JPEG in mode {image.mode}, which readers decode differently")
    position = 2
    while data[position] == _MARKER:
        while data[position] == _MARKER:  # any number of them may stand before a marker's code
            position += 1
        if data[position] == _START_OF_SCAN:
            return
        position += 1 + int.from_bytes(data[position + 1 : position + 3], "big")
    raise RejectedImageError(
        f"JPEG with stray bytes at {position}, which Pillow skips and DALI stops at"
    )


def _too_large(size: str) -> str:
    return f"{size} over the limit of {PIXEL_LIMIT // 10**6} megapixels"


def _refuse_png(data: bytes, frames: int) -> None:
    bits = data[24]  # of the IHDR chunk; Pillow's mode does not tell 16-bit colour from 8-bit
    if bits == 16:
        raise RejectedImageError("PNG with 16 bits per channel, which readers decode differently")
    if frames > 1:
        raise RejectedImageError(f"PNG with {frames} frames: store one image per file")
