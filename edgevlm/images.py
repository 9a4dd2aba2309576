"""Decode a picture and turn it into the `pixel_values` that a vision tower takes, with NumPy and Pillow only.

`load_image` makes an RGB picture out of a file, bytes, an array or a PIL image. `ImageProcessor` is the step after it:
it reads a Hugging Face `preprocessor_config.json` and gives the numbers which that file's image processor gives in
Transformers 5.23, on its Pillow backend. Pillow does the resampling in both, so they agree to the last bit. (A
checkpoint that names a `…Fast` processor runs on torchvision at Hugging Face, whose resampling rounds differently.)

This module does not know models, prompts, tokens or files on the network. It handles one picture at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from edgevlm.errors import ImageError, InputError, UnsupportedModelError

__all__ = [
    "MAX_ASPECT_RATIO",
    "MAX_PIXELS",
    "MIN_SIDE",
    "ImageInput",
    "ImageProcessor",
    "PixelRange",
    "TargetSize",
    "image_digest",
    "load_frames",
    "load_image",
]

ImageInput: TypeAlias = Image.Image | npt.NDArray[np.uint8] | str | os.PathLike[str] | bytes

MAX_PIXELS = 89_478_485
"""Largest picture that is decoded unless the caller says otherwise, in pixels; Pillow's own limit (256 MiB of RGB)."""

MIN_SIDE = 2
"""Shortest side of a picture, in pixels."""

MAX_ASPECT_RATIO = 200
"""Longest side over shortest side; the limit that Qwen's `smart_resize` has."""

# Padding to a square or enlarging a thin picture can make a small file huge, so each step has a limit too. Twice what
# may come in: every picture up to 2:1 can then be padded to a square.
_MAX_STEP_PIXELS = 2 * MAX_PIXELS


