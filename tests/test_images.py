"""Opening and preprocessing images, against Hugging Face's PIL processors bit for bit."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from gm_mlx import images
from gm_mlx.errors import UserError
from gm_mlx.images import (
    CLIP_336,
    CLIP_336_PAD,
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    SIGLIP_384,
    ImageConfig,
    image_hash,
    load_image,
    preprocess,
)

SIZES = [(1, 1), (2, 1), (1, 7), (31, 33), (64, 64), (97, 41), (41, 97), (640, 427), (427, 640), (335, 337), (300, 3)]
COLOUR_MODES = ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F", "PA"]


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A random image of any mode; deep modes use their whole range, palettes have a transparent entry."""
    rng = np.random.default_rng([seed, width, height])
    if mode in ("I", "I;16", "F"):
        dtype = {"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]
        return Image.fromarray(rng.integers(0, 65536, (height, width)).astype(dtype))
    rgba = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    if mode == "P":
        image = rgba.convert("RGB").quantize(7)
        image.info["transparency"] = 3
        return image
    return rgba.convert(mode) if mode in ("RGBA", "LA") else rgba.convert("RGB").convert(mode)


def hugging_face(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """The same pixels by transformers, channels last."""
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    siglip = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    llava = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    norm = {"image_mean": list(config.mean), "image_std": list(config.std)}
    edges = {"size": {"shortest_edge": config.size}, "crop_size": {"height": config.size, "width": config.size}}
    processor = {
        "crop": lambda: clip.CLIPImageProcessorPil(**edges, **norm),
        "pad": lambda: llava.LlavaImageProcessorPil(do_pad=True, **edges, **norm),
        "resize": lambda: siglip.SiglipImageProcessorPil(size={"height": config.size, "width": config.size}, **norm),
    }[config.mode]()
    return processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


def same(image: Image.Image, config: ImageConfig) -> None:
    ours = preprocess(load_image(image, exif=False), config)
    assert ours.shape == (config.size, config.size, 3) and ours.dtype == np.float32
    assert np.isfinite(ours).all()
    np.testing.assert_array_equal(ours, hugging_face(image, config))


@pytest.mark.parametrize("config", [CLIP_336, CLIP_336_PAD, SIGLIP_384], ids=["crop", "pad", "resize"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_pixels_equal_hugging_face(size: tuple[int, int], config: ImageConfig) -> None:
    same(noise(*size), config)


@pytest.mark.parametrize("mode", COLOUR_MODES)
def test_every_colour_mode_equals_hugging_face(mode: str) -> None:
    same(noise(53, 38, mode), ImageConfig(32, "crop"))


@pytest.mark.parametrize("mode", ["crop", "pad", "resize"])
@pytest.mark.parametrize("size", [(4000, 30), (30, 4000)])
def test_extreme_aspect_equals_hugging_face(size: tuple[int, int], mode: images.Mode) -> None:
    same(noise(*size), ImageConfig(64, mode))


@settings(max_examples=60, deadline=None)
@given(
    long=st.integers(1, 4000),
    short=st.integers(1, 30),
    upright=st.booleans(),
    colours=st.sampled_from(COLOUR_MODES),
    mode=st.sampled_from(["crop", "pad", "resize"]),
    size=st.sampled_from([1, 7, 16, 28]),
)
@example(long=4000, short=30, upright=False, colours="RGB", mode="pad", size=28)
@example(long=4000, short=1, upright=True, colours="1", mode="crop", size=28)
@example(long=1, short=1, upright=True, colours="RGBA", mode="resize", size=1)
def test_any_size_and_mode_equals_hugging_face(
    long: int, short: int, upright: bool, colours: str, mode: images.Mode, size: int
) -> None:
    width, height = (short, long) if upright else (long, short)
    same(noise(width, height, colours), ImageConfig(size, mode, *((HALF, HALF) if long % 2 else (CLIP_MEAN, CLIP_STD))))


@settings(max_examples=40, deadline=None)
@given(long=st.integers(30, 900), short=st.integers(1, 30), upright=st.booleans(), size=st.sampled_from([31, 40]))
def test_only_the_window_of_a_long_image_gives_the_same_pixels(long: int, short: int, upright: bool, size: int) -> None:
    image = noise(short, long) if upright else noise(long, short)
    config = ImageConfig(size, "crop")
    whole = preprocess(image, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_LARGEST_RESIZED", 0)
        np.testing.assert_array_equal(preprocess(image, config), whole)


def test_a_hair_of_an_image_needs_no_huge_intermediate(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    resize = Image.Image.resize

    def spy(image: Image.Image, size: tuple[int, int], *args: Any) -> Image.Image:
        made.append(size[0] * size[1])
        return resize(image, size, *args)

    monkeypatch.setattr(Image.Image, "resize", spy)
    cases: list[tuple[int, int, images.Mode]] = [(65535, 1, "crop"), (1, 65535, "crop"), (65535, 1, "pad")]
    for width, height, mode in [*cases, (1, 8000, "pad")]:
        assert np.isfinite(preprocess(noise(width, height), ImageConfig(336, mode))).all()
    assert max(made) <= images._LARGEST_RESIZED


def test_transparency_lies_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert np.asarray(load_image(image)).min() == 255


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *((mode, "PNG") for mode in ("L", "P", "RGBA", "LA", "1", "I;16")),
        *((mode, "JPEG") for mode in ("L", "RGB", "CMYK")),
        *((mode, "TIFF") for mode in ("CMYK", "F", "I;16")),
        *(("RGB", "BMP"), ("P", "GIF"), ("RGBA", "WEBP")),
    ],
)
def test_files_equal_hugging_face(tmp_path: Path, mode: str, kind: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(encoded(noise(37, 23, mode), kind))
    config = ImageConfig(24, "pad")
    ours = preprocess(load_image(path), config)
    with Image.open(path) as image:
        np.testing.assert_array_equal(ours, hugging_face(image, config))
    np.testing.assert_array_equal(ours, preprocess(load_image(path.read_bytes()), config))
    np.testing.assert_array_equal(ours, preprocess(load_image(str(path)), config))


def test_an_animation_gives_its_first_frame() -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    content = encoded(first, "GIF", save_all=True, append_images=[second], duration=10)
    assert np.asarray(load_image(content)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 64


def test_16_bit_clips_as_hugging_face_or_scales_on_request() -> None:
    ramp = Image.fromarray(np.array([[0, 100, 257, 32896, 65535]], np.uint16))
    assert np.asarray(load_image(ramp))[0, :, 0].tolist() == [0, 100, 255, 255, 255]
    scaled = np.asarray(load_image(encoded(ramp, "PNG"), scale_16bit=True))
    assert scaled[0].tolist() == [[level] * 3 for level in (0, 0, 1, 128, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = np.asarray(noise(6, 4))
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(turned)), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(content)), upright)
    np.testing.assert_array_equal(np.asarray(load_image(content, exif=False)), turned)
    again = load_image(load_image(content))
    np.testing.assert_array_equal(np.asarray(again), upright)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be this large and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


JPEG = encoded(noise(200, 150), "JPEG")
PNG = encoded(noise(60, 50), "PNG")
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
BAD_FILES = {
    "empty": (b"", "empty"),
    "text": (b"this is not a picture\n", "convert it to JPEG or PNG"),
    "jpeg half": (JPEG[: len(JPEG) // 2], "cut short"),
    "jpeg header": (JPEG[:40], "cut short"),
    "jpeg last bytes": (JPEG[:-200], "cut short"),
    "png half": (PNG[: len(PNG) // 2], "cut short"),
    "png damaged": (PNG[:60] + bytes(200) + PNG[260:], "damaged"),
    "bomb": (png_header(12000, 10001), "120 million pixels"),
    "bomb for Pillow": (png_header(60000, 60000), "120 million pixels"),
    "too long": (png_header(70000, 2), "65535"),
    "runs a program": (POSTSCRIPT, "convert it to JPEG or PNG"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_clear_line(tmp_path: Path, name: str) -> None:
    content, words = BAD_FILES[name]
    path = tmp_path / "holiday.jpg"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as caught:
            load_image(path)
        with pytest.raises(UserError):
            load_image(content)
    message = str(caught.value)
    assert words in message and "holiday.jpg" in message and "\n" not in message


def test_missing_files_folders_and_impossible_names(tmp_path: Path) -> None:
    for source, words in ((tmp_path / "no.png", "no such file"), (tmp_path, "a folder"), ("a\0b", "cannot be opened")):
        with pytest.raises(UserError, match=words):
            load_image(source)
    with pytest.raises(UserError, match="no pixels"):
        load_image(Image.new("RGB", (0, 5)))


def test_a_bomb_is_never_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError):
        load_image(png_header(12000, 10001))


def test_the_hash_follows_content_and_shape(tmp_path: Path) -> None:
    image = noise(6, 4)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image, "PNG"))
    first = image_hash(load_image(path))
    assert first == image_hash(image) == image_hash(load_image(encoded(image, "BMP")))
    assert first != image_hash(Image.frombytes("RGB", (4, 6), image.tobytes()))
    path.write_bytes(encoded(noise(6, 4, seed=1), "PNG"))
    assert first != image_hash(load_image(path))


def test_config_round_trip_and_refusals() -> None:
    config = ImageConfig(64, "pad", HALF, HALF, exif=False)
    assert ImageConfig.from_dict(config.to_dict()) == config
    good = config.to_dict()
    for change, words in (
        ({"sise": 3}, "unknown key 'sise'"),
        ({"mode": "squeeze"}, "'mode' is 'squeeze'"),
        ({"size": 0}, "'size' is 0"),
        ({"size": True}, "'size' is True"),
        ({"mean": [0.5]}, "'mean'"),
        ({"mean": 0.5}, "'mean'"),
        ({"std": [0.5, 0, 0.5]}, "'std'"),
        ({"exif": "no"}, "'exif'"),
    ):
        with pytest.raises(UserError, match=words):
            ImageConfig.from_dict({**good, **change})
    with pytest.raises(UserError, match="'size' is missing"):
        ImageConfig.from_dict({"mode": "pad"})


def test_result_carries_no_tags_that_could_turn_it_again() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(data, "JPEG", exif=exif)
    stored = load_image(data.getvalue(), exif=False)
    assert stored.size == (6, 4)
    assert load_image(stored).size == (6, 4)
    turned = load_image(data.getvalue())
    assert turned.size == (4, 6)
    assert load_image(turned).size == (4, 6)


def test_home_of_nobody_is_a_missing_file() -> None:
    with pytest.raises(UserError, match="no such file"):
        load_image("~nobody-by-this-name/photo.png")
