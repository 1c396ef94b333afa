"""From an image file to the pixels a vision tower reads.

Numpy and Pillow only, and equal bit for bit to the PIL backend of Hugging Face's ``CLIPImageProcessor`` (mode
``crop``), ``LlavaImageProcessor`` with ``do_pad`` (mode ``pad``) and ``SiglipImageProcessor`` (mode ``resize``):
Pillow's own antialiased bicubic filter, 8-bit values between resizing and normalizing. Whatever the shape of an image,
memory beyond the decoded image stays bounded: where a resized or padded whole would be huge, only the needed part is
made.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gm_mlx.errors import UserError

ImageSource = str | Path | bytes | Image.Image
Mode = Literal["pad", "crop", "resize"]

MAX_PIXELS = 120_000_000  # decoded, Pillow takes 4 bytes for each; a larger header is taken for a decompression bomb
MAX_SIDE = 65_535  # JPEG's own limit

# Formats that Pillow decodes itself: its others include some that start programs (EPS) or are no pictures (PDF, MPEG).
FORMATS = (
    "JPEG",
    "PNG",
    "GIF",
    "WEBP",
    "BMP",
    "TIFF",
    "AVIF",
    "MPO",
    "PPM",
    "JPEG2000",
    "ICO",
    "TGA",
    "DIB",
    "PCX",
    "QOI",
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ImageConfig:
    """How an image becomes pixels.

    Attributes:
        size: Side of the square that the vision tower reads.
        mode: ``crop``: resize the shorter side to ``size`` and cut the middle out (CLIP). ``pad``: first make the image
            square with borders of the mean colour (LLaVA-1.5). ``resize``: stretch to the square (SigLIP).
        mean: Subtracted per channel, on a scale where white is 1.
        std: Divided by, per channel.
        exif: Turn photographs as their EXIF orientation says. Hugging Face's processors do not.
        scale_16bit: Map the full range of 16-bit grayscale images to black ... white. Hugging Face's processors (and
            Pillow) clip at 255 instead, which leaves most such images white; that is the default here too.
    """

    size: int
    mode: Mode
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    exif: bool = True
    scale_16bit: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise UserError(f"image: 'size' is {self.size!r}; it must be a whole number of pixels")
        if self.mode not in get_args(Mode):
            raise UserError(f"image: 'mode' is {self.mode!r}; it must be one of {', '.join(get_args(Mode))}")
        for key, values, low in (("mean", self.mean, 0.0), ("std", self.std, 1e-6)):
            if len(values) != 3 or not all(isinstance(value, int | float) and low <= value <= 1 for value in values):
                raise UserError(f"image: '{key}' is {values!r}; it must be three numbers between {low:g} and 1")
        for key, flag in (("exif", self.exif), ("scale_16bit", self.scale_16bit)):
            if not isinstance(flag, bool):
                raise UserError(f"image: '{key}' is {flag!r}; it must be true or false")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageConfig:
        """Builds a configuration from JSON values; missing, unknown or wrong ones are a ``UserError``."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f"image: unknown key '{key}'; known are {', '.join(known)}")
        for key in ("size", "mode", "mean", "std"):
            if key not in values:
                raise UserError(f"image: the key '{key}' is missing; convert the model again")
        for key in ("mean", "std"):
            if not isinstance(values[key], list | tuple):
                raise UserError(f"image: '{key}' is {values[key]!r}; it must be three numbers")
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


CLIP_336 = ImageConfig(336, "crop")
CLIP_336_PAD = ImageConfig(336, "pad")
SIGLIP_384 = ImageConfig(384, "resize", HALF, HALF)


def load_image(source: ImageSource, *, exif: bool = True, scale_16bit: bool = False) -> Image.Image:
    """Opens an image as RGB with 8 bits per channel, the whole of it or nothing.

    The conversion is Hugging Face's: transparent parts are laid on white; an animation gives its first frame. An image
    that this function returned comes back as it is.

    Args:
        source: A path, the content of an image file, or a PIL image.
        exif: Turn the image as its EXIF orientation says.
        scale_16bit: See ``ImageConfig``.

    Raises:
        UserError: The file is missing, empty, a folder, no image, damaged or cut short, or too large: more than
            ``MAX_PIXELS`` pixels or a side above ``MAX_SIDE``, which is seen in its header before anything is decoded.
    """
    with _opened(source) as (image, name):
        return _decode(image, name, exif, scale_16bit)


