"""The next token against transformers' own processors; the kept prefix against decoding from the start."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
import torch
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from edgevlm import generate
from edgevlm.bundle import Bundle
from edgevlm.errors import CapacityError, InputError
from edgevlm.generate import Decoder, PrefixCache, Sampling, choose_token
from edgevlm.runtimes import open_part


class Draw(np.random.Generator):
    """Notes what a token is drawn from."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))
        self.distribution: dict[int, float] = {}

    def choice(self, a: Any, p: Any = None) -> Any:  # type: ignore[override]
        self.distribution = {int(token): float(probability) for token, probability in zip(a, p, strict=True)}
        return super().choice(a, p=p)


@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    top_k=st.none() | st.sampled_from([1, 2, 17, 50, 64, 1000]),
    top_p=st.none() | st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_distribution_is_that_of_transformers(
    seed: int, spread: float, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = (np.random.default_rng(seed).standard_normal(64) * spread).astype(np.float32)
    draw = Draw()
    token = choose_token(logits, Sampling(temperature, top_p, top_k), draw)
    assert token in draw.distribution
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for wrapper in (
        TemperatureLogitsWarper(temperature),
        *([TopKLogitsWarper(top_k)] if top_k else []), *([TopPLogitsWarper(top_p)] if top_p else []),
    ):  # fmt: skip
        scores = wrapper(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    found = np.zeros(64)
    found[list(draw.distribution)] = list(draw.distribution.values())
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_greedy_is_the_largest() -> None:
    logits = np.array([0.5, 3.0, -1.0, 3.0, 2.0], np.float32)
    for sampling in (
        Sampling(),
        Sampling(temperature=0),
        Sampling(seed=3),
        Sampling(temperature=1.0, top_k=1),
        Sampling(1.0, top_p=1e-9),
    ):
        assert choose_token(logits, sampling, sampling.generator()) == 1, "the first of equals"
    for temperature in (1e-3, 1e-30, 1e-300, 5e-324):
        sampling = Sampling(temperature, seed=0)
        with np.errstate(all="raise", under="ignore"):
            assert choose_token(logits, sampling, sampling.generator()) in (1, 3)


def test_draws_follow_the_distribution() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    sampling = Sampling(temperature=1.0, seed=0)
    rng = sampling.generator()
    counts = np.bincount(
        [choose_token(np.log(probabilities).astype(np.float32), sampling, rng) for _ in range(4000)], minlength=4
    )
    np.testing.assert_allclose(counts / 4000, probabilities, atol=0.03)


def test_same_seed_same_tokens() -> None:
    logits = np.random.default_rng(0).standard_normal((40, 300)).astype(np.float32)

    def tokens(seed: int | None) -> list[int]:
        sampling = Sampling(temperature=1.5, top_p=0.95, seed=seed)
        rng = sampling.generator()
        return [choose_token(row, sampling, rng) for row in logits]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"), ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"), ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": True}, "temperature is True"), ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"), ({"temperature": 1.0, "top_p": float("nan")}, "top_p is nan"),
        ({"temperature": 1.0, "top_p": "most"}, "top_p is 'most'"), ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_k": 1.5}, "top_k is 1.5"), ({"temperature": 1.0, "top_k": True}, "top_k is True"),
        ({"top_k": 5}, "temperature above 0"), ({"temperature": 0, "top_p": 0.5}, "temperature above 0"),
        ({"seed": -1}, "seed is -1"), ({"seed": 1.5}, "seed is 1.5"), ({"seed": "x"}, "seed is 'x'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
    ],
)  # fmt: skip
def test_invalid_sampling(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Sampling(**values)


# ------------------------------------------------------------------------------------ the kept prefix


@pytest.fixture(scope="module")
def make_cache(bundle: Path) -> Callable[[int], PrefixCache]:
    manifest = Bundle.open(bundle).manifest
    session, _ = open_part(bundle / "onnx" / "decoder.onnx", "decoder", manifest.parts["decoder"], backend="cpu", threads=1)
    return lambda capacity: PrefixCache(Decoder(session, manifest.kv_cache, capacity))


class Prompt:
    """Keys, and embeddings that depend on nothing but them; notes which rows were asked for."""

    def __init__(self, keys: list[Hashable]) -> None:
        self.keys, self.asked = keys, []

    def __call__(self, first: int, end: int) -> np.ndarray:
        self.asked.append((first, end))
        return np.stack([row_of(key) for key in self.keys[first:end]])


def row_of(key: Hashable) -> np.ndarray:
    return np.random.default_rng(int.from_bytes(repr(key).encode(), "little")).standard_normal(64, np.float32)


def prefill(cache: PrefixCache, keys: list[Hashable]) -> tuple[np.ndarray, int, list[tuple[int, int]]]:
    prompt = Prompt(keys)
    logits, reused = cache.prefill(keys, prompt)
    assert cache.keys == keys
    return logits, reused, prompt.asked


QUESTION: list[Hashable] = [1, *[("picture", i) for i in range(12)], 30, 31, 32]


@pytest.mark.parametrize(
    ("then", "reused"),
    [
        (QUESTION, 15),  # the last row is computed in any case
        (QUESTION[:10], 9),
        ([*QUESTION, 40, 41], 16),
        ([*QUESTION[:14], 50, 51, 52, 53], 14),
        ([1, *[("other", i) for i in range(12)], 30, 31, 32], 1),
        ([2, *QUESTION[1:]], 0),
        ([1], 0),
    ],
)
def test_common_beginning_is_reused(make_cache: Callable[[int], PrefixCache], then: list[Hashable], reused: int) -> None:
    fresh = prefill(make_cache(64), then)
    assert fresh[1:] == (0, [(0, len(then))])
    cache = make_cache(64)
    prefill(cache, QUESTION)
    logits, count, asked = prefill(cache, then)
    assert (count, asked) == (reused, [(reused, len(then))])
    np.testing.assert_allclose(logits, fresh[0], atol=1e-5)
    extended = [c.extend(77, row_of(77)) for c in (cache, make_cache(64)) if c is cache or prefill(c, then)]
    np.testing.assert_allclose(*extended, atol=1e-5)


def test_answer_is_part_of_the_kept_prefix(make_cache: Callable[[int], PrefixCache]) -> None:
    cache = make_cache(64)
    prefill(cache, QUESTION)
    for token in (90, 91):
        cache.extend(token, row_of(token))
    whole = [*QUESTION, 90, 91, 60, 61]
    logits, reused, _ = prefill(cache, whole)
    assert reused == len(QUESTION) + 2
    np.testing.assert_allclose(logits, prefill(make_cache(64), whole)[0], atol=1e-5)
    # Back to a shorter prompt: what lies behind it is not seen.
    logits, reused, _ = prefill(cache, [*QUESTION[:5], 8])
    assert reused == 5
    np.testing.assert_allclose(logits, prefill(make_cache(64), [*QUESTION[:5], 8])[0], atol=1e-5)


def test_decoding_is_prefilling(make_cache: Callable[[int], PrefixCache]) -> None:
    cache = make_cache(64)
    prefill(cache, QUESTION)
    for token in (5, 6, 7):
        logits = cache.extend(token, row_of(token))
    np.testing.assert_allclose(logits, prefill(make_cache(64), [*QUESTION, 5, 6, 7])[0], atol=1e-5)


def test_long_prompts_go_through_in_chunks(make_cache: Callable[[int], PrefixCache], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "CHUNK", 7)
    monkeypatch.setattr(generate, "STEP", 8)
    cache = make_cache(40)
    logits, _, asked = prefill(cache, QUESTION)
    assert asked == [(0, 7), (7, 14), (14, 16)]
    assert cache.decoder._state.capacity == 16
    monkeypatch.undo()
    np.testing.assert_allclose(logits, prefill(make_cache(40), QUESTION)[0], atol=1e-5)
    longer = [*QUESTION, *range(100, 124)]
    logits, reused, _ = prefill(cache, longer)
    assert reused == len(QUESTION)
    assert cache.decoder._state.capacity == 40, "it grew, and no further than it may"
    np.testing.assert_allclose(logits, prefill(make_cache(40), longer)[0], atol=1e-5)


def test_capacity(make_cache: Callable[[int], PrefixCache]) -> None:
    cache = make_cache(18)
    prefill(cache, QUESTION)
    for token in (5, 6):
        expected = cache.extend(token, row_of(token))
    with pytest.raises(CapacityError, match=r"needs 19 positions; .* capacity of 18"):
        cache.extend(7, row_of(7))
    # What is there is still right.
    assert cache.keys == [*QUESTION, 5, 6]
    np.testing.assert_allclose(prefill(cache, [*QUESTION, 5, 6])[0], expected, atol=1e-5)
    with pytest.raises(CapacityError, match="needs 40 positions"):
        cache.prefill(list(range(40)), Prompt(list(range(40))))
    np.testing.assert_allclose(prefill(cache, QUESTION)[0], prefill(make_cache(18), QUESTION)[0], atol=1e-5)


def test_failure_in_the_middle_of_a_prompt(make_cache: Callable[[int], PrefixCache], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "CHUNK", 4)
    cache = make_cache(64)
    prefill(cache, QUESTION)
    other: list[Hashable] = [*QUESTION[:3], *range(200, 212)]

    def fails(first: int, end: int) -> np.ndarray:
        if first > 6:
            raise KeyboardInterrupt
        return Prompt(other)(first, end)

    with pytest.raises(KeyboardInterrupt):
        cache.prefill(other, fails)
    assert cache.keys == other[:7], "the rows that are computed, and no others"
    np.testing.assert_allclose(prefill(cache, other)[0], prefill(make_cache(64), other)[0], atol=1e-5)


# ------------------------------------------------------------------------------------------- remembering


class Cross:
    """The decoder of a Flamingo, and blocks of keys and values that depend on nothing but their names."""

    def __init__(self, bundle: Path) -> None:
        self.manifest = Bundle.open(bundle).manifest
        part = self.manifest.parts["decoder"]
        self.session, _ = open_part(bundle / part.file, "decoder", part, backend="cpu", threads=1)
        self.asked: list[Hashable] = []

    def decoder(self, batch: int = 1) -> Decoder:
        return Decoder(self.session, self.manifest.kv_cache, 64, batch, self.manifest.cross_attention)

    def blocks(self, *names: str) -> list[tuple[Hashable, Callable[[], Mapping[str, np.ndarray]]]]:
        return [(name, lambda name=name: self._made(name)) for name in names]  # type: ignore[misc]

    def _made(self, name: str) -> Mapping[str, np.ndarray]:
        self.asked.append(name)
        cross = self.manifest.cross_attention
        assert cross is not None
        rng = np.random.default_rng(len(name) + sum(map(ord, name)))
        shape = (1, cross.heads, len(name), cross.head_dim)
        names = [f"cross_key_values.{layer}.{which}" for layer in range(cross.layers) for which in ("key", "value")]
        return {tensor: rng.standard_normal(shape, np.float32) for tensor in names}

    def look(self, decoder: Decoder, visible: np.ndarray | None = None) -> np.ndarray:
        """Logits of a prompt of which each row sees everything, or what `visible` says."""
        rows = np.random.default_rng(0).standard_normal((1, 5, self.manifest.hidden_size), np.float32)
        seen = np.ones((1, 5, decoder.cross_length), bool) if visible is None else visible
        return decoder.forward(rows, np.array([0]), np.array([4]), seen)

    def new(self, *names: str) -> np.ndarray:
        decoder = self.decoder()
        decoder.remember(self.blocks(*names))
        return self.look(decoder)


@pytest.fixture(scope="module")
def cross(tiny: Callable[[str], Any]) -> Cross:
    return Cross(tiny("flamingo-every-second").bundle)


@pytest.mark.parametrize(
    ("then", "made"),
    [
        (["aa", "bbb"], []),
        (["aa", "bbb", "c"], ["c"]),
        (["aa", "bbb", "c", "aa"], ["c", "aa"]),
        (["aa"], []),
        (["aa", "c"], ["c"]),
        (["bbb"], ["bbb"]),
        (["bbb", "aa"], ["bbb", "aa"]),
        (["c"], ["c"]),
        ([], []),
    ],
    ids=str,
)
def test_what_is_remembered_is_not_made_again(cross: Cross, then: list[str], made: list[str]) -> None:
    decoder = cross.decoder()
    assert decoder.cross_length == 0
    assert decoder.remember(cross.blocks("aa", "bbb")) == 2
    assert decoder.cross_length == 5
    cross.look(decoder)
    cross.asked.clear()
    assert decoder.remember(cross.blocks(*then)) == len(made)
    assert cross.asked == made
    assert decoder.cross_length == sum(map(len, then))
    np.testing.assert_allclose(cross.look(decoder), cross.new(*then), atol=1e-5)


def test_what_is_remembered_matters(cross: Cross) -> None:
    looks = [cross.new(*names) for names in ([], ["aa"], ["bb"], ["aa", "bb"], ["aaaa"])]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(looks) for b in looks[:i])


