"""Decoding and preprocessing, compared to the image processors of Transformers on their Pillow backend."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from edgevlm.errors import ImageError, UnsupportedModelError
from edgevlm.images import MAX_PIXELS, ImageProcessor, TargetSize, image_digest, load_image

pytest.importorskip("transformers")
from transformers.image_utils import load_image as hf_load_image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

HUGGING_FACE = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
    "BlipImageProcessor": BlipImageProcessorPil,
    "IdeficsImageProcessor": IdeficsImageProcessorPil,
}

CLIP, LLAVA, SIGLIP, VIT, BLIP, IDEFICS = HUGGING_FACE
CLIP_72: dict[str, Any] = {"size": {"shortest_edge": 72}, "crop_size": {"height": 72, "width": 72}}
SMALL = {"size": {"shortest_edge": 40}, "crop_size": 40}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": (CLIP, {}),
    "clip-336": (CLIP, {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}),
    "clip-72": (CLIP, CLIP_72),
    "clip-old-numbers": (CLIP, {"size": 48, "crop_size": 48}),
    "clip-pairs": (CLIP, {"size": [40, 52], "crop_size": [33, 31]}),
    "clip-odd-crop": (CLIP, {"size": {"shortest_edge": 50}, "crop_size": {"height": 37, "width": 28}}),
    "clip-crop-pads": (CLIP, {"size": {"shortest_edge": 20}, "crop_size": {"height": 37, "width": 44}}),
    "clip-crop-pads-one-axis": (CLIP, {"size": {"height": 31, "width": 20}, "crop_size": {"height": 20, "width": 33}}),
    "clip-no-crop": (CLIP, {"size": {"shortest_edge": 31}, "do_center_crop": False}),
    "clip-no-resize": (CLIP, {"do_resize": False, "crop_size": 60}),
    "clip-square": (CLIP, {"size": 45, "default_to_square": True, "crop_size": 45}),
    "clip-edges": (CLIP, {"size": {"shortest_edge": 64, "longest_edge": 90}, "do_center_crop": False}),
    "clip-max": (CLIP, {"size": {"max_height": 240, "max_width": 900}, "do_center_crop": False}),
    "clip-no-normalise": (CLIP, {**SMALL, "do_normalize": False}),
    "clip-no-rescale": (CLIP, {**SMALL, "do_rescale": False}),
    "clip-plain": (CLIP, {**SMALL, "do_rescale": False, "do_normalize": False}),
    "clip-factor": (CLIP, {**SMALL, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0}),
    "clip-scalars": (CLIP, {**SMALL, "image_mean": 0.4, "image_std": 0.25}),
    "clip-nulls": (CLIP, {"size": 40, "default_to_square": None, **dict.fromkeys(["do_center_crop", "crop_size", "do_pad"])}),
    "clip-all-null": (CLIP, dict.fromkeys(["do_resize", "size", "resample", "do_center_crop", "do_normalize", "image_mean"])),
    "clip-batch-pad": (CLIP, {**SMALL, "do_pad": True}),
    **{f"clip-resample-{number}": (CLIP, {**SMALL, "resample": number}) for number in range(6)},
    "siglip": (SIGLIP, {}),
    "siglip-56": (SIGLIP, {"size": {"height": 56, "width": 56}}),
    "siglip-oblong": (SIGLIP, {"size": {"height": 30, "width": 56}, "resample": 2}),
    "siglip-old-number": (SIGLIP, {"size": 56}),
    "siglip-crop": (SIGLIP, {"size": {"height": 56, "width": 56}, "do_center_crop": True, "crop_size": 33}),
    "llava": (LLAVA, {**CLIP_72, "do_pad": True}),
    "llava-no-pad": (LLAVA, CLIP_72),
    "llava-pad-only": (LLAVA, {"do_pad": True, "do_resize": False, "do_center_crop": False}),
    "llava-pads-black": (LLAVA, {**CLIP_72, "do_pad": True, "do_normalize": False, "image_mean": None}),
    "llava-edges": (LLAVA, {"do_pad": True, "size": {"shortest_edge": 60, "longest_edge": 50}, "do_center_crop": False}),
    "vit": (VIT, {"size": 40}),
    "blip": (BLIP, {}),
    "blip-56": (BLIP, {"size": {"height": 56, "width": 56}}),
    "blip-oblong": (BLIP, {"size": [30, 56], "resample": 2}),
    "blip-old-number": (BLIP, {"size": 45}),
    "blip-edge": (BLIP, {"size": {"shortest_edge": 31}}),
    "blip-not-square": (BLIP, {"size": 31, "default_to_square": False}),
    "blip-crop": (BLIP, {"size": 40, "do_center_crop": True, "crop_size": 33}),
    "blip-plain": (BLIP, {"size": 40, "do_rescale": False, "do_normalize": False, "do_pad": True}),
    "blip-factor": (BLIP, {"size": 40, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": [1.0, 0.5, 2.0]}),
    "blip-nulls": (BLIP, {"size": 40, **dict.fromkeys(["do_center_crop", "crop_size", "do_pad", "do_rescale"])}),
    "idefics": (IDEFICS, {}),
    "idefics-published": (IDEFICS, {"image_size": 42, "image_num_channels": 3, "image_mean": [0.4, 0.5, 0.6]}),
    "idefics-size": (IDEFICS, {"size": {"height": 30, "width": 56}, "resample": 2}),
    "idefics-both": (IDEFICS, {"size": {"height": 224, "width": 224}, "image_size": 37}),
    "idefics-nulls": (IDEFICS, {"size": 40, **dict.fromkeys(["image_size", "image_num_channels", "do_normalize"])}),
    "idefics-plain": (IDEFICS, {"image_size": 40, "do_rescale": False, "do_normalize": False}),
    "idefics-factor": (IDEFICS, {"image_size": 40, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0}),
}

LARGE = {"clip", "clip-336", "siglip", "blip", "idefics"}

MODES = ["RGB", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "1", "YCbCr", "HSV", "LAB", "I;16", "I", "F"]

# width, height
SIZES = [(41, 33), (3, 500), (500, 3), (72, 72), (336, 336), (71, 73), (73, 72), (20, 31), (57, 56), (7, 9), (2, 2), (160, 120)]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise on a gradient, so that flips, shifts and other filters show."""
    random = np.random.default_rng(width * 1009 + height)
    ramp = np.linspace(0, 190, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    pixels = (ramp + random.integers(0, 26, (height, width, 4))).astype(np.uint8)
    if mode in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        return Image.fromarray((pixels[..., 0].astype(np.float64) * 2.4 - (60 if mode != "I;16" else 0)).astype(dtype))
    rgba = Image.fromarray(pixels)
    if mode == "PA":
        return rgba.convert("LA").convert("PA")
    return rgba.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "HSV", "LAB", "1") else rgba.convert(mode)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def hugging_face(kind: str, config: dict[str, Any], image: Image.Image) -> np.ndarray:
    done = HUGGING_FACE[kind](**config)(images=image, return_tensors="np")
    return (done if kind == IDEFICS else done["pixel_values"])[0]