def image_size(source: ImageSource) -> tuple[int, int]:
    """Returns an image's width and height from its header, without decoding it.

    Raises:
        UserError: As for ``load_image``, but for damage behind the header.
    """
    with _opened(source) as (image, name):
        _check_size(image, name)
        return image.size


@contextmanager
def _opened(source: ImageSource) -> Iterator[tuple[Image.Image, str]]:
    """An image of which only the header is read, and what messages call it."""
    if isinstance(source, Image.Image):
        yield source, "image"
        return
    if isinstance(source, bytes):
        if not source:
            raise UserError("image data: 0 bytes; give the content of an image file")
        with _open(io.BytesIO(source), "image data") as image:
            yield image, "image data"
        return
    path = Path(os.path.expanduser(source))
    try:
        if path.is_dir():
            raise UserError(f"{source}: a folder, not an image; name a file in it")
        if not path.stat().st_size:
            raise UserError(f"{source}: the file is empty (0 bytes); copy or download it again")
        with path.open("rb") as file, _open(file, str(source)) as image:
            yield image, str(source)
    except FileNotFoundError as error:
        raise UserError(f"{source}: no such file; check the path") from error
    except (OSError, ValueError) as error:  # no permission, a name that no file can have
        raise UserError(f"{source}: cannot be opened ({error}); check the path and its permissions") from error


def _open(file: Any, name: str) -> Image.Image:
    """Reads an image's header."""
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is our line, not Pillow's
            return Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: {_TOO_LARGE}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image in a format known here; convert it to JPEG or PNG") from error
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        raise UserError(f"{name}: {_DAMAGED.format(error)}") from error


_TOO_LARGE = (
    f"the image has more than {MAX_PIXELS // 1_000_000} million pixels or a side above {MAX_SIDE}; scale it down"
)
_DAMAGED = "the image is damaged, cut short or of a rare kind ({}); copy it again or convert it to PNG"


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise UserError(f"{name}: {_TOO_LARGE} (it is {width}x{height})")
    if not width or not height:
        raise UserError(f"{name}: the image has no pixels ({width}x{height}); choose another")


def _decode(image: Image.Image, name: str, exif: bool, scale_16bit: bool) -> Image.Image:
    _check_size(image, name)
    try:
        image.load()
        if exif and image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if scale_16bit and image.mode.startswith("I"):
            levels = np.asarray(image).astype(np.float64) / 257  # 65535 / 255
            image = Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))
        image = _to_rgb(image)
        # The tags go: a reader further on would turn the image again, or after all.
        return Image.frombytes("RGB", image.size, image.tobytes()) if image.getexif() else image
    except Exception as error:  # as in _open
        raise UserError(f"{name}: {_DAMAGED.format(error)}") from error


_ORIENTATION = 0x0112


def _to_rgb(image: Image.Image) -> Image.Image:
    """``transformers.image_transforms.convert_to_rgb``."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def image_hash(image: Image.Image) -> str:
    """Returns a hash of an image's size and RGB pixels: the key under which its features may be cached."""
    digest = hashlib.blake2b(f"{image.width}x{image.height}:".encode(), digest_size=16)
    digest.update(image.tobytes() if image.mode == "RGB" else _to_rgb(image).tobytes())
    return digest.hexdigest()


