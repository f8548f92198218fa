"""The only place where bytes become pixels: limits, decoding, resizing.

Training, the export check and the service all call `to_pixels` with the same `PreprocessSpec`,
which travels in the bundle, so that a lesion is the same array everywhere.

JPEG goes through libjpeg-turbo (simplejpeg), everything else through Pillow, and both then
through Pillow's antialiased resize: the pixels are those of Pillow + torchvision, at a higher rate
(`benchmarks/loader.py`). The header is read and the limits are checked before anything is decoded.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lesionflow.errors import ImageError

Pixels = NDArray[np.uint8]

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""


@dataclass(frozen=True)
class PreprocessSpec:
    """From bytes to the network's input; stored in the bundle and used everywhere."""

    size: int = 128
    """Side of the square the crop is stretched to, pixels (32..1024)."""
    filter: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    """Antialiased resampling filter."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean of RGB in 0..1; the exported graph normalises, callers send uint8."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation of RGB in 0..1."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PreprocessSpec:
        mean, std = (tuple(float(v) for v in values[k]) for k in ("mean", "std"))
        return cls(int(values["size"]), values["filter"], mean, std)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Limits:
    """Bounds an image is held to before it is decoded."""

    bytes: int = 8 * 1024 * 1024
    """Encoded size; a crop is about 3 KB, a phone photo a few MB."""
    pixels: int = 25_000_000
    """Width x height."""
    side: int = 8192
    """Longest side, pixels."""
    min_side: int = 8
    """Shortest side that can still be judged, pixels."""
    scans: int = 64
    """Scans of a progressive JPEG (a normal one has about ten; thousands are a decoding bomb)."""


@dataclass(frozen=True)
class ImageInfo:
    """What the header says; nothing has been decoded yet."""

    format: Literal["jpeg", "png"]
    width: int
    height: int
    channels: int
    """Colour components: 1 grey, 3 colour, 4 CMYK (JPEG) or with alpha (PNG)."""
    bits: int
    """Bits per sample."""
    scans: int = 1
    orientation: int = 1
    """EXIF orientation, 1 = upright."""


DEFAULT_LIMITS = Limits()


def inspect(data: bytes) -> ImageInfo:
    """Read an image's header. Raises `ImageError` for anything that is neither JPEG nor PNG."""
    if data[:2] == b"\xff\xd8":
        return _inspect_jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 33 and data[12:16] == b"IHDR":
        width, height, bits, color = struct.unpack(">IIBB", data[16:26])
        channels = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}.get(color, 0)
        return ImageInfo("png", width, height, channels, bits)
    if not data:
        raise ImageError("empty image (0 bytes): restore the file")
    raise ImageError("neither JPEG nor PNG: convert the image to one of them")


def _inspect_jpeg(data: bytes) -> ImageInfo:
    """Walk the markers: frame size, components, scans and EXIF orientation, without decoding."""
    at, frame, scans, orientation = 2, None, 0, 1
    end = len(data)
    while at + 4 <= end:
        if data[at] != 0xFF:
            # Inside entropy-coded data: the next marker is an FF that is neither stuffed nor a restart.
            at = data.find(b"\xff", at)
            if at < 0:
                break
            if at + 1 < end and (data[at + 1] == 0 or 0xD0 <= data[at + 1] <= 0xD7):
                at += 2
            continue
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker == 0xD9:
            break
        if marker == 0 or marker == 0x01 or 0xD0 <= marker <= 0xD8:
            at += 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and at + 10 <= end:
            bits, height, width, channels = struct.unpack(">BHHB", data[at + 4 : at + 10])
            frame = (width, height, channels, bits, marker in (0xC2, 0xC6, 0xCA, 0xCE))
        elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[at + 10 : at + 2 + length])
        elif marker == 0xDA:
            scans += 1
            if frame and not frame[4]:
                break  # A baseline image's one scan: its data need not be walked.
        at += 2 + length
    if frame is None:
        raise ImageError("JPEG without a frame header: truncated or damaged, restore the file")
    return ImageInfo("jpeg", *frame[:4], scans=max(scans, 1), orientation=orientation)