def processor(kind: str, config: dict[str, Any]) -> ImageProcessor:
    return ImageProcessor.from_config({"image_processor_type": kind, **config})


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(ours, theirs.astype(np.float32))


# --- parity -----------------------------------------------------------------------------------------------------------


# Thin pictures are large ones after resizing; the small configurations cover them.
_PAIRS = [(name, *size) for name in CONFIGS for size in SIZES if name not in LARGE or max(size) <= 10 * min(size)]


@pytest.mark.parametrize(("name", "width", "height"), _PAIRS)
def test_pixel_values_equal_hugging_face(name: str, width: int, height: int) -> None:
    kind, config = CONFIGS[name]
    image = picture(width, height)
    ours = processor(kind, config)
    values = ours(load_image(image))
    assert_same(values, hugging_face(kind, config, image))
    assert values.shape == (3, *ours.output_size(height, width))
    assert ours.size in (None, values.shape[1:])


@pytest.mark.parametrize("kind", [CLIP, SIGLIP, LLAVA, BLIP, IDEFICS])
@pytest.mark.parametrize("mode", MODES)
def test_modes_equal_hugging_face(mode: str, kind: str) -> None:
    image = picture(43, 29, mode)
    assert image.mode == mode
    config = {"size": {"height": 20, "width": 24}, "do_center_crop": False}
    theirs = hugging_face(kind, config, image)
    assert_same(processor(kind, config)(load_image(image)), theirs)
    assert_same(processor(kind, config)(image), theirs)


