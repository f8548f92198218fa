"""Bytes become the same pixels as Pillow's, within limits that are checked before decoding."""

from __future__ import annotations

import io
import struct
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from lesionflow.data import images
from lesionflow.data.images import (
    ImageInfo,
    Limits,
    PreprocessSpec,
    check_limits,
    decode,
    inspect,
    to_batch,
    to_pixels,
)
from lesionflow.errors import ImageError


def picture(width: int = 90, height: int = 70, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpeg_pixels_equal_pillows(progressive: bool, subsampling: int) -> None:
    data = encoded(picture(), progressive=progressive, subsampling=subsampling, quality=80)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_resized_pixels_equal_torchvisions() -> None:
    from torchvision import transforms

    data = encoded(picture(131, 99))
    theirs = transforms.Resize((64, 64))(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(to_pixels(data, PreprocessSpec(size=64)), np.asarray(theirs))


def test_real_images_equal_pillow(real_data) -> None:
    from lesionflow.data.source import open_source

    with open_source(real_data / "isic2024-images") as source:
        for _, data in source.images(source.ids[::150]):
            assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_grey_cmyk_palette_alpha_and_16_bit_become_rgb() -> None:
    image = picture()
    rgb = np.asarray(image).astype(int)
    grey = decode(encoded(image.convert("L")))
    assert grey.shape == (70, 90, 3)
    assert (grey[..., 0] == grey[..., 2]).all()
    assert np.abs(decode(encoded(image.convert("CMYK"), quality=95)).astype(int) - rgb).mean() < 4
    assert np.array_equal(decode(encoded(image, "PNG")), rgb)
    assert decode(encoded(image.convert("P"), "PNG")).shape == (70, 90, 3)
    clear = Image.new("RGBA", (20, 20), (10, 200, 30, 0))
    assert (decode(encoded(clear, "PNG")) == 255).all(), "transparent is white, as a page would show it"
    deep = Image.fromarray((np.arange(400, dtype=np.uint16) * 160).reshape(20, 20))
    eight = decode(encoded(deep, "PNG"))
    assert np.abs(eight[..., 0].astype(int) - np.arange(400).reshape(20, 20) * 160 / 257).max() <= 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), exif=exif, quality=95)
    assert inspect(data).orientation == orientation
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode(data), expected)


def test_header_tells_size_channels_and_scans() -> None:
    info = inspect(encoded(picture(), progressive=True))
    assert (info.format, info.width, info.height, info.channels, info.bits) == ("jpeg", 90, 70, 3, 8)
    assert info.scans > 5
    assert inspect(encoded(picture())).scans == 1
    assert inspect(encoded(picture(33, 44), "PNG")).width == 33


@pytest.mark.parametrize(
    ("info", "size", "limit"),
    [
        (ImageInfo("jpeg", 50_000, 20, 3, 8), 9, "side"),
        (ImageInfo("jpeg", 8000, 8000, 3, 8), 9, "pixels"),
        (ImageInfo("jpeg", 80, 80, 3, 8, scans=1000), 9, "scans"),
        (ImageInfo("jpeg", 80, 80, 3, 8), 10**8, "bytes"),
        (ImageInfo("jpeg", 80, 3, 3, 8), 9, "min_side"),
    ],
)
def test_limits_are_named(info: ImageInfo, size: int, limit: str) -> None:
    with pytest.raises(ImageError) as caught:
        check_limits(info, size)
    assert caught.value.limit == limit
    assert "crop" in str(caught.value)


def test_a_huge_image_is_refused_without_decoding() -> None:
    data = bytearray(encoded(picture()))
    at = data.find(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    started = time.perf_counter()
    with pytest.raises(ImageError, match="limit"):
        decode(bytes(data))
    assert time.perf_counter() - started < 0.02


@pytest.mark.parametrize("keep", [2, 10, 200, -400])
def test_truncated_images_are_refused(keep: int) -> None:
    data = encoded(picture(200, 200))
    with pytest.raises(ImageError):
        decode(data[:keep])


@pytest.mark.parametrize("data", [b"", b"GIF89a" + b"0" * 50, b"\xff\xd8", b"\x89PNG\r\n\x1a\n" + b"0" * 40])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode(data)


def test_damaged_bytes_raise_nothing_but_image_errors() -> None:
    rng = np.random.default_rng(0)
    samples = [encoded(picture()), encoded(picture(), progressive=True), encoded(picture(), "PNG")]
    refused = 0
    for number in range(600):
        data = bytearray(samples[number % 3])
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(0, 256)
        try:
            decode(bytes(data), Limits(pixels=1_000_000))
        except ImageError:
            refused += 1
    assert refused > 100


def test_a_batch_is_the_images_in_order() -> None:
    spec = PreprocessSpec(size=40)
    images = [encoded(picture(seed=n)) for n in range(3)]
    batch = to_batch(images, spec)
    assert batch.shape == (3, 40, 40, 3)
    assert all(np.array_equal(batch[n], to_pixels(images[n], spec)) for n in range(3))


def test_the_specification_survives_json() -> None:
    import json

    spec = PreprocessSpec(size=96, filter="bicubic", mean=(0.5, 0.4, 0.3))
    assert PreprocessSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def with_exif(tags: bytes, count: int) -> bytes:
    """A JPEG of 24 x 16 pixels whose EXIF has an orientation of 6 and `count - 1` more entries."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)).save(buffer, "JPEG")
    tiff = b"II*\0" + struct.pack("<IH", 8, count) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + tags
    segment = b"Exif\0\0" + tiff
    return b"\xff\xd8\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + buffer.getvalue()[2:]


def test_exif_that_makes_no_sense_never_breaks_more_than_its_image():
    rng, upright = np.random.default_rng(5), 0
    for _ in range(400):
        count = int(rng.integers(0, 6))
        tags = b"".join(
            struct.pack("<HHII", rng.choice([0x010F, 0x0132, 0x011A, 0x8769, 0x8825, rng.integers(1, 65535)]),
                        rng.integers(0, 14), rng.integers(0, 9), rng.integers(0, 2**32))
            for _ in range(count)
        )  # fmt: skip
        try:
            upright += images.decode(with_exif(tags, count + 1)).shape == (24, 16, 3)
        except ImageError as error:
            assert "damaged JPEG" in str(error)
    assert upright > 300, "of what can be seen nothing is lost"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_comes_out_upright_as_pillow_turns_it(kind, orientation):
    made = Image.fromarray(np.random.default_rng(1).integers(0, 255, (16, 24, 3), np.uint8))
    exif, buffer = made.getexif(), io.BytesIO()
    exif[0x0112] = orientation
    made.save(buffer, kind, exif=exif)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(buffer)))
    assert np.abs(images.decode(buffer.getvalue()).astype(int) - wanted).max() <= (0 if kind == "PNG" else 2)


def test_what_cannot_be_identified_tells_nothing_of_this_process():
    with pytest.raises(ImageError) as refused:
        images.decode(
            b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">IIBB", 20, 20, 8, 2) + b"\0" * 20
        )
    assert "0x" not in str(refused.value)
