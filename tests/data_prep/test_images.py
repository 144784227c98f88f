"""Which images enter a set, as which bytes, and why others do not."""

import io
import math

import numpy as np
import pytest
from pictures import encoded, jpeg, lossless_jpeg, picture, png_of_size
from PIL import Image

from data_prep.images import (
    COUNTED_PIXELS,
    PIXEL_LIMIT,
    RejectedImageError,
    Treatment,
    check,
    counted_size,
    own_pixel_limit,
)

SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6  # orientation: turn by 90 degrees

KEPT = {
    "jpeg": (jpeg(1), "jpg"),
    "grey jpeg": (encoded(picture(1).convert("L")), "jpg"),
    "progressive jpeg": (encoded(picture(1), progressive=True), "jpg"),
    "rgb jpeg": (encoded(picture(1), keep_rgb=True), "jpg"),
    "jpeg with bytes after its end": (jpeg(1) + b"left over", "jpg"),
    "jpeg lying on its side": (encoded(picture(1), exif=SIDEWAYS), "jpg"),
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


STRAY = jpeg(1).replace(b"\xff\xc0", b"\x12\xff\xc0", 1)
WARNED = jpeg(1, 64, 64)[:-20] + bytes(5) + jpeg(1, 64, 64)[-20:]  # bytes too many in the scan
SAMPLED_441 = bytearray(jpeg(1, 64, 64, subsampling=0))
SAMPLED_441[SAMPLED_441.index(b"\xff\xc0") + 11] = 0x14  # the brightness four times as high
REENCODED = {
    "cmyk": encoded(picture(1).convert("CMYK")),
    "inverted cmyk": encoded(picture(1).convert("CMYK")).replace(b"Adobe", b"adobe"),
    "stray bytes": STRAY,
    "with a warning": WARNED,
    "colours sampled in a rare way": bytes(SAMPLED_441),
    # libjpeg-turbo writes over its buffer where it is to scale one: a crash, with luck.
    "lossless jpeg": lossless_jpeg(1024, 1024),
}


def everything():
    """All that can be in a set, by name."""
    kept = {name: data for name, (data, _) in KEPT.items()}
    return kept | {name: check(data).data for name, data in REENCODED.items()}


def by_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.parametrize("data", REENCODED.values(), ids=REENCODED.keys())
def test_jpegs_that_readers_decode_differently_are_stored_again(data):
    image = check(data)
    assert image.reencoded
    assert image.extension == "jpg"
    stored = Image.open(io.BytesIO(image.data))
    grey = Image.open(io.BytesIO(data)).mode == "L"
    assert (stored.format, stored.mode) == ("JPEG", "L" if grey else "RGB")
    assert np.abs(by_pillow(image.data) - by_pillow(data)).mean() < 3
    assert check(data, counted=0).data == image.data
    again = check(image.data)
    assert (again.data, again.reencoded) == (image.data, False)
    np.testing.assert_array_equal(again.histogram, image.histogram)


def test_every_reader_decodes_what_is_in_a_set_alike():
    from nvidia.dali import fn, pipeline_def, types
    from torch import frombuffer, uint8
    from torchvision.io import ImageReadMode, decode_image

    images = everything()

    @pipeline_def(batch_size=len(images), num_threads=1, device_id=None)
    def decode():
        files = [np.frombuffer(data, np.uint8) for data in images.values()]
        encoded = fn.external_source(source=[files], dtype=types.UINT8)
        # As pipeline.data decodes.
        return fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)

    pipe = decode()
    pipe.build()
    (decoded,) = pipe.run()
    for n, (name, data) in enumerate(images.items()):
        expected = by_pillow(data)
        # Two JPEG libraries may round the inverse cosine transform apart.
        tolerance = 0 if "png" in name else 2
        assert np.abs(np.asarray(decoded.at(n)) - expected).max() <= tolerance, name
        tensor = decode_image(frombuffer(bytearray(data), dtype=uint8), ImageReadMode.RGB)
        assert np.abs(tensor.permute(1, 2, 0).numpy() - expected).max() <= tolerance, name


def test_large_images_are_resized_to_their_shorter_side():
    treatment = Treatment(resize_short=32, quality=90)
    for mode in ("RGB", "L"):
        original = picture(1, 90, 60).convert(mode)
        image = check(encoded(original, quality=98), treatment)
        assert (image.height, image.width, image.reencoded) == (48, 32, True)
        stored = Image.open(io.BytesIO(image.data))
        assert (stored.format, stored.mode, stored.size) == ("JPEG", mode, (32, 48))
        expected = original.resize((32, 48), Image.Resampling.BILINEAR).convert("RGB")
        assert np.abs(by_pillow(image.data) - np.asarray(expected).astype(int)).mean() < 3
        np.testing.assert_array_equal(image.histogram, check(image.data).histogram)
    larger = len(check(encoded(picture(1, 90, 60)), Treatment(resize_short=32, quality=100)).data)
    assert larger > len(image.data)


