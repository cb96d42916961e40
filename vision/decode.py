"""Opening pictures: whatever a caller hands over becomes an RGB Pillow image.

The published processor calls ``Image.convert("RGB")`` and nothing more. This module keeps its result where that
is right (alpha is dropped, not blended) and states the rest:

=====================  =====================================================================================
EXIF orientation       applied: the picture is turned as a viewer would show it
alpha                  dropped, the colours under it stay as stored (RGBA, LA, PA)
palette                looked up; a transparent palette entry keeps its colour
greyscale, 1-bit       copied to three channels (a set bit is 255)
16 bits a channel      the high byte of each value (Pillow alone would clip grey values at 255)
CMYK, YCbCr, HSV       Pillow's conversion, without colour profiles
animated               the first frame (of a Pillow image: the frame it stands at)
=====================  =====================================================================================

Whatever cannot be read raises ``ValueError`` with the name of the source, in place of Pillow's many exceptions.
"""

import io
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "MPO", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "QOI")
"""Formats that are opened. Pillow knows more, among them EPS, which hands the file to Ghostscript."""

_UNBOUNDED = ("ICO", "JPEG2000")
"""Formats whose header does not tell what decoding takes: not opened where pixels are limited."""
_ORIENTATION_TAG = 0x0112
_OPENING = threading.Lock()
"""Filters of warnings belong to the process. Only headers are read under it; decoding comes after."""


class ImageTooLargeError(ValueError):
    """A picture of more pixels than may be decoded; nothing was decoded."""


@dataclass(frozen=True, kw_only=True)
class DecodingLimits:
    """What a loader of foreign files asks of ``open_image``.

    Attributes:
        max_pixels: more are refused before they are decoded; None leaves Pillow's limit alone (twice
            ``PIL.Image.MAX_IMAGE_PIXELS``, 179 million).
        jpeg_size: (width, height) below which a JPEG need not be decoded: where both its sides are at least twice,
            four or eight times as long, the decoder gives it at a half, a quarter or an eighth (by its own
            transform, in a fraction of the time), other pixels than a reduction of the whole picture gives. None
            decodes every pixel.
    """

    max_pixels: int | None = None
    jpeg_size: Callable[[int, int], tuple[int, int]] | None = None


NO_LIMITS = DecodingLimits()


def open_image(source: Any, limits: DecodingLimits = NO_LIMITS) -> Image.Image:
    """Opens a picture as RGB.

    Args:
        source: path (str or path object), bytes, a binary file object (read from where it stands), a Pillow image,
            or a uint8 array (H, W), (H, W, 1) grey, (H, W, 2) grey + alpha, (H, W, 3) RGB, (H, W, 4) RGBA.

        limits: for files; arrays and images in memory are taken as they are.

    Returns:
        A loaded RGB image; ``source`` itself where it is one already and needs no turning.

    Raises:
        ImageTooLargeError: a ValueError, if it has more pixels than allowed.
        ValueError: names the source, if it is missing, a folder, not a picture, truncated, empty, or of a type or
            dtype not listed above.
    """
    if isinstance(source, Image.Image):
        return _decoded(source, f"the given {type(source).__name__}")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_bytes(bytes(source), f"the given {len(source)} bytes", limits)
    if isinstance(source, str | os.PathLike):
        return _from_path(Path(source), limits)
    if hasattr(source, "read"):
        name = f"file object {getattr(source, 'name', type(source).__name__)!r}"
        try:
            content = source.read()
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
        if not isinstance(content, bytes):
            raise ValueError(f"{name} gives {type(content).__name__}, not bytes: open it in binary mode ('rb')")
        return _from_bytes(content, name, limits)
    raise ValueError(
        f"an image must be a path, bytes, a binary file object, a PIL image or a uint8 HWC array, "
        f"got {type(source).__module__}.{type(source).__qualname__}"
    )


