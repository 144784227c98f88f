"""One image: may it enter a set, and as which bytes."""

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

PIXEL_LIMIT = 50_000_000
"""Checked in the header, before decoding: a 140 KB file can hold 144 megapixels."""
BYTE_LIMIT = 256 * 2**20
"""Larger files are not even read: no image within the pixel limit needs them."""
REENCODED_QUALITY = 95
"""Of JPEGs that readers would decode differently, or with warnings, as they were found."""
COUNTED_PIXELS = 2**13
"""Of images of twice as many and more, every n-th row is counted, so that it is about so many."""
COUNTED_IMAGES = 256
"""So many at the start of each shard are counted, and after them only those that are small: the
pixels of an image are a third of what decoding it costs."""
COUNTED_TREATED = 16
"""The same where the stored images need not be decoded at all; none after them."""

_REENCODED = ("BMP", "PPM", "GIF")
_FORMATS = ("JPEG", "PNG", *_REENCODED)
_START_OF_JPEG = b"\xff\xd8"
_MARKER = 0xFF
_START_OF_SCAN = 0xDA
# Beside frames sequential and progressive in Huffman's code, two tables and an extension.
_RARE_FRAMES = {*range(0xC0, 0xD0)} - {0xC0, 0xC1, 0xC2} - {0xC4, 0xC8, 0xCC}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

Pixels = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
_CHANNEL_STARTS = np.array([0, 256, 512], np.uint16)


class RejectedImageError(Exception):
    """The image stays out of the set; the message is the reason, equal in every run."""


@dataclass(frozen=True)
class Treatment:
    """What is done to images. ``trust``: JPEGs with a good header are taken as they are, undecoded.

    ``resize_short``: larger images are scaled down until their shorter side has so many pixels, and
    stored as JPEG of ``quality``.
    """

    trust: bool = False
    resize_short: int | None = None
    quality: int = 90

    @property
    def settings(self) -> dict[str, Any]:
        """What a manifest says of it."""
        if self.resize_short is not None:
            return {"resize_short": self.resize_short, "quality": self.quality}
        return {"trust": True} if self.trust else {}

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Treatment":
        """From a manifest's settings."""
        return cls(**{key: settings[key] for key in cls().__dict__ if key in settings})


AS_FOUND = Treatment()


def counted_size(treatment: Treatment, position: int) -> float:
    """Of how many pixels an image may be to be counted, at ``position`` of a shard's samples."""
    if position < (COUNTED_TREATED if treatment.settings else COUNTED_IMAGES):
        return math.inf
    return 0 if treatment.settings else 2 * COUNTED_PIXELS


class CheckedImage(NamedTuple):
    """An accepted image: the bytes to store, and what the manifest wants to know of its pixels.

    ``histogram`` counts the values of its RGB pixels, 256 numbers each for red, green and blue; it
    is None where the image is not counted. ``reencoded``: the bytes are not those found.
    """

    data: bytes
    extension: str
    height: int
    width: int
    histogram: Counts | None
    reencoded: bool = False


@contextmanager
def own_pixel_limit() -> Iterator[None]:
    """Silence Pillow's warning on large images while this module's own, lower limit decides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def check(data: bytes, treatment: Treatment = AS_FOUND, counted: float = math.inf) -> CheckedImage:
    """Decode ``data`` once and say what to store of it.

    One policy for all that is odd: JPEG and PNG bytes are kept as they are, whatever the file was
    called, where every reader decodes them alike; that includes grey images, trailing bytes and
    orientation tags, which no reader follows. JPEGs that readers decode differently (CMYK, stray
    bytes before a marker) or only with a warning are stored again at quality 95. BMP, PPM and GIF
    of one frame become PNG. What cannot be decoded, PNG of 16 bits and files of several frames are
    refused.

    ``counted``: of how many pixels it may be for a histogram of them; those of a larger JPEG need
    not be computed. Raises RejectedImageError.
    """
    if not data:
        raise RejectedImageError("empty file")
    header = _plain_jpeg_header(data)
    short = treatment.resize_short
    if header is not None and short is None and header.height * header.width > counted:
        if treatment.trust or _is_sound(data):
            return CheckedImage(data, "jpg", header.height, header.width, None)
        header = None
    image = _kept_jpeg(data, header) or _checked_by_pillow(data)
    if short is not None and min(image.pixels.shape[:2]) > short:
        image = _encoded(_resized(image.pixels, short), treatment.quality, "420")
    height, width = image.pixels.shape[:2]
    statistics = height * width <= counted
    reencoded = image.data is not data
    if reencoded and image.extension == "jpg" and statistics:
        image = _kept_jpeg(image.data, _plain_jpeg_header(image.data)) or image
    histogram = _histogram(image.pixels) if statistics else None
    return CheckedImage(image.data, image.extension, height, width, histogram, reencoded)


def encode_png(image: Image.Image) -> bytes:
    """The image as PNG, without loss and without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class _Image(NamedTuple):
    """Bytes to store, and their pixels: (height, width) if grey, else (height, width, 3)."""

    data: bytes
    extension: str
    pixels: Pixels


