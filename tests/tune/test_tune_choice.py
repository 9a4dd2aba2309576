"""The order of changes and how many are made, on recorded measurements."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnx_ir")

from edgevlm.tune.choice import Move, Option, apply_moves, count_within, longest_within, order_moves

#: Of a small model with 1,000 questions: megabytes saved, points lost.
MEASURED = [
    Option("vision", "int8", 30.0, 0.1),
    Option("vision", "w8a8", 30.0, 0.3),  # as small as int8, and worse
    Option("vision", "int4", 35.0, 4.0),
    Option("projector", "int8", 1.0, -0.2),
    Option("projector", "int4", 1.2, 0.0),
    Option("attention", "int8", 60.0, 0.0),
    Option("attention", "int4", 70.0, 0.5),
    Option("mlp", "int8", 120.0, 0.2),
    Option("mlp", "int4", 140.0, 0.2),
    Option("head", "int8", 20.0, 0.4),
    Option("head", "int4", 25.0, 0.45),
    Option("tables", "int8", -0.1, -1.0),  # larger than before
]


def test_order_of_recorded_measurements() -> None:
    moves = order_moves(MEASURED)
    assert [(m.group, m.candidate) for m in moves] == [
        ("attention", "int8"), ("projector", "int4"), ("mlp", "int4"), ("vision", "int8"), ("head", "int4"),
        ("attention", "int4"), ("vision", "int4"),
    ]  # fmt: skip
    assert moves[5] == Move("attention", "int4", 10.0, 0.5)
    assert apply_moves(moves) == {"attention": "int4", "projector": "int4", "mlp": "int4", "vision": "int4", "head": "int4"}
    assert apply_moves(moves[:2]) == {"attention": "int8", "projector": "int4"}
    assert [count_within(moves, limit) for limit in (0.0, 0.19, 0.3, 0.75, 1.25, 100)] == [2, 2, 4, 5, 6, 7]


def test_nothing_to_order() -> None:
    assert order_moves([]) == []
    assert order_moves([Option("a", "int8", 0.0, 0.0), Option("a", "int4", -1.0, -5.0)]) == []
    assert count_within([], 1.0) == 0
    assert apply_moves([]) == {}


OPTIONS = st.lists(
    st.builds(
        Option, st.sampled_from("abc"), st.sampled_from(["int8", "w8a8", "int4"]), st.floats(-10, 100), st.floats(-2, 10)
    ),
    max_size=9,
    unique_by=lambda option: (option.group, option.candidate),
)


@given(OPTIONS)
def test_every_beginning_is_worth_it(options: list[Option]) -> None:
    """Each beginning is the best of its cost, if losses add up: what a fractional knapsack would take."""
    moves = order_moves(options)
    of = {(option.group, option.candidate): option for option in options}
    assert all(move.saved > 0 and move.cost >= 0 for move in moves)
    assert sorted((m.worth for m in moves), reverse=True) == [m.worth for m in moves]
    for count in range(len(moves) + 1):
        if count < len(moves) and moves[count].worth == float("inf"):
            continue  # what costs nothing is made in any case
        chosen = apply_moves(moves[:count])
        saved = sum(of[pair].saved for pair in chosen.items())
        cost = sum(max(of[pair].drop, 0) for pair in chosen.items())
        assert saved == pytest.approx(sum(move.saved for move in moves[:count]))
        assert cost == pytest.approx(sum(move.cost for move in moves[:count]), abs=1e-6)
        groups = sorted({option.group for option in options})
        for mixed in itertools.product(*([None, *(o for o in options if o.group == g)] for g in groups)):
            other = [option for option in mixed if option]
            if sum(max(o.drop, 0) for o in other) <= cost:
                assert sum(o.saved for o in other) <= saved + 1e-6


@given(st.integers(1, 40), st.integers(0, 50), st.integers(0, 40))
def test_longest_is_found_by_halving(count: int, guess: int, true: int) -> None:
    asked: list[int] = []

    def within(number: int) -> bool:
        asked.append(number)
        return number <= true

    assert longest_within(count, guess, within) == min(true, count)
    assert len(asked) == len(set(asked)) <= 8
    assert all(1 <= number <= count for number in asked)
    assert asked[0] == min(max(guess, 1), count)


def test_what_is_chosen_was_within() -> None:
    """Losses that go up and down: what is answered was measured to be within."""
    good = {1, 2, 5, 9}
    for guess in range(12):
        assert longest_within(10, guess, good.__contains__) in {0, *good}
    assert longest_within(10, 4, lambda _: False) == 0