def sixteen_bit() -> Image.Image:
    return Image.fromarray((np.arange(30 * 20).reshape(20, 30) * 109).astype(np.uint16))


FILES: dict[str, Callable[[], bytes]] = {
    "png-16-bit": lambda: encoded(sixteen_bit()),
    "tiff-16-bit": lambda: encoded(sixteen_bit(), "TIFF"),
    "tiff-32-bit": lambda: encoded(picture(30, 20, "I"), "TIFF"),
    "tiff-float": lambda: encoded(picture(30, 20, "F"), "TIFF"),
    "png-grey-transparent": lambda: encoded(picture(30, 20, "L"), transparency=100),
    "png-rgb-transparent": lambda: encoded(picture(30, 20), transparency=picture(30, 20).getpixel((3, 3))),
    "png-palette-transparent": lambda: encoded(picture(30, 20, "P"), transparency=bytes(range(256))),
    "png-bilevel": lambda: encoded(picture(30, 20, "1")),
    "png-rgba": lambda: encoded(picture(30, 20, "RGBA")),
    "jpeg-cmyk": lambda: encoded(picture(30, 20, "CMYK"), "JPEG"),
    "jpeg-grey": lambda: encoded(picture(30, 20, "L"), "JPEG"),
    "webp-rgba": lambda: encoded(picture(30, 20, "RGBA"), "WEBP"),
    "gif-transparent": lambda: encoded(picture(30, 20, "P"), "GIF", transparency=7),
    "gif-animated": lambda: encoded(
        picture(30, 20, "P"), "GIF", save_all=True, append_images=[picture(30, 20, "P").rotate(180)]
    ),
    "bmp": lambda: encoded(picture(30, 20), "BMP"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_equal_hugging_face(name: str, tmp_path: Path) -> None:
    data = FILES[name]()
    path = tmp_path / "picture"
    path.write_bytes(data)
    theirs = hugging_face(SIGLIP, {"size": 24}, Image.open(path))
    for source in (path, str(path), data, Image.open(path)):
        assert_same(processor(SIGLIP, {"size": 24})(load_image(source)), theirs)


def test_sixteen_bit_is_clipped_like_hugging_face() -> None:
    pixels = np.asarray(load_image(encoded(sixteen_bit())))
    np.testing.assert_array_equal(pixels[..., 0], np.minimum(np.asarray(sixteen_bit()), 255))


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert load_image(clear).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    path.write_bytes(encoded(picture(40, 24), "JPEG", exif=exif, quality=95))
    theirs = hf_load_image(str(path))
    assert theirs.size == ((24, 40) if orientation > 4 else (40, 24))
    for source in (path, path.read_bytes(), Image.open(path)):
        ours = load_image(source)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
        assert load_image(ours).tobytes() == ours.tobytes(), "turned twice"
    config = {"size": {"shortest_edge": 20}, "do_center_crop": False}
    assert_same(processor(CLIP, config)(load_image(path)), hugging_face(CLIP, config, theirs))


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from([name for name in CONFIGS if name not in LARGE]),
    width=st.integers(2, 90),
    height=st.integers(2, 90),
    mode=st.sampled_from(["RGB", "RGBA", "L", "P", "LA", "CMYK"]),
)
def test_any_picture_equals_hugging_face(name: str, width: int, height: int, mode: str) -> None:
    kind, config = CONFIGS[name]
    image = picture(width, height, mode)
    if kind == VIT:  # does not convert
        image = image.convert("RGB")
    assert_same(processor(kind, config)(load_image(image)), hugging_face(kind, config, image))


# --- reading the configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_own_configuration_of_hugging_face_is_the_default(kind: str) -> None:
    written = HUGGING_FACE[kind]().to_dict()
    assert ImageProcessor.from_config(written) == processor(kind, {})


@pytest.mark.parametrize("kind", [CLIP, BLIP, IDEFICS])
@pytest.mark.parametrize(
    ("key", "ending"),
    [
        ("image_processor_type", "ImageProcessorFast"),
        ("image_processor_type", "ImageProcessorPil"),
        ("feature_extractor_type", "FeatureExtractor"),
        ("feature_extractor_type", "ImageProcessor"),
    ],
)
def test_other_names_of_a_type(key: str, ending: str, kind: str) -> None:
    name = kind.replace("ImageProcessor", ending)
    assert ImageProcessor.from_config({key: name, "size": 72}) == processor(kind, {"size": 72})


@pytest.mark.parametrize("name", ["MllamaImageProcessor", "LlavaNextImageProcessor", "Siglip2ImageProcessorFast", None])
def test_unknown_type_is_refused(name: str | None) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{name or 'without image_processor_type'}.*CLIPImageProcessor, .*Llava"):
        ImageProcessor.from_config({"image_processor_type": name})


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"size": {"longest_edge": 90}}, "size = .*longest_edge.*shortest_edge"),
        ({"size": {"min_pixels": 9, "max_pixels": 90}}, "size = "),
        ({"size": {"height": 90}}, "size = "),
        ({"size": {"shortest_edge": 0}}, "positive"),
        ({"size": "large"}, "size = 'large'"),
        ({"size": [3]}, "size = "),
        ({"crop_size": {"shortest_edge": 5}}, "crop_size = .*height and width"),
        ({"size": None}, "size = None"),
        ({"resample": None}, "resample = None"),
        ({"rescale_factor": None}, "rescale_factor = None"),
        ({"image_mean": None}, "image_mean = None"),
        ({"resample": 6}, "resample = 6"),
        ({"resample": "bicubic"}, "resample = 'bicubic'"),
        ({"image_mean": [0.5, 0.5]}, "image_mean = "),
        ({"image_std": "x"}, "image_std = 'x'"),
        ({"image_std": [0.5, 0, 0.5]}, "divide by zero"),
        ({"rescale_factor": "1/255"}, "rescale_factor = "),
        ({"do_pad": True, "image_mean": [0, 2, 0]}, "cannot pad"),
        ({"pad_size": {"height": 9, "width": 9}}, "pad_size"),
        ({"use_square_size": True}, "use_square_size"),
    ],
)
def test_uncovered_options_are_refused(config: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        processor(LLAVA, config)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"image_size": "large"}, "size = .*'large'.*positive"),
        ({"image_size": [30, 40]}, "size = "),
        ({"image_size": 0}, "positive"),
        ({"image_num_channels": 1}, "image_num_channels = 1; needed: 3"),
    ],
)
def test_uncovered_options_of_idefics_are_refused(config: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        processor(IDEFICS, config)


def test_centre_crop_without_a_size_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="crop_size = None"):
        processor(SIGLIP, {"do_center_crop": True})