@pytest.mark.parametrize("data", [jpeg(1, 32, 40), encoded(picture(1, 40, 32), "PNG")])
def test_small_images_are_not_resized(data):
    image = check(data, Treatment(resize_short=32))
    assert (image.data, image.reencoded) == (data, False)


def test_trusted_jpegs_are_not_decoded_and_their_headers_are_read():
    trust = Treatment(trust=True)
    cut = jpeg(1, 64, 48)[:-100]
    image = check(cut, trust, counted=0)
    assert (image.data, image.height, image.width) == (cut, 64, 48)
    assert image.histogram is None
    counted = check(jpeg(1), trust).histogram
    np.testing.assert_array_equal(counted, check(jpeg(1)).histogram)
    assert check(REENCODED["cmyk"], trust, counted=0).reencoded
    with own_pixel_limit(), pytest.raises(RejectedImageError, match="cannot be decoded"):
        check(encoded(picture(1), "PNG")[:-60], trust, counted=0)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_damage_is_found_without_the_pixels_too(progressive, subsampling):
    """Wherever a bit is flipped or the file cut, with the same verdict as with them."""
    data = jpeg(1, 40, 56, progressive=progressive, subsampling=subsampling)
    damaged = [data[:size] for size in range(2, len(data), 7)]
    for position in range(2, len(data), 3):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        damaged.append(bytes(changed))
    verdicts = [verdict(piece, counted=math.inf) for piece in damaged]
    assert [verdict(piece, counted=0) for piece in damaged] == verdicts
    assert len({said[:4] for said in verdicts}) == 3  # kept, stored again, refused


def verdict(data, counted):
    try:
        image = check(data, counted=counted)
    except RejectedImageError as reason:
        return f"no: {reason}"
    return f"{'new' if image.reencoded else 'kept'}: {image.height}x{image.width}"


@pytest.mark.parametrize(
    ("treatment", "first", "small"),
    [(Treatment(), 256, True), (Treatment(trust=True), 16, False),
     (Treatment(resize_short=32), 16, False)],
)  # fmt: skip
def test_the_first_images_of_a_shard_and_small_ones_are_counted(treatment, first, small):
    images = {"jpeg": jpeg(1, 200, 100), "png": encoded(picture(1, 200, 100), "PNG")}
    for data in (*images.values(), jpeg(1, 32, 40)):
        for position in (0, first - 1, first, 9999):
            image = check(data, treatment, counted_size(treatment, position))
            is_small = small and image.height == 32
            assert (image.histogram is not None) == (position < first or is_small)
            assert verify_counts_the_same(image, treatment, position)


def verify_counts_the_same(image, treatment, position):
    """Whoever reads the stored image again."""
    again = check(image.data, counted=counted_size(treatment, position)).histogram
    return np.array_equal(again, image.histogram)


@pytest.mark.parametrize("size", [(1, 40_000), (2, 20_000), (40_000, 1)])
def test_long_strips_are_counted_too(size):
    histogram = check(encoded(picture(1, *size), "PNG")).histogram
    assert sum(histogram) >= 3 * COUNTED_PIXELS / 2


def test_some_rows_of_large_images_stand_for_their_pixels():
    image = picture(3, 700, 900)
    counted = np.array(check(encoded(image, "PNG")).histogram).reshape(3, 256)
    pixels = counted.sum(axis=1)
    assert (pixels == pixels[0]).all()
    assert COUNTED_PIXELS / 2 <= pixels[0] <= 2 * COUNTED_PIXELS
    means = (counted * np.arange(256)).sum(axis=1) / pixels
    np.testing.assert_allclose(means, np.asarray(image).mean(axis=(0, 1)), rtol=0.02)


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


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"a few words", "not a JPEG, PNG, BMP, PPM or GIF"),
        (jpeg(1)[:-100], "cannot be decoded: OSError"),
        (encoded(picture(1), "PNG")[:-60], "cannot be decoded: "),
        (encoded(DEEP, "PNG"), "16 bits"),
        (encoded(picture(1), "GIF", save_all=True, append_images=[picture(2)]), "2 frames"),
        (encoded(picture(1), "PNG", save_all=True, append_images=[picture(2)]), "2 frames"),
        (encoded(picture(1), "WEBP"), "not a JPEG"),
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