def picture_size(file: Any) -> tuple[int, int]:
    """(width, height) as a viewer shows the picture, from its header alone.

    Args:
        file: binary file object that can seek.

    Raises:
        ImageTooLargeError: a ValueError, beyond twice ``PIL.Image.MAX_IMAGE_PIXELS``.
        ValueError: if it is no picture in a known format.
    """
    image = _opened(file, "a picture", DecodingLimits(max_pixels=2**62))
    if 0 in image.size:
        raise ValueError(f"a picture has size {image.size}: an image needs at least one pixel")
    try:
        # A PNG without this entry would be decoded to look for the tag behind its pixels.
        turned = image.format != "PNG" or "exif" in image.info
        orientation = image.getexif().get(_ORIENTATION_TAG, 1) if turned else 1
    except MemoryError:
        raise
    except Exception as error:  # damaged metadata; decoding says the same
        raise ValueError(f"a picture's metadata cannot be read: {error}") from error
    return image.size if orientation not in (5, 6, 7, 8) else (image.size[1], image.size[0])


def _from_path(path: Path, limits: DecodingLimits) -> Image.Image:
    shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:200]}..."
    name = f"image {shown!r}"
    if str(path).startswith(("http:/", "https:/", "data:")):
        raise ValueError(f"{name} is an address, and nothing is fetched here: give a path or the picture's bytes")
    if "\0" in str(path):
        raise ValueError(f"image {shown!r} is no path: it holds a null character")
    try:
        if path.is_dir():
            raise ValueError(f"{name} is a folder: give the path of one picture")
        if path.stat().st_size == 0:
            raise ValueError(f"{name} is an empty file: fetch or write it again")
        with path.open("rb") as file:
            return _decoded(_opened(file, name, limits), name)
    except FileNotFoundError as error:
        raise ValueError(f"{name} does not exist (working folder {os.getcwd()!r})") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from error


def _from_bytes(content: bytes, name: str, limits: DecodingLimits) -> Image.Image:
    if not content:
        raise ValueError(f"{name}: an image needs the bytes of a whole picture file, got none")
    return _decoded(_opened(io.BytesIO(content), name, limits), name)


def _from_array(array: np.ndarray) -> Image.Image:
    name = f"array of shape {array.shape}, dtype {array.dtype}"
    if array.dtype != np.uint8:
        raise ValueError(f"an image array must be uint8, got an {name}: scale it to 0..255 and cast it")
    if array.ndim == 3 and array.shape[2] in (1, 2):
        array = array[:, :, 0]
    elif array.ndim == 3 and array.shape[2] == 4:
        array = array[:, :, :3]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        raise ValueError(
            f"an image array must be (H, W) or (H, W, C) with 1 to 4 channels last, got an {name}: "
            "move the channels to the end, and give images one by one"
        )
    if 0 in array.shape:
        raise ValueError(f"an image needs at least one pixel, got an {name}")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _opened(file: Any, name: str, limits: DecodingLimits = NO_LIMITS) -> Image.Image:
    Image.init()
    formats = [known for known in FORMATS if known in Image.OPEN and not (limits.max_pixels and known in _UNBOUNDED)]
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"{name} is too large to be opened safely: {error}. Shrink it first, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # parsers of broken files raise whatever the bytes make of them
        raise ValueError(f"{name} is not a picture in a known format ({', '.join(formats)}): {error}") from error
    if limits.max_pixels is not None and image.width * image.height > limits.max_pixels:
        raise ImageTooLargeError(f"{name} has {image.width}x{image.height} pixels, more than {limits.max_pixels}")
    if limits.jpeg_size is not None and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        width, height = limits.jpeg_size(image.width, image.height)
        image.draft(None, (2 * width, 2 * height))
    return image


def _decoded(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"{name} has size {image.size}: an image needs at least one pixel")
    try:
        image.load()
        # after load(): the TIFF reader applies the orientation itself and drops the tag
        if image.getexif().get(_ORIENTATION_TAG, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return _rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders of broken files raise whatever the bytes make of them
        raise ValueError(f"{name} cannot be decoded ({error}): it is truncated, damaged or unsupported") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray(_high_bytes(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating point pixels have no stated range; convert the picture to 8 bits first")
    if image.mode in ("P", "PA", "RGBa"):
        # by way of RGBA: a direct conversion of a palette warns about its transparency and carries it over
        image = image.convert("RGBA")
    elif image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGB")


def _high_bytes(values: np.ndarray) -> np.ndarray:
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > 0xFFFF:
        raise ValueError(f"integer pixels must lie in 0..65535 (16 bits), got {lowest}..{highest}")
    return (values >> 8).astype(np.uint8)