def test_size_is_known_where_it_does_not_depend_on_the_picture() -> None:
    assert processor(CLIP, CLIP_72).size == (72, 72)
    assert processor(SIGLIP, {"size": [30, 56]}).size == (30, 56)
    assert processor(BLIP, {}).size == (384, 384)
    assert processor(IDEFICS, {"image_size": 42}).size == (42, 42)
    assert processor(LLAVA, {"size": 72, "do_center_crop": False, "do_pad": True}).size == (72, 72)
    assert processor(CLIP, {"size": 72, "do_center_crop": False}).size is None
    assert processor(CLIP, {"size": 72, "do_center_crop": False}).resize == TargetSize(shortest_edge=72)


# --- what is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "channels"), [("L", ()), ("L", (1,)), ("RGB", (3,)), ("RGBA", (4,))])
def test_arrays(mode: str, channels: tuple[int, ...]) -> None:
    image = picture(9, 7, mode)
    array = np.asarray(image).reshape(7, 9, *channels)
    assert load_image(array).tobytes() == load_image(image).tobytes()
    assert load_image(array[::-1, ::2]).tobytes() == load_image(np.ascontiguousarray(array[::-1, ::2])).tobytes()


def test_result_is_independent_of_the_source() -> None:
    array = np.asarray(picture(9, 7)).copy()
    image = picture(9, 7)
    from_array, from_image = load_image(array), load_image(image)
    array[:] = 0
    image.paste((0, 0, 0), (0, 0, 9, 7))
    assert from_array.tobytes() == from_image.tobytes() == picture(9, 7).tobytes()


