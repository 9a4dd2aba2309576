"""Pictures as towers of any size are shown them: as large as a number of pixels allows, in the shape they have.

The numbers vary, so that a model may later be run with another one than it is published with. Drawn once into the
work folder.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from common import CAMERA, MEAN, PATCH, SIDE, STD, describe_objects, patch_labels
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from edgevlm.scenes import SPLITS, Scene, render_mask, render_scene, sample_scene

BUDGET = 84 * 84  # pixels of a picture, at most, that a model is published with
BUDGETS = {60 * 60: 0.15, 72 * 72: 0.2, BUDGET: 0.45, 96 * 96: 0.2}  # how often each is trained with


def fit(scene: Scene, budget: int) -> tuple[int, int]:
    """Height and width that the picture is resized to."""
    width, height = scene.pixels(CAMERA)
    return smart_resize(height, width, PATCH, 1, budget)


def draw_range(job: tuple[str, int, int, bool]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels `[P, 3]` of all pictures one after the other, which object each place shows `[L]`, and heights and widths."""
    aspect, first, count, varied = job
    pixels, labels, sizes = [], [], []
    for seed in range(first, first + count):
        scene = sample_scene(seed, aspect)
        budget = random.Random(f"budget {seed}").choices(list(BUDGETS), list(BUDGETS.values()))[0] if varied else BUDGET
        height, width = fit(scene, budget)
        picture = render_scene(scene, CAMERA).resize((width, height), Image.Resampling.BICUBIC)
        mask = Image.fromarray(render_mask(scene, 2 * SIDE)).resize((width, height), Image.Resampling.NEAREST)
        pixels.append(np.asarray(picture).reshape(-1, 3))
        labels.append(patch_labels(np.asarray(mask), PATCH))
        sizes.append((height, width))
    return np.concatenate(pixels), np.concatenate(labels), np.array(sizes, np.uint16)


class Grids:
    """Pictures of `count` scenes of one aspect; `sizes` `[count, 2]` are heights and widths in pixels."""

    def __init__(self, folder: Path, aspect: str, split: str, count: int) -> None:
        name = f"grids-{aspect}-{split}-{count}"
        self.pixels = np.load(folder / f"{name}-pixels.npy", mmap_mode="r")
        self.labels = np.load(folder / f"{name}-labels.npy")
        self.sizes = np.load(folder / f"{name}-sizes.npy").astype(int)
        area = self.sizes.prod(1)
        self.starts = np.cumsum(area) - area
        self.scenes = [sample_scene(seed, aspect) for seed in SPLITS[split][:count]]
        self.objects = describe_objects(self.scenes)
        self.groups = {tuple(size): np.flatnonzero((self.sizes == size).all(1)) for size in np.unique(self.sizes, axis=0)}

    @staticmethod
    def draw(folder: Path, aspect: str, split: str, count: int, processes: int) -> None:
        name = f"grids-{aspect}-{split}-{count}"
        if (folder / f"{name}-pixels.npy").exists():
            return
        first = SPLITS[split].start
        jobs = [(aspect, first + a, min(250, count - a), split == "train") for a in range(0, count, 250)]
        with torch.multiprocessing.get_context("fork").Pool(processes) as pool:
            parts = pool.map(draw_range, jobs, 1)
        for what, arrays in zip(("sizes", "labels", "pixels"), list(zip(*parts, strict=True))[::-1], strict=True):
            np.save(folder / f"{name}-{what}.npy", np.concatenate(arrays))

    def pick(self, same: random.Random, own: random.Random, count: int) -> np.ndarray:
        """Pictures of one size: the size is drawn from `same`, which all processes share, the pictures from `own`."""
        group = self.groups[tuple(self.sizes[same.randrange(len(self.sizes))])]
        return group[[own.randrange(len(group)) for _ in range(count)]]

    def batch(self, index: np.ndarray) -> Tensor:
        """`[B, 3, H, W]` of pictures of one size."""
        height, width = self.sizes[index[0]]
        area = height * width
        pixels = np.stack([self.pixels[start : start + area] for start in self.starts[index]])
        picture = torch.from_numpy(pixels).view(-1, height, width, 3).permute(0, 3, 1, 2).float() / 255
        return (picture - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

    def truth(self, index: np.ndarray) -> Tensor:
        """`[B, places, 5]`: colour, shape, size (0: table), and the object's centre, from -1 to 1 over the picture."""
        area = self.sizes[index[0]].prod() // PATCH**2
        labels = np.stack([self.labels[start // PATCH**2 :][:area] for start in self.starts[index]])
        return torch.from_numpy(self.objects[index][np.arange(len(index))[:, None], labels])