class _JpegHeader(NamedTuple):
    height: int
    width: int
    grey: bool


def _plain_jpeg_header(data: bytes) -> _JpegHeader | None:
    """Of a JPEG that every reader decodes alike, if its data is good; None for all else."""
    if not data.startswith(_START_OF_JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        ordinary = _is_ordinary(data)
    except (ValueError, IndexError, KeyError):  # KeyError: colours sampled in a rare way
        return None
    if height * width > PIXEL_LIMIT:
        raise RejectedImageError(_too_large(f"{width}x{height} pixels"))
    if not ordinary or colours not in ("Gray", "YCbCr", "RGB"):
        return None
    return _JpegHeader(height, width, colours == "Gray")


def _is_ordinary(data: bytes) -> bool:
    """Whether segment follows segment up to a scan, and every reader knows the frame's kind.

    Pillow skips what stands between segments, and DALI stops at it. Lossless, hierarchical and
    arithmetic frames are beyond some readers; libjpeg-turbo writes over its buffer where it is to
    scale a lossless one.
    """
    position = 2
    while data[position] == _MARKER:
        code = data[position + 1]
        if code == _MARKER:  # any number of them may stand before a marker's code
            position += 1
        elif code == _START_OF_SCAN:
            return True
        elif code in _RARE_FRAMES:
            return False
        else:
            position += 2 + (data[position + 2] << 8 | data[position + 3])
    return False


def _is_sound(data: bytes) -> bool:
    """Whether a JPEG with a plain header can be decoded without a warning.

    Damage shows in the codes of the coefficients, and every one is read here, of colours too, since
    they stand among each other; only the arithmetic after them, a third of the time, is left out by
    asking for few pixels.
    """
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError:
        return False
    return True


def _kept_jpeg(data: bytes, header: _JpegHeader | None) -> _Image | None:
    """The bytes as they are, where they can be decoded without a warning."""
    if header is None:
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, "GRAY" if header.grey else "RGB", strict=True)
    except ValueError:
        return None
    return _Image(data, "jpg", pixels[..., 0] if header.grey else pixels)


def _encoded(pixels: Pixels, quality: int, chroma: str) -> _Image:
    """The pixels as JPEG; those in the result are still the given ones."""
    grey = pixels.ndim == 2
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels[..., None] if grey else pixels),
        quality=quality,
        colorspace="GRAY" if grey else "RGB",
        colorsubsampling="Gray" if grey else chroma,
        fastdct=False,
    )
    return _Image(data, "jpg", pixels)


def _resized(pixels: Pixels, short: int) -> Pixels:
    """By the antialiased linear filter of the readers; Pillow's is the same on every processor."""
    height, width = pixels.shape[:2]
    scale = short / min(height, width)
    size = max(short, round(width * scale)), max(short, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


def _histogram(pixels: Pixels) -> Counts:
    height, width = pixels.shape[:2]
    step = min(max(1, height * width // COUNTED_PIXELS), height)
    # From the middle of each step: skies are brighter than what is below them.
    rows = pixels[step // 2 :: step]
    if pixels.ndim == 2:
        return np.tile(np.bincount(rows.ravel(), minlength=256), 3)
    return np.bincount((rows + _CHANNEL_STARTS).ravel(), minlength=768)


def _checked_by_pillow(data: bytes) -> _Image:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise RejectedImageError(_too_large(f"{image.width}x{image.height} pixels"))
            return _decoded_by_pillow(image, data)
    except UnidentifiedImageError:
        raise RejectedImageError(f"not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}") from None
    except Image.DecompressionBombError:
        raise RejectedImageError(_too_large("size")) from None
    except (RejectedImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever the damage leads them to
        reason = _ADDRESS.sub("", f"{type(error).__name__}: {error}")
        raise RejectedImageError(f"cannot be decoded: {reason}") from None


def _decoded_by_pillow(image: Image.Image, data: bytes) -> _Image:
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
    pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    if name in ("JPEG", "MPO"):
        return _encoded(pixels, REENCODED_QUALITY, "444")
    return _Image(data, "png", pixels)


def _refuse_png(data: bytes, frames: int) -> None:
    bits = data[24]  # of the IHDR chunk; Pillow's mode does not tell 16-bit colour from 8-bit
    if bits == 16:
        raise RejectedImageError("PNG with 16 bits per channel, which readers decode differently")
    if frames > 1:
        raise RejectedImageError(f"PNG with {frames} frames: store one image per file")


def _too_large(size: str) -> str:
    return f"{size} over the limit of {PIXEL_LIMIT // 10**6} megapixels"