def test_digest_tells_content_apart(tmp_path: Path) -> None:
    image = picture(12, 8)
    image.save(tmp_path / "a.png")
    digest = image_digest(image)
    assert digest == image_digest(load_image(tmp_path / "a.png")) == image_digest(load_image(encoded(image, "BMP")))
    assert len(digest) == 64
    changed = image.copy()
    changed.putpixel((11, 7), (1, 2, 3))
    palette, other_palette = Image.new("P", (4, 4)), Image.new("P", (4, 4))
    palette.putpalette([1, 2, 3] * 256)
    other_palette.putpalette([3, 2, 1] * 256)
    flat, upright = Image.new("RGB", (8, 4)), Image.new("RGB", (4, 8))
    others = [changed, palette, other_palette, flat, upright, Image.new("L", (8, 4))]
    assert len({digest, *map(image_digest, others)}) == 7


def test_many_threads() -> None:
    data = [encoded(picture(40 + index, 30), "JPEG") for index in range(8)]
    clip = processor(CLIP, CLIP_72)
    expected = [clip(load_image(one)) for one in data]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda one: clip(load_image(one)), data * 2), expected * 2, strict=True):
            np.testing.assert_array_equal(found, wanted)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32.*uint8"),
        (np.zeros((4, 4, 3), np.uint16), "uint16"),
        (np.zeros((4, 4, 2), np.uint8), r"\[4, 4, 2\]"),
        (np.zeros((3, 8, 8), np.uint8), r"\[3, 8, 8\].*in this order"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\[1, 4, 4, 3\]"),
        (np.zeros(16, np.uint8), r"\[16\]"),
        (np.zeros((0, 4, 3), np.uint8), "4 x 0 pixels"),
        (np.zeros((4, 0), np.uint8), "0 x 4 pixels"),
        (np.zeros((1, 4, 3), np.uint8), "4 x 1 pixels.*at least 2"),
        (np.zeros((4, 1), np.uint8), "1 x 4 pixels.*at least 2"),
        (np.zeros((2, 401, 3), np.uint8), "401 x 2 pixels.*aspect ratio of 200.5.*at most 200"),
    ],
)
def test_arrays_that_are_refused(array: np.ndarray, match: str) -> None:
    with pytest.raises(ImageError, match=match):
        load_image(array)


@pytest.mark.parametrize("source", [None, [1, 2], 3, [picture(4, 4)], bytearray(b"x"), io.BytesIO()])
def test_other_types_are_refused(source: Any) -> None:
    with pytest.raises(ImageError, match=f"{type(source).__name__} is no picture; accepted: a path"):
        load_image(source)


def test_paths_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file") as caught:
        load_image(tmp_path / "missing.png")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(ImageError, match=r"no such file.*links are not followed"):
        load_image("https://example.org/cat.png")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(str(tmp_path))
    with pytest.raises(ImageError, match="cannot be read"):
        load_image("a\0b")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"text\.png' is no picture"):
        load_image(tmp_path / "text.png")


