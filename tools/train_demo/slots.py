"""Teaches a fixed number of queries to hold a picture's objects, one object a query.

A Q-Former and a Perceiver resampler both press a picture into a few vectors. Learnt from answers alone, that takes
them hundreds of thousands of pictures, since nothing tells a query what to look for until the language model behind it
reads it well. Here they are told, before any language model is there: every query names the colour, shape and size of
its object, or that it has none, and where its centre lies (set prediction, as in Carion et al. 2020, arXiv
2005.12872). The heads are thrown away afterwards.

Which query is to have which object is decided by what the queries already say and by sixteen anchors, the middles of a
grid of four by four: queries that start with a place of their own do not have to quarrel over the first objects.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgevlm.scenes import COLOURS, SHAPES, SIZES

SLOTS = 16
WAVES = (1, 2, 4)
PLACE = 2 + 2 * 2 * len(WAVES)
CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1)  # 0: no object
DESCRIPTION = sum(CLASSES) + PLACE


def waves(centre: Tensor) -> Tensor:
    """`[..., 2]`, from -1 to 1, with sines and cosines beside it: small differences become easy to read."""
    angles = torch.cat([centre * (math.pi / 2 * k) for k in WAVES], -1)
    return torch.cat([centre, angles.sin(), angles.cos()], -1)


def describe(objects: Tensor) -> Tensor:
    """Objects `[..., 5]` (`Pictures.objects`) as vectors `[..., DESCRIPTION]`; all zero but three flags where there is none."""
    classes = [F.one_hot(objects[..., i].long(), n).float() for i, n in enumerate(CLASSES)]
    there = (objects[..., :1] > 0).float()
    return torch.cat([*classes, waves(objects[..., 3:]) * there], -1)


class Slots(nn.Module):
    """The heads that read the queries."""

    anchors: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classes = nn.Linear(width, sum(CLASSES))
        self.place = nn.Linear(width, PLACE)
        line = torch.linspace(-0.75, 0.75, 4)
        self.register_buffer("anchors", torch.cartesian_prod(line, line), persistent=False)

    @torch.no_grad()
    def assign(self, guesses: list[Tensor], place: Tensor, objects: Tensor) -> Tensor:
        """`[B, SLOTS]`: which row of `objects` `[B, 5, 5]` each query is to have, 0: none. The cheapest pair comes first."""
        centre = objects[:, 1:, None, 3:]
        cost = 2 * (place[:, None, :, :2] - centre).abs().sum(-1) + (self.anchors - centre).norm(dim=-1)
        for i, guess in enumerate(guesses):
            wanted = objects[:, 1:, i].long()[:, :, None].expand(-1, -1, SLOTS)
            cost = cost - guess.log_softmax(-1).transpose(1, 2).gather(1, wanted)
        cost = cost.masked_fill((objects[:, 1:, 0] == 0)[:, :, None], math.inf)
        chosen = torch.zeros(len(objects), SLOTS, dtype=torch.long)
        for _ in range(4):
            value, where = cost.flatten(1).min(1)
            row = value.isfinite().nonzero()[:, 0]
            which, query = where[row] // SLOTS, where[row] % SLOTS
            chosen[row, query] = which + 1
            cost[row, which] = math.inf
            cost[row, :, query] = math.inf
        return chosen

    def loss(self, queries: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and `[B, SLOTS, 5]`: the object that each query is to hold."""
        guesses, place = list(self.classes(queries).split(CLASSES, -1)), self.place(queries)
        chosen = self.assign(guesses, place, objects)
        truth = objects.gather(1, chosen[..., None].expand(-1, -1, 5))
        held = chosen > 0
        emptiness = torch.ones(CLASSES[0])
        emptiness[0] = 0.3
        loss = F.cross_entropy(guesses[0].flatten(0, 1), truth[..., 0].long().flatten(), emptiness)
        for i in (1, 2):
            loss = loss + F.cross_entropy(guesses[i][held], truth[..., i].long()[held])
        return loss + 2 * (place[held] - waves(truth[..., 3:][held])).abs().mean(), truth

    def found(self, queries: Tensor, objects: Tensor) -> float:
        """How many of the pictures are described without a mistake, in percent: to see how the teaching goes."""
        guesses, place = list(self.classes(queries).split(CLASSES, -1)), self.place(queries)
        chosen = self.assign(guesses, place, objects)
        truth = objects.gather(1, chosen[..., None].expand(-1, -1, 5))
        right = guesses[0].argmax(-1) == truth[..., 0]
        for i in (1, 2):
            right &= (guesses[i].argmax(-1) == truth[..., i]) | (chosen == 0)
        right &= ((place[..., :2] - truth[..., 3:]).abs().amax(-1) < 0.1) | (chosen == 0)
        return round(100 * float(right.all(1).float().mean()), 1)
