"""Which images enter a set, as which bytes, and why others do not."""

import io
import struct
import zlib

import numpy as np
import pytest
from pictures import encoded, jpeg, picture
from PIL import Image

from data_prep.images import PIXEL_LIMIT, RejectedImageError, check, own_pixel_limit


def png_of_size(width, height):
    """A PNG whose header promises more than its data holds."""

    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


KEPT = {
    "jpeg": (jpeg(1), "jpg"),
    "grey jpeg": (encoded(picture(1).convert("L")), "jpg"),
    "progressive jpeg": (encoded(picture(1), progressive=True), "jpg"),
    "rgb jpeg": (encoded(picture(1), keep_rgb=True), "jpg"),
    "png": (encoded(picture(1), "PNG"), "png"),
    "grey png": (encoded(picture(1).convert("L"), "PNG"), "png"),
    "bilevel png": (encoded(picture(1).convert("1"), "PNG"), "png"),
    "palette png": (encoded(picture(1).quantize(16), "PNG"), "png"),
    "transparent png": (encoded(picture(1).convert("RGBA"), "PNG"), "png"),
    "transparent grey png": (encoded(picture(1).convert("LA"), "PNG"), "png"),
}


@pytest.mark.parametrize(("data", "extension"), KEPT.values(), ids=KEPT.keys())
def test_jpeg_and_png_bytes_are_kept(data, extension):
    image = check(data)
    assert image.data == data
    assert image.extension == extension
    assert (image.height, image.width) == (12, 10)


def test_dali_decodes_what_is_kept_as_pillow_does():
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=len(KEPT), num_threads=1, device_id=None)
    def decode():
        files = [np.frombuffer(data, np.uint8) for data, _ in KEPT.values()]
        images = fn.external_source(source=[files], dtype=types.UINT8)
        return fn.decoders.image(images, output_type=types.RGB)

    pipe = decode()
    pipe.build()
    (decoded,) = pipe.run()
    for n, (name, (data, _)) in enumerate(KEPT.items()):
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        # Two JPEG libraries may round the inverse cosine transform apart.
        assert np.abs(np.asarray(decoded.at(n)) - expected).max() <= ("jpeg" in name) * 2, name


@pytest.mark.parametrize("kind", ["BMP", "PPM", "GIF"])
def test_other_lossless_images_become_png_with_the_same_pixels(kind):
    original = picture(2).quantize(8).convert("RGB")
    image = check(encoded(original, kind))
    assert image.extension == "png"
    stored = Image.open(io.BytesIO(image.data))
    assert stored.format == "PNG"
    np.testing.assert_array_equal(np.asarray(stored), np.asarray(original))


def test_histogram_is_that_of_the_rgb_pixels():
    image = Image.new("RGB", (3, 2), (10, 20, 30))
    image.putpixel((0, 0), (11, 20, 255))
    histogram = check(encoded(image, "PNG")).histogram
    expected = {10: 5, 11: 1, 256 + 20: 6, 512 + 30: 5, 512 + 255: 1}
    assert {n: count for n, count in enumerate(histogram) if count} == expected


def test_grey_counts_in_all_three_channels():
    histogram = check(encoded(Image.new("L", (4, 4), 7), "PNG")).histogram
    assert [n for n, count in enumerate(histogram) if count == 16] == [7, 256 + 7, 512 + 7]


DEEP = Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16))
STRAY = jpeg(1).replace(b"\xff\xc0", b"\x12\xff\xc0", 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"a few words", "not a JPEG, PNG, BMP, PPM or GIF"),
        (jpeg(1)[:-100], "cannot be decoded: OSError"),
        (encoded(picture(1), "PNG")[:-60], "cannot be decoded: "),
        (encoded(picture(1).convert("CMYK")), "JPEG in mode CMYK"),
        (encoded(DEEP, "PNG"), "16 bits"),
        (encoded(picture(1), "GIF", save_all=True, append_images=[picture(2)]), "2 frames"),
        (encoded(picture(1), "PNG", save_all=True, append_images=[picture(2)]), "2 frames"),
        (encoded(picture(1), "WEBP"), "not a JPEG"),
        (STRAY, "stray bytes at"),
        (png_of_size(12000, 12000), "12000x12000 pixels over the limit of 50 megapixels"),
        (png_of_size(60000, 60000), "over the limit of 50 megapixels"),
    ],
)
def test_the_rest_is_rejected_with_its_reason(data, reason):
    with own_pixel_limit(), pytest.raises(RejectedImageError, match=reason):
        check(data)


def test_the_reason_is_the_same_in_every_run():
    reasons = set()
    for _ in range(2):
        with pytest.raises(RejectedImageError) as caught:
            check(b"no image")
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "0x" not in reasons.pop()


def test_the_pixel_limit_is_exact():
    with own_pixel_limit():
        with pytest.raises(RejectedImageError, match="cannot be decoded"):
            check(png_of_size(PIXEL_LIMIT // 5000, 5000))
        with pytest.raises(RejectedImageError, match="over the limit"):
            check(png_of_size(PIXEL_LIMIT // 5000 + 1, 5000))