@pytest.mark.parametrize("data", [b"", b"GIF", b"hello" * 100, b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_picture(data: bytes) -> None:
    with pytest.raises(ImageError, match=f"in {len(data)} bytes"):
        load_image(data)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files_are_refused(form: str, tmp_path: Path) -> None:
    data = encoded(picture(64, 48), form)
    for length in (len(data) * share // 16 for share in range(16)):
        with pytest.raises(ImageError):
            load_image(data[:length])
    (tmp_path / "half").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError):
        load_image(tmp_path / "half")


def test_unread_truncated_pil_image_is_refused() -> None:
    data = encoded(picture(64, 48), "JPEG")
    for consumer in (load_image, image_digest, processor(CLIP, CLIP_72)):
        with pytest.raises(ImageError, match=r"PIL image 64 x 48 of mode RGB cannot be read.*truncated"):
            consumer(Image.open(io.BytesIO(data[:-40])))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises `width` x `height` pixels and has none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bombs_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Image.MAX_IMAGE_PIXELS

    def decoded(*_: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    with pytest.raises(ImageError, match="over Pillow's own limit") as caught:
        load_image(png_header(30_000, 30_000))
    assert isinstance(caught.value.__cause__, Image.DecompressionBombError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageError, match=f"10000 x 10000 = 100000000 pixels, accepted are at most {MAX_PIXELS}"):
            load_image(png_header(10_000, 10_000))
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="over Pillow's own limit") as caught:
            load_image(png_header(10_000, 10_000))
    assert isinstance(caught.value.__cause__, Image.DecompressionBombWarning)
    for source in (png_header(50, 41), Image.open(io.BytesIO(png_header(50, 41)))):
        with pytest.raises(ImageError, match="50 x 41 = 2050 pixels, accepted are at most 2049"):
            load_image(source, max_pixels=2049)
    assert limit == Image.MAX_IMAGE_PIXELS == MAX_PIXELS


def test_max_pixels_is_inclusive() -> None:
    assert load_image(picture(50, 41), max_pixels=2050).size == (50, 41)


@pytest.mark.parametrize("size", [(1, 1), (1, 10), (10, 1), (2, 401), (401, 2), (0, 4)])
def test_thin_pictures_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=r"at least 2 pixels a side|aspect ratio of 200\.5"):
        load_image(Image.new("RGB", size))


def test_aspect_ratio_limit_is_inclusive() -> None:
    assert load_image(Image.new("RGB", (400, 2))).size == (400, 2)


@pytest.mark.parametrize(
    ("kind", "config", "size", "match"),
    [
        (CLIP, {"size": 336, "crop_size": 336}, (1, 10_000), "resizing makes 336 x 3360000"),
        (LLAVA, {"do_pad": True}, (20_000, 2), "padding to a square makes 20000 x 20000"),
        (CLIP, {"crop_size": 20_000}, (4, 4), "cropping makes 20000 x 20000"),
        (CLIP, {"size": {"max_height": 20, "max_width": 20}}, (2, 400), "resizing leaves nothing"),
    ],
)
def test_steps_that_would_explode_are_refused(kind: str, config: dict[str, Any], size: tuple[int, int], match: str) -> None:
    with pytest.raises(ImageError, match=match):
        processor(kind, config)(Image.new("RGB", size))


def test_processor_without_conversion_refuses_other_modes() -> None:
    with pytest.raises(ImageError, match="of mode L: the checkpoint takes RGB"):
        processor(VIT, {})(picture(9, 9, "L"))


def test_mode_that_pillow_cannot_convert() -> None:
    with pytest.raises(ImageError, match="of mode La cannot be read"):
        load_image(Image.new("La", (4, 4)))


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = "import sys, edgevlm.images; print(sorted({'torch', 'transformers', 'torchvision'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_postscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "drawing.eps"
    Image.new("RGB", (20, 20), "red").save(path)
    with pytest.raises(ImageError, match=r"EPS.*save it as PNG"):
        load_image(path)