def preprocess(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """Turns an RGB image into pixels for a vision tower.

    Args:
        image: An image from ``load_image``.
        config: The model's image configuration.

    Returns:
        float32 [size, size, 3], channels last as MLX's convolutions take them.
    """
    return normalize(square(image, config), config)


def normalize(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
    """Normalizes 8-bit pixels.

    Args:
        pixels: uint8 [..., 3], as ``square`` returns them.
        config: The model's image configuration.

    Returns:
        float32 of the same shape.
    """
    # There are 256 levels, so normalizing is a table. The order of operations and types is Hugging Face's.
    levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)[:, None]
    table = (levels - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)  # [256, 3]
    return table[pixels, np.arange(3)]


def square(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """Cuts, pads or stretches an RGB image to the square that a vision tower reads, before it is normalized.

    Returns:
        uint8 [size, size, 3].
    """
    return np.asarray(_FIT[config.mode](image, config))


def _stretch(image: Image.Image, config: ImageConfig) -> Image.Image:
    return image.resize((config.size, config.size), _BICUBIC)


_BICUBIC = Image.Resampling.BICUBIC
_STRIP = 256  # rows that are padded at a time


def _pad(image: Image.Image, config: ImageConfig) -> Image.Image:
    """LLaVA's ``expand2square`` and the resize after it, without making the square.

    Pillow resizes all rows of a square first and all columns then, so rows can be padded and resized strip by strip.
    """
    size, side = config.size, max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    colour = tuple(int(255 * value) for value in config.mean)
    border = Image.new("RGB", (side, 1), colour).resize((size, 1), _BICUBIC)
    narrow = border.resize((size, side), Image.Resampling.NEAREST)
    for y in range(0, image.height, _STRIP):
        rows = image.crop((0, y, image.width, min(y + _STRIP, image.height)))
        strip = Image.new("RGB", (side, rows.height), colour)
        strip.paste(rows, (left, 0))
        narrow.paste(strip.resize((size, rows.height), _BICUBIC), (0, top + y))
    return narrow.resize((size, size), _BICUBIC)


_LARGEST_RESIZED = 2**25  # pixels of a resized image before its middle is cut out


def _crop(image: Image.Image, config: ImageConfig) -> Image.Image:
    """CLIP: shorter side to ``size``, then the middle."""
    size = config.size
    short, long = min(image.size), max(image.size)
    new_long = int(size * long / short)
    start = (new_long - size) // 2
    if size > short and size * new_long > _LARGEST_RESIZED:  # scaled down, it is smaller than the image itself
        return _crop_window(image, size, new_long, start)
    if image.width <= image.height:
        return image.resize((size, new_long), _BICUBIC).crop((0, start, size, start + size))
    return image.resize((new_long, size), _BICUBIC).crop((start, 0, start + size, size))


def _crop_window(image: Image.Image, size: int, new_long: int, start: int) -> Image.Image:
    """``_crop`` for very long and thin images: of the enlarged image, only the part that stays is computed.

    Pillow enlarges rows first and columns then (only when it makes an image smaller, some versions swap the two).
    """
    if image.width <= image.height:
        first, weights = _bicubic_window(image.height, new_long, start, size)
        rows = image.crop((0, first, image.width, first + weights.shape[1])).resize((size, weights.shape[1]), _BICUBIC)
        return Image.fromarray(_filter(weights, np.asarray(rows)))
    first, weights = _bicubic_window(image.width, new_long, start, size)
    columns = np.asarray(image.crop((first, 0, first + weights.shape[1], image.height)))
    window = _filter(weights, columns.transpose(1, 0, 2)).transpose(1, 0, 2)  # [height, size, 3]
    return Image.fromarray(np.ascontiguousarray(window)).resize((size, size), _BICUBIC)


_PRECISION = 22  # bits after the point in Pillow's 8-bit filters


def _bicubic_window(old: int, new: int, start: int, count: int) -> tuple[int, np.ndarray]:
    """Pillow's bicubic weights (``Resample.c``) for ``count`` of the ``new`` outputs along an axis of ``old`` pixels.

    Returns:
        The first input pixel that is needed, and int64 weights [count, inputs from there].
    """
    scale = old / new
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    kernels: list[tuple[int, np.ndarray]] = []
    for out in range(start, start + count):
        centre = (out + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), old)
        x = np.abs((np.arange(high - low) + low - centre + 0.5) * (1.0 / stretch))
        near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        kernel = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        fixed = kernel / np.add.accumulate(kernel)[-1] * (1 << _PRECISION)  # summed one by one, as Pillow does
        kernels.append((low, np.trunc(fixed + np.copysign(0.5, fixed)).astype(np.int64)))
    first = kernels[0][0]
    weights = np.zeros((count, max(low + len(kernel) for low, kernel in kernels) - first), np.int64)
    for row, (low, kernel) in enumerate(kernels):
        weights[row, low - first : low - first + len(kernel)] = kernel
    return first, weights


def _filter(weights: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Applies fixed-point weights [out, in] to uint8 pixels [in, other, 3] as Pillow does; uint8 [out, other, 3]."""
    sums = np.tensordot(weights, pixels.astype(np.int64), axes=1) + (1 << (_PRECISION - 1))
    return np.clip(sums >> _PRECISION, 0, 255).astype(np.uint8)


_FIT = {"pad": _pad, "crop": _crop, "resize": _stretch}