def _exif_orientation(exif: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        if order is None:
            return 1
        (at,) = struct.unpack(order + "I", exif[4:8])
        (count,) = struct.unpack(order + "H", exif[at : at + 2])
        for entry in range(at + 2, at + 2 + 12 * min(count, 64), 12):
            tag, _, _, value = struct.unpack(order + "HHIH", exif[entry : entry + 10])
            if tag == 0x0112:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def check_limits(info: ImageInfo, size_bytes: int, limits: Limits = DEFAULT_LIMITS) -> None:
    """Raise `ImageError` naming the first limit that the image breaks."""
    for limit, value, bound, unit in (
        ("bytes", size_bytes, limits.bytes, "bytes"),
        ("side", max(info.width, info.height), limits.side, "pixels on its longest side"),
        ("pixels", info.width * info.height, limits.pixels, "pixels"),
        ("scans", info.scans, limits.scans, "progressive scans"),
    ):
        if value > bound:
            raise ImageError(f"image has {value:,} {unit}, the limit is {bound:,}: send a smaller crop", limit=limit)
    if min(info.width, info.height) < limits.min_side:
        raise ImageError(
            f"image is {info.width}x{info.height} pixels, the least is {limits.min_side} a side: send the whole crop",
            limit="min_side",
        )


def decode(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Pixels:
    """Decode JPEG or PNG bytes to upright RGB, uint8 [H, W, 3].

    Grey, CMYK, palette, alpha and EXIF-rotated images come out as upright RGB; 16-bit PNGs are
    scaled to 8 bits. Raises `ImageError` on broken limits and on truncated or damaged data.
    """
    info = inspect(data)
    check_limits(info, len(data), limits)
    try:
        if info.format == "jpeg" and info.channels in (1, 3) and info.bits == 8 and info.orientation == 1:
            return simplejpeg.decode_jpeg(data, strict=True)  # type: ignore[no-any-return]
        return _decode_slowly(data, info)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises anything from OSError to KeyError on damaged files.
        # Its text for what it can't identify holds an address of this process.
        why = "can't be identified" if isinstance(error, UnidentifiedImageError) else error
        raise ImageError(f"damaged {info.format.upper()} data ({why}): restore the file") from None


def _decode_slowly(data: bytes, info: ImageInfo) -> Pixels:
    with Image.open(io.BytesIO(data), formats=(info.format,)) as file:
        file.load()
        # Of the EXIF the orientation alone is read: Pillow's own transposition writes the rest anew, and fails on it.
        exif = file.info.get("exif", b"") if info.format == "png" else b""
        turn = _UPRIGHT.get(_exif_orientation(exif.removeprefix(b"Exif\0\0")) if exif else info.orientation)
        image: Image.Image = file if turn is None else file.transpose(turn)
        if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip it.
            grey = (np.asarray(image, dtype=np.float64) / 257.0).round().clip(0, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
            canvas.alpha_composite(image)
            image = canvas
        return np.array(image.convert("RGB"), dtype=np.uint8)


def resize(pixels: Pixels, spec: PreprocessSpec) -> Pixels:
    """Stretch contiguous uint8 [H, W, 3] to uint8 [size, size, 3] with the specification's filter."""
    height, width = pixels.shape[:2]
    if (height, width) == (spec.size, spec.size):
        return pixels
    # What Pillow's and numpy's conversions do, without the questions they ask first.
    image = Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
    small = image.resize((spec.size, spec.size), _FILTERS[spec.filter])
    return np.frombuffer(small.tobytes(), np.uint8).reshape(spec.size, spec.size, 3)


def to_pixels(data: bytes, spec: PreprocessSpec, limits: Limits = DEFAULT_LIMITS) -> Pixels:
    """Encoded bytes to the network's input, uint8 [size, size, 3]. Raises `ImageError`."""
    return resize(decode(data, limits), spec)


def to_batch(images: Sequence[bytes], spec: PreprocessSpec, limits: Limits = DEFAULT_LIMITS) -> Pixels:
    """Encoded images to one uint8 [B, size, size, 3] array. Raises `ImageError`."""
    batch = np.empty((len(images), spec.size, spec.size, 3), dtype=np.uint8)
    for row, data in enumerate(images):
        batch[row] = to_pixels(data, spec, limits)
    return batch