def load_image(source: ImageInput, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode `source` to an upright RGB picture of its own (nothing is shared with `source`).

    `source` is the path of a local file, the bytes of a file, a PIL image, or a uint8 array [H, W], [H, W, 1],
    [H, W, 3] (RGB) or [H, W, 4] (RGBA). A file with several frames gives its first, a PIL image its current one.

    The EXIF orientation is applied, to PIL images too. `transformers.image_utils.load_image` does the same, whereas a
    Hugging Face processor that is handed a PIL image directly leaves it lying on its side.

    Other modes become RGB as in the processors of Transformers 5.23: transparency (an alpha channel, or a transparent
    palette entry or colour) is laid on white, everything else is Pillow's `convert("RGB")`. For 16-bit greyscale, 32-bit
    integer and float pictures that means clipping at 255, not scaling: most 16-bit pictures come out white. That is
    what the Hugging Face processor sees as well; whoever wants another mapping scales to uint8 beforehand.

    A picture of more than `max_pixels` is refused by its header, before any pixel is decoded. Pillow's own guard stays
    as the application set it: it warns above `PIL.Image.MAX_IMAGE_PIXELS` and refuses above twice that.

    Raises `ImageError` when there is no such file, it is no picture, it is cut short or damaged, has more than
    `max_pixels`, a side under `MIN_SIDE` or an aspect ratio over `MAX_ASPECT_RATIO`, or when `source` is anything else.
    """
    name = _name(source)
    with _mapped_to_image_error(name):
        if isinstance(source, Image.Image):
            return _decode(source, name, max_pixels)
        if isinstance(source, np.ndarray):
            return _decode(_from_array(source), name, max_pixels)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _decode(image, name, max_pixels)


def load_frames(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> list[Image.Image]:
    """The frames of a film, each as `load_image` gives a picture: the pictures of a folder by their names, or all frames of
    one file that Pillow reads (GIF, WebP, APNG, TIFF).

    Raises `ImageError` as `load_image` does, and for a folder without a picture.
    """
    folder = Path(path)
    if folder.is_dir():
        known = Image.registered_extensions()
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in known)
        if not files:
            raise ImageError(
                f"{_name(path)} is a folder without a picture; a film is a folder of frames, or a file with several"
            )
        return [load_image(file, max_pixels=max_pixels) for file in files]
    frames = []
    with _mapped_to_image_error(_name(path)), Image.open(path) as film:
        for number in range(getattr(film, "n_frames", 1)):
            film.seek(number)
            frames.append(_decode(film, f"frame {number + 1} of {_name(path)}", max_pixels))
    return frames


def image_digest(image: Image.Image) -> str:
    """Hash of mode, size and pixels (as RGB) in 64 hexadecimal digits; file name and metadata do not enter.

    Pictures of the same digest have the same `pixel_values`. Raises `ImageError` when the pixels cannot be read.
    """
    with _mapped_to_image_error(_name(image)):
        digest = hashlib.blake2b(f"{image.mode} {image.width}x{image.height} ".encode(), digest_size=32)
        digest.update(_to_rgb(image).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class TargetSize:
    """The `size` entry of an image processor, in pixels; exactly one of Hugging Face's four combinations is set.

    `height` and `width`: that size. `shortest_edge`: that side, aspect ratio kept; with `longest_edge` the other side
    has a limit. `max_height` and `max_width`: the largest size of the same aspect ratio that fits in.
    """

    height: int | None = None
    width: int | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None
    max_height: int | None = None
    max_width: int | None = None

    def resolve(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture of `height` x `width` gets. Divisions and rounding are those of Transformers."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        if self.max_height is not None and self.max_width is not None:
            scale = min(self.max_height / height, self.max_width / width)
            return int(height * scale), int(width * scale)
        assert self.shortest_edge is not None
        short, long = sorted((height, width))
        edge: float = self.shortest_edge
        new_short = self.shortest_edge
        if self.longest_edge is not None and long / short * edge > self.longest_edge:
            edge = self.longest_edge * short / long  # not rounded for the long side
            new_short = round(edge)
        # With both limits, Transformers leaves a picture alone whose short side fits already.
        new_long = long if self.longest_edge is not None and new_short == short else int(edge * long / short)
        return (new_long, new_short) if width <= height else (new_short, new_long)


@dataclass(frozen=True)
class PixelRange:
    """The `size` of a processor that takes any size: as many pixels as the picture has, within limits.

    Sides become multiples of `factor` (one place of the prompt), the aspect ratio is kept as nearly as that allows.
    """

    fewest: int
    most: int
    factor: int
    film: tuple[int, int] | None = None
    """Pixels that all frames of a film may have together, and how many frames share their patches; None: no limit."""
    limited: bool = False
    """Whether `most` is a promise. It is not upstream: what is thinner than one place may have more."""

    def resolve(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture of `height` x `width` gets. Source: `smart_resize` in
        qwen2_vl/image_processing_qwen2_vl.py of Transformers, with its rounding."""
        unit = self.factor
        new = round(height / unit) * unit, round(width / unit) * unit
        if new[0] * new[1] > self.most:
            shrink = math.sqrt((height * width) / self.most)
            new = tuple(max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))  # type: ignore[assignment]
        elif new[0] * new[1] < self.fewest:
            grow = math.sqrt(self.fewest / (height * width))
            new = math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
        rows, columns = new[0] // unit, new[1] // unit
        while self.limited and rows * columns * unit * unit > self.most:
            rows, columns = (rows - 1, columns) if rows > columns else (rows, columns - 1)
        return rows * unit, columns * unit


