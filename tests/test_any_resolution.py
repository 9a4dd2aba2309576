"""Pictures of any size: resized and cut into patches as transformers' processor does it, and held to a budget of tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from asking import load, picture
from PIL import Image
from tinies import Tiny

from edgevlm.bundle import Bundle, PatchGrid
from edgevlm.errors import ImageError, InputError, UnsupportedModelError
from edgevlm.images import ImageProcessor, PixelRange, TargetSize, load_image
from edgevlm.models.qwen2_vl import cut_patches
from edgevlm.vlm import VLM

#: Pixels of a place, fewest and most of a picture.
RANGES = [
    (28, 3136, 1003520), (28, 3136, 12845056), (28, 4 * 784, 16384 * 784), (8, 256, 4096), (9, 81, 6561), (14, 196, 196),
    (28, 784, 784), (28, 100352, 602112), (30, 1, 900), (56, 1, 9408), (28, 1, 5),
]  # fmt: skip
EVERY_RANGE = pytest.mark.parametrize(("factor", "fewest", "most"), RANGES)


def sizes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Height and width up to 3,000, thin ones up to the limit, small ones, whole places and what is next to them."""
    rng = np.random.default_rng(seed)
    drawn = [*rng.integers(2, 3001, (count, 2)).tolist(), *rng.integers(2, 60, (count, 2)).tolist()]
    thin = [size for n in (2, 3, 101, 199, 200, 399, 400) for size in ((2, n), (n, 2))] + [(15, 3000), (3000, 15), (14, 2799)]
    whole = [(28 * a + d, 28 * b) for a, b in itertools.product((1, 2, 3, 7), repeat=2) for d in (-14, -13, 0, 13, 14)]
    return [(h, w) for h, w in [*map(tuple, drawn), *thin, *whole] if min(h, w) >= 2 and max(h, w) <= 200 * min(h, w)]


def processor(factor: int, fewest: int, most: int) -> ImageProcessor:
    return ImageProcessor.from_config(
        {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": factor, "merge_size": 1, "min_pixels": fewest,
         "max_pixels": most}
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- as upstream


@EVERY_RANGE
def test_sizes_are_those_of_smart_resize(factor: int, fewest: int, most: int) -> None:
    pytest.importorskip("torch")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    ours = PixelRange(fewest, most, factor)
    asked = sizes(1500)
    assert [ours.resolve(*size) for size in asked] == [smart_resize(*size, factor, fewest, most) for size in asked]


CONFIGS: dict[str, dict[str, Any]] = {
    "none": {},
    "small": {"patch_size": 4, "min_pixels": 256, "max_pixels": 4096},
    "odd": {"patch_size": 5, "merge_size": 3, "temporal_patch_size": 3, "min_pixels": 225, "max_pixels": 22500},
    "one frame, one patch": {"patch_size": 16, "merge_size": 1, "temporal_patch_size": 1, "max_pixels": 65536},
    "published": {"size": {"min_pixels": 3136, "max_pixels": 50176}, "min_pixels": 3136, "max_pixels": 50176},
    "new": {"size": {"shortest_edge": 3136, "longest_edge": 50176}},
    "both": {"size": {"shortest_edge": 3136, "longest_edge": 50176}, "min_pixels": 12544, "max_pixels": 25088},
    "one of each": {"size": {"shortest_edge": 12544}, "max_pixels": 50176},
    "no size": {"size": None},
    "no size, fewest": {"size": None, "min_pixels": 50176},
    "null limits": {"min_pixels": None, "max_pixels": None},
    "equal": {"min_pixels": 784, "max_pixels": 784},
    "most below a place": {"min_pixels": 100, "max_pixels": 300},
    "odd normalisation": {"image_mean": 0.5, "image_std": [0.1, 0.2, 0.3], "max_pixels": 25088},
    "not normalised": {"do_normalize": False, "max_pixels": 25088},
    "bytes": {"do_normalize": False, "do_rescale": False, "max_pixels": 25088},
    "another scale": {"rescale_factor": 1 / 127.5, "resample": 2, "max_pixels": 25088},
    "steps that the class does not have": {"do_center_crop": True, "crop_size": 28, "do_pad": True, "max_pixels": 25088},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_patches_equal_hugging_face(name: str) -> None:
    pytest.importorskip("torch")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config = CONFIGS[name]
    theirs = Qwen2VLImageProcessorPil.from_dict({key: dict(v) if isinstance(v, dict) else v for key, v in config.items()})
    ours = ImageProcessor.from_config({"image_processor_type": "Qwen2VLImageProcessor", **config})
    grid = PatchGrid(theirs.patch_size, theirs.temporal_patch_size, theirs.merge_size)
    rng = np.random.default_rng(1)
    # Pictures that are enlarged a lot come last, and there are few of them: they are slow.
    for height, width in [*rng.integers(2, 300, (8, 2)).tolist(), (2, 2), (2, 400), (300, 3), (28, 28), (15, 700)]:
        if max(height, width) > 200 * min(height, width):
            continue
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        batch = theirs(image, return_tensors="np")
        pixels = ours.cut(image)
        rows, columns = pixels.shape[2] // grid.size, pixels.shape[3] // grid.size
        assert [[1, rows, columns]] == batch["image_grid_thw"].tolist(), (height, width)
        patches = cut_patches(pixels, grid)
        assert patches.shape[:3] == (1, rows * columns // grid.merge**2, grid.merge**2)
        np.testing.assert_array_equal(patches.reshape(rows * columns, -1), batch["pixel_values"], err_msg=f"{height} x {width}")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"min_pixels": 50176, "max_pixels": 3136}, "min_pixels = 50176, max_pixels = 3136.*the fewest pixels first"),
        ({"max_pixels": 1e6}, "max_pixels = 1000000.0.*needed: positive whole numbers"),
        ({"max_pixels": "100352"}, "max_pixels = '100352'"),
        ({"max_pixels": True}, "max_pixels = True"),
        ({"min_pixels": -1}, "min_pixels = -1"),
        ({"size": 448}, "size = 448"),
        ({"size": {"height": 448, "width": 448}}, "size = {'height': 448"),
        ({"size": {"longest_edge": 50176}}, "size = {'longest_edge': 50176}"),
        ({"patch_size": [14, 14]}, r"patch_size = \[14, 14\]"),
        ({"merge_size": 0}, "merge_size = 0"),
        ({"temporal_patch_size": None}, "temporal_patch_size = None"),
        ({"do_resize": False}, "do_resize = False; needed: true, for whole patches"),
        ({"do_resize": None}, "do_resize = None"),
    ],
)
def test_configurations_that_are_refused(config: dict[str, Any], said: str) -> None:
    for kind in ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLVideoProcessor"):
        with pytest.raises(UnsupportedModelError, match=f"^{kind.removesuffix('Fast')}: .*{said}"):
            ImageProcessor.from_config({"image_processor_type": kind, **config})


