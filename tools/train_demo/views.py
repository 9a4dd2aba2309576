"""Wide and tall pictures as towers of one fixed size are shown them: cut into square tiles, and squeezed into a square.

InternVL is given both, the tiles first; the first Qwen-VL only the squeezed picture. Drawn once into the work folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import CAMERA, MEAN, PATCH, SIDE, STD, describe_objects, patch_labels
from PIL import Image
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from edgevlm.scenes import SPLITS, render_mask, render_scene, sample_scene

MOST_TILES = 3


def draw_range(job: tuple[str, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Views `[V, SIDE, SIDE, 3]`, which object each place of theirs shows `[V, GRID²]`, and columns and rows `[count, 2]`."""
    aspect, first, count = job
    pixels, labels, grids = [], [], []
    for seed in range(first, first + count):
        scene = sample_scene(seed, aspect)
        picture = render_scene(scene, CAMERA)
        mask = Image.fromarray(render_mask(scene, 2 * SIDE))
        columns, rows = get_optimal_tiled_canvas((picture.height, picture.width), (SIDE, SIDE), 1, MOST_TILES)
        tiles = [(x * SIDE, y * SIDE, (x + 1) * SIDE, (y + 1) * SIDE) for y in range(rows) for x in range(columns)]
        for canvas, boxes in (((columns * SIDE, rows * SIDE), tiles), ((SIDE, SIDE), [(0, 0, SIDE, SIDE)])):
            shown, numbers = picture.resize(canvas, Image.Resampling.BICUBIC), mask.resize(canvas, Image.Resampling.NEAREST)
            for box in boxes:
                pixels.append(np.asarray(shown.crop(box)))
                labels.append(patch_labels(np.asarray(numbers.crop(box)), PATCH))
        grids.append((columns, rows))
    return np.stack(pixels), np.stack(labels), np.array(grids, np.uint8)


class Views:
    """The views of `count` scenes of one aspect: each scene's tiles, and then the whole, squeezed."""

    def __init__(self, folder: Path, aspect: str, split: str, count: int) -> None:
        name = f"{aspect}-{split}-{count}"
        self.pixels = np.load(folder / f"{name}-pixels.npy", mmap_mode="r")
        self.labels = np.load(folder / f"{name}-labels.npy")
        self.grids = np.load(folder / f"{name}-grids.npy").astype(int)
        self.tiles = self.grids.prod(1)
        self.whole = np.cumsum(self.tiles + 1) - 1  # the squeezed view of each scene; its tiles come right before
        self.scenes = [sample_scene(seed, aspect) for seed in SPLITS[split][:count]]
        self.objects = describe_objects(self.scenes)

    @staticmethod
    def draw(folder: Path, aspect: str, split: str, count: int, processes: int) -> None:
        name = f"{aspect}-{split}-{count}"
        if (folder / f"{name}-pixels.npy").exists():
            return
        first = SPLITS[split].start
        jobs = [(aspect, first + a, min(250, count - a)) for a in range(0, count, 250)]
        with torch.multiprocessing.get_context("fork").Pool(processes) as pool:
            parts = pool.map(draw_range, jobs, 1)
        for what, arrays in zip(("grids", "labels", "pixels"), list(zip(*parts, strict=True))[::-1], strict=True):
            np.save(folder / f"{name}-{what}.npy", np.concatenate(arrays))

    def batch(self, views: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(self.pixels[views]).permute(0, 3, 1, 2).float() / 255
        return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

    def number(self, scenes: np.ndarray, tile: np.ndarray) -> np.ndarray:
        """Which view a scene's tile is; -1 is the whole."""
        return np.where(tile < 0, self.whole[scenes], self.whole[scenes] - self.tiles[scenes] + tile)

    def all(self, scenes: np.ndarray) -> np.ndarray:
        """All views of scenes that have as many."""
        return (self.whole[scenes][:, None] + np.arange(-self.tiles[scenes[0]], 1)).reshape(-1)

    def truth(self, scenes: np.ndarray, tile: np.ndarray) -> Tensor:
        """`[B, GRID², 5]`: colour, shape, size (0: table), and the object's centre in the view."""
        truth = self.objects[scenes][np.arange(len(scenes))[:, None], self.labels[self.number(scenes, tile)]]
        grid = np.where(tile[:, None] < 0, 1, self.grids[scenes])
        place = np.where(tile[:, None] < 0, 0, np.stack([tile % self.grids[scenes, 0], tile // self.grids[scenes, 0]], 1))
        truth[..., 3:] = truth[..., 3:] * grid[:, None] - (2 * place - grid + 1)[:, None]
        return torch.from_numpy(truth)

    def squeeze(self, scenes: np.ndarray, tile: np.ndarray) -> Tensor:
        """`[B]`: the logarithm of how much wider than high a pixel of the view is."""
        grid = np.where(tile[:, None] < 0, 1, self.grids[scenes])
        sides = np.array([(self.scenes[i].width, self.scenes[i].height) for i in scenes]) / grid
        return torch.from_numpy(np.log(sides[:, 0] / sides[:, 1])).float()