def test_what_is_not_visible_is_as_if_it_were_not_there(cross: Cross) -> None:
    decoder = cross.decoder()
    decoder.remember(cross.blocks("aa", "bbb"))
    only = np.repeat(np.array([[[False, False, True, True, True]]]), 5, 1)
    np.testing.assert_allclose(cross.look(decoder, only), cross.new("bbb"), atol=1e-5)
    np.testing.assert_allclose(cross.look(decoder, only & False), cross.new(), atol=1e-5)


def test_nothing_remembered_can_be_looked_at_again_and_again(cross: Cross) -> None:
    decoder = cross.decoder()
    blind = cross.look(decoder)
    for names in ([], ["aa"], [], [], ["aa", "bbb"], []):
        decoder.remember(cross.blocks(*names))
        np.testing.assert_allclose(cross.look(decoder), cross.new(*names), atol=1e-5)
    np.testing.assert_allclose(cross.look(decoder), blind, atol=1e-5)


def test_a_block_that_cannot_be_made_leaves_what_was_there(cross: Cross) -> None:
    decoder = cross.decoder()
    decoder.remember(cross.blocks("aa", "bbb"))

    def fails() -> Mapping[str, np.ndarray]:
        raise KeyboardInterrupt

    for broken in ([*cross.blocks("aa", "c"), ("d", fails)], [("d", fails)]):
        with pytest.raises(KeyboardInterrupt):
            decoder.remember(broken)
        np.testing.assert_allclose(cross.look(decoder), cross.new("aa", "bbb"), atol=1e-5)
        assert decoder.remember(cross.blocks("aa", "bbb")) == 0
    assert decoder.remember(cross.blocks("aa", "d")) == 1
    np.testing.assert_allclose(cross.look(decoder), cross.new("aa", "d"), atol=1e-5)


def test_a_decoder_without_cross_attention_remembers_nothing(make_cache: Callable[[int], PrefixCache]) -> None:
    decoder = make_cache(16).decoder
    assert decoder.remember([("a", dict)]) == 0
    assert decoder.cross_length == 0