def test_frames_of_a_long_film_share_their_pixels() -> None:
    """As Qwen2VLVideoProcessor counts with `cap_pixels_per_frame`."""
    size = {"shortest_edge": 256, "longest_edge": 4096}
    config = {"image_processor_type": "Qwen2VLVideoProcessor", "patch_size": 4, "size": size}
    free = ImageProcessor.from_config(config)
    capped = ImageProcessor.from_config({**config, "cap_pixels_per_frame": True, "max_video_tokens": 100})
    shared = int(100 * 64 * 0.9)  # pixels, for each of two frames that become one layer
    for count in (1, 2, 3, 7, 16, 40, 400):
        most = max(min(4096, shared * 2 // count), int(256 * 1.05))
        assert capped.for_frames(count).output_size(300, 400) == PixelRange(256, most, 8).resolve(300, 400)
        assert free.for_frames(count) == free
    few, many = (capped.for_frames(count).output_size(300, 400) for count in (2, 400))
    assert many != few == free.output_size(300, 400)
    plain = ImageProcessor.from_config({"image_processor_type": "CLIPImageProcessor"})
    assert plain.for_frames(7) is plain


@pytest.mark.parametrize(("width", "height"), [(401, 2), (2, 401), (3000, 14)])
def test_an_aspect_ratio_over_the_limit_is_refused(width: int, height: int) -> None:
    ratio = max(width, height) / min(width, height)
    said = f"{width} x {height} pixels .* an aspect ratio of {ratio:.1f}; accepted are at most 200"
    with pytest.raises(ImageError, match=said):
        load_image(np.zeros((height, width, 3), np.uint8))
    load_image(np.zeros((2, 400, 3), np.uint8))


# ---------------------------------------------------------------------------------------------- the budget


@EVERY_RANGE
@pytest.mark.parametrize("budget", [1, 2, 3, 7, 64, 1000])
def test_a_picture_costs_no_more_than_its_budget(factor: int, fewest: int, most: int, budget: int) -> None:
    whole = processor(factor, fewest, most)
    limited = whole.limit(places=0, visual_tokens=budget)
    for height, width in sizes(400):
        rows, columns = (side // factor for side in limited.output_size(height, width))
        assert 1 <= rows * columns <= budget, (height, width)
        rounded = round(height / factor) * round(width / factor)
        if fewest / factor**2 <= rounded <= min(budget, most / factor**2):  # what fits is left as it is
            assert (rows * factor, columns * factor) == whole.output_size(height, width), (height, width)


def test_a_budget_keeps_the_aspect_ratio_and_grows_with_itself() -> None:
    whole = processor(28, 3136, 12845056)
    for height, width in sizes(60, seed=1):
        last = 0
        for budget in [*range(1, 40), *range(40, 400, 9)]:
            rows, columns = (side // 28 for side in whole.limit(places=0, visual_tokens=budget).output_size(height, width))
            assert rows * columns >= last, (height, width, budget)
            last = rows * columns
            # Neither side is longer than what keeps the ratio and fills the budget, but for rounding.
            ideal = math.sqrt(budget * height / width)
            assert rows < ideal + 2, (height, width, budget)
            assert columns < budget / ideal + 2, (height, width, budget)
            if min(rows, columns) > 3:
                assert abs(math.log(columns / rows * height / width)) < 0.35, (height, width, budget)


@pytest.mark.parametrize("budget", [1, 4, 5, 8, 12, 13, 20, 1000])
@pytest.mark.parametrize("tiles", [(1, 12), (1, 4), (2, 6), (1, 1)])
def test_tiles_cost_no_more_than_their_budget(tiles: tuple[int, int], budget: int) -> None:
    places = 4
    config = {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 28, "width": 28}, "crop_to_patches": True}
    whole = ImageProcessor.from_config({**config, "min_patches": tiles[0], "max_patches": tiles[1]})
    if budget < places:
        with pytest.raises(InputError, match=f"visual_tokens is {budget}; the least .* takes {places}"):
            whole.limit(places=places, visual_tokens=budget)
        return
    limited, more = (whole.limit(places=places, visual_tokens=n) for n in (budget, budget + places))
    for height, width in sizes(100):
        count = limited.count_tiles(height, width)
        assert 1 <= count * places <= budget, (height, width)
        assert limited.tile_grid(height, width)[0] * limited.tile_grid(height, width)[1] <= tiles[1]
        if whole.count_tiles(height, width) * places <= budget and tiles[0] == 1:
            assert count <= whole.count_tiles(height, width)
        assert more.limit(places=places, visual_tokens=budget) == limited


def test_fixed_pictures_fit_or_do_not() -> None:
    fixed = ImageProcessor.from_config({"image_processor_type": "CLIPImageProcessor"})
    assert fixed.limit(places=576, visual_tokens=576) == fixed == fixed.limit(places=576, max_tiles=1)
    with pytest.raises(InputError, match="visual_tokens is 575; the least that this model can see of a picture takes 576"):
        fixed.limit(places=576, visual_tokens=575)


@pytest.mark.parametrize("value", [0, -1, 1.5, "7", True])
@pytest.mark.parametrize("option", ["visual_tokens", "max_tiles"])
def test_budgets_that_are_none(option: str, value: Any) -> None:
    for resize in (PixelRange(256, 4096, 8), TargetSize(height=28, width=28)):
        one = ImageProcessor(True, None, resize, 3, None, 1 / 255, None, None)
        with pytest.raises(InputError, match=f"{option} is {value!r}"):
            one.limit(places=4, **{option: value})


@pytest.mark.parametrize(
    ("name", "least"), [("qwen2-vl", 1), ("qwen2.5-vl", 1), ("internvl-qwen2", 4), ("clip-llama", 16), ("blip2-opt", 4)]
)
def test_every_family_keeps_to_a_budget(tiny: Callable[[str], Tiny], name: str, least: int) -> None:
    """From the outside: what a reply says that pictures took, and what the prompt grew by."""
    pytest.importorskip("torch")
    bundle = tiny(name).bundle
    assert Bundle.open(bundle).manifest.image.places in (least, 0)
    if least > 1:
        with pytest.raises(InputError, match=f"visual_tokens is {least - 1}; .* takes {least}"):
            VLM.load(bundle, visual_tokens=least - 1)
    for budget in (least, 3 * least + 1):
        vlm, lengths = load(bundle, visual_tokens=budget), set()
        for size in ((41, 33), (120, 31), (31, 120), (300, 200), (3, 2)):
            reply = vlm.generate("What?", images=[picture(1, *size)], max_new_tokens=1)
            (seen,) = reply.pictures
            assert 1 <= seen.tokens <= budget
            assert (seen.width, seen.height, seen.frames) == (*size, 1)
            lengths.add(reply.timings.prompt_tokens - seen.tokens)
        assert len(lengths) == 1  # the text of the prompt and nothing else
