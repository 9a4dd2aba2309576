"""Which changes to combine: a choice from measured steps, without any model.

A step changed one group to one candidate, saved some (bytes or milliseconds) and lost some points. Of each group the steps that
are worth it form a chain, from the cheapest point on; all links of all chains, ordered by what they save for a lost point, are
the order in which changes are made. How many of them are made together is measured, since losses do not simply add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Move", "Option", "apply_moves", "count_within", "longest_within", "order_moves"]

#: Points that count as nothing.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Option:
    """A measured change: the group as this candidate saves `saved` and loses `drop` points against the float model."""

    group: str
    candidate: str
    saved: float
    drop: float


@dataclass(frozen=True)
class Move:
    """A change on top of those before: the group becomes `candidate`, which saves and costs that much more."""

    group: str
    candidate: str
    saved: float
    cost: float

    @property
    def worth(self) -> float:
        """Saved for a lost point."""
        return self.saved / self.cost if self.cost > _NOTHING else float("inf")


def order_moves(options: Sequence[Option]) -> list[Move]:
    """The moves, best first: those that cost nothing by what they save, then by what they save for a lost point.

    A score that went up counts as no loss: steps differ from float by chance, too, and a gain by chance pays for nothing.
    What saves nothing, or less than something that costs as little, is left out.
    """
    moves: list[Move] = []
    for group in dict.fromkeys(option.group for option in options):
        moves += _chain([option for option in options if option.group == group])
    order = {move: number for number, move in enumerate(moves)}
    return sorted(moves, key=lambda move: (-move.worth, -move.saved, order[move]))


def _chain(options: Sequence[Option]) -> list[Move]:
    """From nothing to the group's largest saving, each link worth less than the one before (the upper convex hull)."""
    links: list[Move] = []
    now = Option("", "", 0.0, 0.0)
    while further := [option for option in options if option.saved > now.saved]:
        moves = {option: _link(now, option) for option in further}
        now = max(further, key=lambda option: (moves[option].worth, moves[option].saved))
        links.append(moves[now])
    return links


def _link(now: Option, then: Option) -> Move:
    cost = max(then.drop, 0.0) - max(now.drop, 0.0)
    return Move(then.group, then.candidate, then.saved - now.saved, max(cost, 0.0))


def apply_moves(moves: Sequence[Move]) -> dict[str, str]:
    """The candidate of each group after these moves."""
    return {move.group: move.candidate for move in moves}


def count_within(moves: Sequence[Move], limit: float) -> int:
    """How many moves, in their order, cost no more than the limit if losses add up."""
    total = 0.0
    for count, move in enumerate(moves):
        total += move.cost
        if total > limit + _NOTHING:
            return count
    return len(moves)


def longest_within(count: int, first: int, within: Callable[[int], bool]) -> int:
    """The most of `count` moves for which `within` holds, found by halving, starting with the guess `first`.

    No moves at all are always within. Every answer other than that one was measured; where more moves may be within again after
    fewer were not, one such place is found, not surely the last.
    """
    good, bad, guess = 0, count + 1, min(max(first, 1), count)
    while bad - good > 1:
        good, bad = (guess, bad) if within(guess) else (good, guess)
        guess = (good + bad) // 2
    return good