@dataclass(frozen=True)
class ImageProcessor:
    """From an RGB picture to `pixel_values`, in the order of the fields; a step whose field is None is left out.

    Build it with `from_config`. It holds no state and may be used from several threads.
    """

    do_convert_rgb: bool
    """Convert other modes to RGB; otherwise they are refused."""
    pad_colour: tuple[int, int, int] | None
    """Pad to a square with this RGB colour, 0 to 255, picture in the middle (LLaVA)."""
    resize: TargetSize | PixelRange | None
    resample: int | None
    """Pillow's number of the resampling filter, 0 to 5; None without `resize`."""
    crop: tuple[int, int] | None
    """Centre crop to (height, width); a smaller picture gets a black border."""
    rescale_factor: float | None
    """Factor from 0…255 to the unit that mean and standard deviation are in, mostly 1/255."""
    image_mean: tuple[float, float, float] | None
    image_std: tuple[float, float, float] | None
    tiles: tuple[int, int] | None = None
    """Cut into as many tiles of `resize`, the fewest and the most, and where it is more than one, the whole picture as a
    tile behind them (InternVL)."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageProcessor:
        """Read a parsed `preprocessor_config.json`, or the `image_processor` entry of a `processor_config.json`.

        A missing key has the default of the processor's class in Transformers 5.23, null switches a step off as it does
        there, and the old forms (plain numbers as sizes, `feature_extractor_type`) have their old meaning. Raises
        `UnsupportedModelError` for a type, an option or a value that is not covered.
        """
        kind, defaults = _defaults(config)
        option = {**defaults, **config}
        for key in ("pad_size", "use_square_size"):
            if option.get(key):
                raise UnsupportedModelError(f"{kind}: {key} = {option[key]!r} is not covered; remove it or set it to null")
        if kind == "IdeficsImageProcessor":
            if option["image_num_channels"] not in (None, 3):
                raise UnsupportedModelError(f"{kind}: image_num_channels = {option['image_num_channels']!r}; needed: 3")
            if option.get("image_size") is not None:  # goes before size
                option["size"] = {"height": option["image_size"], "width": option["image_size"]}

        pad_colour = None
        # The other types pad the pictures of a batch to one size, which changes nothing for a single picture.
        if option.get("do_pad") and kind == "LlavaImageProcessor":
            red, green, blue = _three(option, "image_mean") if option["image_mean"] else (0.0, 0.0, 0.0)
            if not all(0 <= value <= 1 for value in (red, green, blue)):
                raise UnsupportedModelError(f"{kind}: cannot pad with image_mean = {option['image_mean']!r}; needed: 0 to 1")
            pad_colour = int(red * 255), int(green * 255), int(blue * 255)

        resize: TargetSize | PixelRange | None = None
        resample = crop = mean = std = None
        if kind.startswith("Qwen2VL") and not option["do_resize"]:
            raise UnsupportedModelError(f"{kind}: do_resize = {option['do_resize']!r}; needed: true, for whole patches")
        if option["do_resize"]:
            if kind.startswith("Qwen2VL"):
                resize = _pixel_range(kind, option)
            else:
                resize = _target_size(option, "size", square=bool(option["default_to_square"]))
            resample = option["resample"]
            if not isinstance(resample, int) or not 0 <= resample <= 5:
                raise UnsupportedModelError(f"{kind}: resample = {resample!r}; needed: one of Pillow's filters, 0 to 5")
        if option.get("do_center_crop") and not kind.startswith("Qwen2VL"):  # whose class has the option and no such step
            target = _target_size(option, "crop_size", square=True)
            if target.height is None or target.width is None:
                raise UnsupportedModelError(f"{kind}: crop_size = {option['crop_size']!r}; needed: height and width")
            crop = target.height, target.width
        if option["do_normalize"]:
            mean, std = _three(option, "image_mean"), _three(option, "image_std")
            if 0.0 in std:
                raise UnsupportedModelError(f"{kind}: image_std = {option['image_std']!r} would divide by zero")
        return cls(
            do_convert_rgb=bool(option.get("do_convert_rgb")),
            pad_colour=pad_colour,
            resize=resize,
            resample=resample,
            crop=crop,
            rescale_factor=_number(option, "rescale_factor") if option["do_rescale"] else None,
            image_mean=mean,
            image_std=std,
            tiles=_tiles(kind, option, resize) if option.get("crop_to_patches") and kind == "GotOcr2ImageProcessor" else None,
        )

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of every result, or None when it depends on the picture."""
        if self.crop is not None:
            return self.crop
        if isinstance(self.resize, TargetSize):
            if self.resize.height is not None and self.resize.width is not None:
                return self.resize.height, self.resize.width
            if self.pad_colour is not None and self.resize.shortest_edge is not None and self.resize.longest_edge is None:
                return self.resize.shortest_edge, self.resize.shortest_edge
        return None

    def for_frames(self, count: int) -> ImageProcessor:
        """The same for the frames of a film of `count`, which may have less to share than each has alone."""
        size = self.resize
        if not isinstance(size, PixelRange) or size.film is None:
            return self
        pixels, shared = size.film
        most = max(min(size.most, pixels * shared // count), int(size.fewest * 1.05))
        return replace(self, resize=replace(size, most=most))

    def most_places(self, places: int) -> int | None:
        """The most places of a prompt that a picture takes, where its size decides; `places` are those of one tile."""
        if isinstance(self.resize, PixelRange):
            return self.resize.most // self.resize.factor**2
        if self.tiles is not None:
            most = self.tiles[1]
            return (most + (most > 1)) * places
        return None

    def limit(self, *, places: int, max_tiles: int | None = None, visual_tokens: int | None = None) -> ImageProcessor:
        """The same for pictures that may cost no more than `visual_tokens` places in the prompt, or be cut into no more than
        `max_tiles`. `places` is what one tile takes, or a picture where its size does not matter.

        Raises `InputError` where that is less than the least that can be seen of a picture.
        """
        for name, value in (("max_tiles", max_tiles), ("visual_tokens", visual_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise InputError(f"{name} is {value!r}; it is a whole number.")
        if max_tiles is not None and max_tiles < 1:
            raise InputError(f"max_tiles is {max_tiles}; it is 1 or more.")
        if isinstance(self.resize, PixelRange):
            if visual_tokens is None:
                return self
            if visual_tokens < 1:
                raise InputError(f"visual_tokens is {visual_tokens}; the least that this model can see of a picture takes 1.")
            place = self.resize.factor**2
            most = max(min(self.resize.most, visual_tokens * place), place)
            return replace(self, resize=replace(self.resize, most=most, fewest=min(self.resize.fewest, most), limited=True))
        if visual_tokens is not None:
            tiles = visual_tokens // places
            if tiles < 1:
                raise InputError(
                    f"visual_tokens is {visual_tokens}; the least that this model can see of a picture takes {places}."
                )
            tiles = tiles - 1 if tiles > 2 else 1  # the tile of the whole picture comes with two or more
            max_tiles = tiles if max_tiles is None else min(tiles, max_tiles)
        if max_tiles is None or self.tiles is None:
            return self
        return replace(self, tiles=(min(self.tiles[0], max_tiles), min(self.tiles[1], max_tiles)))

    def tile_grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the tiles of a picture of `height` x `width` pixels.

        Of all grids the one whose aspect ratio is nearest; of equally near ones the larger, as long as the picture has more
        than half of the grid's pixels. Source: got_ocr2/image_processing_got_ocr2.py of Transformers.
        """
        if self.tiles is None:
            return 1, 1
        assert isinstance(self.resize, TargetSize)
        assert self.resize.height is not None
        assert self.resize.width is not None
        fewest, limit = self.tiles
        best, nearest = (1, 1), float("inf")
        grids = [(r, c) for c in range(1, limit + 1) for r in range(1, limit + 1) if fewest <= r * c <= limit]
        for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            distance = abs(width / height - columns / rows)
            larger = width * height > 0.5 * self.resize.height * self.resize.width * rows * columns
            if distance < nearest or (distance == nearest and larger):
                best, nearest = (rows, columns), min(distance, nearest)
        return best

    def count_tiles(self, height: int, width: int) -> int:
        """How many tiles `cut` gives, the one of the whole picture included."""
        rows, columns = self.tile_grid(height, width)
        return rows * columns + (rows * columns > 1)

    def cut(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """`pixel_values` of all tiles of one picture, row by row, then of the whole: float32 [tiles, 3, height, width]."""
        rows, columns = self.tile_grid(image.height, image.width)
        if rows * columns == 1:
            return self(image)[None]
        assert self.resize is not None
        height, width = self.resize.resolve(image.height, image.width)
        name = _name(image)
        _check_step(name, "resizing", height * rows, width * columns)
        with _mapped_to_image_error(name):
            whole = _to_rgb(image) if self.do_convert_rgb else image
            canvas = whole.resize((width * columns, height * rows), self.resample)
        boxes = [(c * width, r * height, (c + 1) * width, (r + 1) * height) for r in range(rows) for c in range(columns)]
        return np.stack([self(tile) for tile in (*(canvas.crop(box) for box in boxes), whole)])

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the result for a picture of `height` x `width` pixels."""
        if self.crop is not None:
            return self.crop
        if self.pad_colour is not None:
            height = width = max(height, width)
        return (height, width) if self.resize is None else self.resize.resolve(height, width)

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """`pixel_values` of one picture, as `load_image` returns it: float32 [3, height, width], channels R, G, B.

        In units of standard deviations from the mean; where the checkpoint does not normalise, 0 to 1, and where it does
        not rescale either, 0 to 255.

        Raises `ImageError` when the pixels cannot be read, when the picture is not RGB and the checkpoint does not ask
        for a conversion, or when a step would make it empty or huge.
        """
        name = _name(image)
        if self.do_convert_rgb:
            with _mapped_to_image_error(name):
                image = _to_rgb(image)
        elif image.mode != "RGB":
            raise ImageError(f"{name}: the checkpoint takes RGB and does not convert; pass what load_image returns")

        if self.pad_colour is not None and image.width != image.height:
            side = max(image.size)
            _check_step(name, "padding to a square", side, side)
            square = Image.new("RGB", (side, side), self.pad_colour)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if self.resize is not None:
            height, width = self.resize.resolve(image.height, image.width)
            _check_step(name, "resizing", height, width)
            image = image.resize((width, height), self.resample)
        if self.crop is not None:
            height, width = self.crop
            _check_step(name, "cropping", height, width)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # what lies outside comes out as 0

        pixels = np.asarray(image).transpose(2, 0, 1)
        if self.rescale_factor is None:
            values = pixels.astype(np.float32)
        else:  # in float64, because Transformers does
            values = (pixels.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.image_mean is not None and self.image_std is not None:
            mean, std = (np.array(three, np.float32)[:, None, None] for three in (self.image_mean, self.image_std))
            values = (values - mean) / std
        return np.ascontiguousarray(values)


# --- decoding ---------------------------------------------------------------------------------------------------------


def _name(source: object) -> str:
    """How error texts call `source`."""
    if isinstance(source, Image.Image):
        return f"PIL image {source.width} x {source.height} of mode {source.mode}"
    if isinstance(source, np.ndarray):
        return f"array {list(source.shape)} of {source.dtype}"
    if isinstance(source, bytes):
        return f"picture in {len(source)} bytes"
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source)[:200])
    raise ImageError(
        f"{type(source).__name__} is no picture; accepted: a path, the bytes of a file, a PIL image, a uint8 array"
    )


@contextlib.contextmanager
def _mapped_to_image_error(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError as exc:
        raise ImageError(f"{name}: no such file; a string is the path of a local file, links are not followed") from exc
    except IsADirectoryError as exc:
        raise ImageError(f"{name} is a folder; pass the path of one picture") from exc
    except UnidentifiedImageError as exc:
        raise ImageError(f"{name} is no picture that Pillow can read; save it as PNG or JPEG") from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageError(f"{name} is over Pillow's own limit: {exc}; make it smaller") from exc
    except Exception as exc:  # a damaged file makes Pillow's parsers raise almost anything
        raise ImageError(f"{name} cannot be read, it is damaged or cut short: {type(exc).__name__}: {exc}") from exc


def _from_array(array: npt.NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"array {list(array.shape)} of {array.dtype} is no picture; accepted: uint8, 0 to 255, "
            "[height, width] or [height, width, channels] with 1, 3 (RGB) or 4 (RGBA) channels, in this order"
        )
    _check_size(f"array {list(array.shape)}", array.shape[1], array.shape[0])  # Pillow fails on arrays without pixels
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    if image.format == "EPS":  # a program, not a picture: Pillow has Ghostscript run it
        raise ImageError(f"{name} is an EPS file, which only a PostScript interpreter can draw; save it as PNG or JPEG")
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{name}: {image.width} x {image.height} = {image.width * image.height} pixels, accepted are at most "
            f"{max_pixels}; make it smaller, or raise max_pixels"
        )
    _check_size(name, image.width, image.height)
    rgb = _to_rgb(ImageOps.exif_transpose(image))
    _check_size(name, rgb.width, rgb.height)  # an icon's header may be wrong about the picture in it
    return rgb


def _check_size(name: str, width: int, height: int) -> None:
    short, long = sorted((width, height))
    if short < MIN_SIDE:
        raise ImageError(f"{name}: {width} x {height} pixels (width x height); needs at least {MIN_SIDE} pixels a side")
    if long > MAX_ASPECT_RATIO * short:
        raise ImageError(
            f"{name}: {width} x {height} pixels (width x height), an aspect ratio of {long / short:.1f}; "
            f"accepted are at most {MAX_ASPECT_RATIO}; crop it"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB as `convert_to_rgb` of Transformers makes it: transparency on white, other modes as Pillow converts them."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _check_step(name: str, step: str, height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{name}: {step} leaves nothing, {width} x {height} pixels (width x height); make it less thin")
    if height * width > _MAX_STEP_PIXELS:
        raise ImageError(
            f"{name}: {step} makes {width} x {height} = {height * width} pixels of it, accepted are at most "
            f"{_MAX_STEP_PIXELS}; make it smaller or less thin"
        )


# --- preprocessor_config.json -----------------------------------------------------------------------------------------

_COMMON: Mapping[str, Any] = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_VIT: Mapping[str, Any] = {
    **_COMMON,
    "size": {"height": 224, "width": 224},
    "default_to_square": True,
    "resample": 2,
    "image_mean": 0.5,
    "image_std": 0.5,
}
_SIGLIP: Mapping[str, Any] = {**_VIT, "do_convert_rgb": True, "default_to_square": False, "resample": 3}
_CLIP: Mapping[str, Any] = {
    **_COMMON,
    "do_convert_rgb": True,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_BLIP: Mapping[str, Any] = {
    **_VIT,
    "do_convert_rgb": True,
    "size": {"height": 384, "width": 384},
    "resample": 3,
    "image_mean": _CLIP["image_mean"],
    "image_std": _CLIP["image_std"],
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "BlipImageProcessor": _BLIP,
    "CLIPImageProcessor": _CLIP,
    "GotOcr2ImageProcessor": {**_BLIP, "crop_to_patches": False, "min_patches": 1, "max_patches": 12},
    "Qwen2VLImageProcessor": {
        **_CLIP,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "do_center_crop": False,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
    "Qwen2VLVideoProcessor": {
        **_CLIP,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
        "do_center_crop": False,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "max_video_tokens": 128_000,
    },
    "IdeficsImageProcessor": {**_BLIP, "size": {"height": 224, "width": 224}, "image_num_channels": 3},
    "LlavaImageProcessor": _CLIP,
    "SiglipImageProcessor": _SIGLIP,
    "ViTImageProcessor": _VIT,
}

_SIZE_KEYS = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"})


def _defaults(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The processor's name without its backend, and the defaults of that class."""
    asked = config.get("image_processor_type") or config.get("feature_extractor_type")
    kind = str(asked).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if kind not in _DEFAULTS:
        what = f"image processor {asked!r}" if asked else "a configuration without image_processor_type"
        raise UnsupportedModelError(f"{what} is not covered; covered are {', '.join(_DEFAULTS)}")
    return kind, _DEFAULTS[kind]


def _target_size(option: Mapping[str, Any], key: str, *, square: bool) -> TargetSize:
    value = option.get(key)
    if type(value) is int:
        sizes = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        sizes = {"height": value[0], "width": value[1]}
    elif isinstance(value, Mapping):
        sizes = {name: number for name, number in value.items() if number is not None}
    else:
        sizes = {}
    if set(sizes) not in _SIZE_KEYS or not all(type(number) is int and number > 0 for number in sizes.values()):
        forms = ", ".join("+".join(sorted(keys)) for keys in _SIZE_KEYS)
        raise UnsupportedModelError(f"{key} = {value!r} is not covered; needed: positive numbers for one of {forms}")
    return TargetSize(**sizes)


def _pixel_range(kind: str, option: Mapping[str, Any]) -> PixelRange:
    """The limits are counts of pixels, though they are called edges; before that they were called what they are."""
    size: Any = option.get("size")
    if size is None:
        size = _DEFAULTS[kind]["size"]
    elif not isinstance(size, Mapping):
        size = {}
    fewest: Any = option.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    most: Any = option.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
    numbers = (fewest, most, option["patch_size"], option["merge_size"], option["temporal_patch_size"])
    if not all(type(number) is int and number > 0 for number in numbers) or fewest > most:
        raise UnsupportedModelError(
            f"{kind}: size = {option.get('size')!r}, min_pixels = {option.get('min_pixels')!r}, max_pixels = "
            f"{option.get('max_pixels')!r}, patch_size = {option['patch_size']!r}, merge_size = {option['merge_size']!r}, "
            f"temporal_patch_size = {option['temporal_patch_size']!r}; needed: positive whole numbers, the fewest pixels first"
        )
    factor, film = option["patch_size"] * option["merge_size"], None
    if option.get("cap_pixels_per_frame"):
        film = int(option["max_video_tokens"] * factor * factor * 0.9), option["temporal_patch_size"]
    return PixelRange(fewest, most, factor, film)


def _tiles(kind: str, option: Mapping[str, Any], size: TargetSize | PixelRange | None) -> tuple[int, int] | None:
    fewest, most = option["min_patches"], option["max_patches"]
    if type(fewest) is not int or type(most) is not int or not 1 <= fewest <= most:
        raise UnsupportedModelError(f"{kind}: {fewest!r} to {most!r} tiles; needed: whole numbers from 1 on, fewest first")
    if not isinstance(size, TargetSize) or size.height is None or size.width is None:
        raise UnsupportedModelError(f"{kind}: tiles need a size with height and width and do_resize")
    return (fewest, most) if most > 1 else None


def _number(option: Mapping[str, Any], key: str) -> float:
    value = option[key]
    if type(value) not in (int, float):
        raise UnsupportedModelError(f"{key} = {value!r}; needed: a number")
    return float(value)


def _three(option: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    value = option[key]
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
    if len(numbers) != 3 or not all(type(number) in (int, float) for number in numbers):
        raise UnsupportedModelError(f"{key} = {value!r}; needed: a number, or three for R, G, B")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])
