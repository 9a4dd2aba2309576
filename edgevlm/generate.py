"""Decoding: the decoder part around its KV cache, prefill in chunks, and the choice of the next token.

It knows token ids and embeddings; nothing of text, pictures or families.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .bundle import CrossAttention, KVCache
from .errors import CapacityError, InputError
from .runtimes import Memory, PartSession, State, Tensor

__all__ = ["CHUNK", "Decoder", "PrefixCache", "Sampling", "choose_token"]

#: Rows of a prompt that go through the decoder at once. Activations do not grow with the prompt then; the attention scores of
#: a chunk still grow with what is in the cache, by `CHUNK · heads` numbers a position, one layer at a time.
CHUNK = 256
#: Attention costs by capacity, not by fill, so the cache grows in steps of this many positions.
STEP = 256


class Decoder:
    """The decoder part with a KV cache for `batch` sequences that grows up to `capacity` positions.

    With `cross`, it also reads what `remember` was given last.
    """

    def __init__(
        self, session: PartSession, kv: KVCache, capacity: int, batch: int = 1, cross: CrossAttention | None = None
    ) -> None:
        self.capacity, self._session, self._batch, self._cross = capacity, session, batch, cross
        pairs = {
            f"past_key_values.{layer}.{which}": f"present.{layer}.{which}"
            for layer in range(kv.layers)
            for which in ("key", "value")
        }
        self._state: State = session.new_state(pairs, batch, min(STEP, capacity))
        self._memory: Memory | None = None
        self._blocks: list[tuple[Hashable, int]] = []  # what the memory holds, and how many rows of each
        if cross:
            names = [f"cross_key_values.{layer}.{which}" for layer in range(cross.layers) for which in ("key", "value")]
            self._memory = session.new_memory(names, batch)

    @property
    def cross_length(self) -> int:
        """Rows that cross-attention can see, 0 without."""
        return sum(rows for _, rows in self._blocks)

    def remember(self, blocks: Sequence[tuple[Hashable, Callable[[], Mapping[str, Tensor]]]]) -> int:
        """Makes these blocks of keys and values, in this order, what cross-attention reads.

        Each has a key that stands for its content, and is made (tensors `[B, H, rows, D]`) only where it is not there
        already: what a new list has in common with the beginning of the last one stays as it is. Returns how many were made.
        """
        if self._memory is None:
            return 0
        kept = 0
        while kept < min(len(blocks), len(self._blocks)) and blocks[kept][0] == self._blocks[kept][0]:
            kept += 1
        made = [(key, make()) for key, make in blocks[kept:]]
        del self._blocks[kept:]
        self._memory.truncate(self.cross_length)
        if made:
            self._memory.append(*(tensors for _, tensors in made))
        self._blocks += [(key, next(iter(tensors.values())).shape[2]) for key, tensors in made]
        return len(made)

    def forward(
        self,
        embeds: Tensor,
        start: np.ndarray,
        last: np.ndarray,
        visible: np.ndarray | None = None,
        turns: np.ndarray | None = None,
    ) -> np.ndarray:
        """Writes rows `[B, S, hidden]` at positions `start[b]`… and returns the logits `[B, vocabulary]` of row `last[b]`.

        `visible`, bool `[B, S, cross_length]`, says what each row sees through cross-attention; `turns`, int64 `[3, B, S]`,
        by what positions the rotary embedding turns it, for models where that is another number. Rows behind `last[b]` are
        padding: they are overwritten before anything looks at them.
        """
        length = embeds.shape[1]
        self._reserve(int(start.max()) + length)
        feeds = {
            "inputs_embeds": embeds,
            "position_ids": start[:, None] + np.arange(length)[None],
            "last_token_index": last,
        }
        if turns is not None:
            feeds["mrope_position_ids"] = turns
        if self._cross is not None and self._memory is not None:
            if not self._memory.length:  # an operator wants at least one row, if only to look away from it
                shape = (self._batch, self._cross.heads, 1, self._cross.head_dim)
                self._memory.append(dict.fromkeys(self._memory.inputs, np.zeros(shape, self._cross.dtype)))
            blind = np.zeros((*embeds.shape[:2], 1), bool)
            feeds["cross_attention_mask"] = visible if visible is not None and visible.shape[2] else blind
        return self._session.run(feeds, self._state, self._memory)["logits"][:, 0].astype(np.float32)

    def _reserve(self, positions: int) -> None:
        if positions > self.capacity:
            raise CapacityError(
                f"The sequence needs {positions} positions; the KV cache was loaded with a capacity of {self.capacity}."
            )
        if positions > self._state.capacity:
            self._state.grow(min(self.capacity, -(-positions // STEP) * STEP))


class PrefixCache:
    """One sequence whose beginning is kept: what the next prompt has in common with it is not computed again.

    Each position has a key that stands for all that it depends on: the token, or the picture's digest and the place in
    it. Not thread-safe.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.keys: list[Hashable] = []

    def prefill(
        self,
        keys: Sequence[Hashable],
        embed: Callable[[int, int], Tensor],
        visible: np.ndarray | None = None,
        turns: np.ndarray | None = None,
    ) -> tuple[np.ndarray, int]:
        """Logits `[vocabulary]` behind the last key, and how many positions were reused.

        `embed(first, end)` gives the embeddings `[end - first, hidden]` of the prompt's rows, `visible`, bool
        `[positions, cross_length]`, what each sees through cross-attention, `turns`, int64 `[3, positions]`, its rotary
        positions.
        """
        reused = 0
        # The last row is always computed: its logits are what is asked for.
        while reused < min(len(self.keys), len(keys) - 1) and self.keys[reused] == keys[reused]:
            reused += 1
        del self.keys[reused:]
        logits = np.empty(0, np.float32)
        for first in range(reused, len(keys), CHUNK):
            end = min(first + CHUNK, len(keys))
            rows = embed(first, end)[None]
            seen = None if visible is None else visible[None, first:end]
            turned = None if turns is None else turns[:, None, first:end]
            logits = self.decoder.forward(rows, np.array([first]), np.array([end - first - 1]), seen, turned)[0]
            self.keys.extend(keys[first:end])
        return logits, reused

    def extend(self, key: Hashable, row: Any, visible: np.ndarray | None = None, turn: np.ndarray | None = None) -> np.ndarray:
        """One more position, `[hidden]`, and the logits behind it; it sees `visible`, bool `[cross_length]`, and is turned by
        `turn`, int64 `[3]`."""
        seen = None if visible is None else visible[None, None]
        turned = None if turn is None else turn[:, None, None]
        logits = self.decoder.forward(row[None, None], np.array([len(self.keys)]), np.array([0]), seen, turned)[0]
        self.keys.append(key)
        return logits


@dataclass(frozen=True)
class Sampling:
    """How an answer is decoded: greedily unless there is a temperature. Limits as in transformers' `generate`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_new_tokens: int = 128
    ignore_stop: bool = False
    """Go on where the model would end its answer."""

    def __post_init__(self) -> None:
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens!r}; it is a whole number of 1 or more.")
        for name, kind in (("temperature", (int, float)), ("top_p", (int, float)), ("top_k", int), ("seed", int)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                raise InputError(f"{name} is {value!r}; it is a {'whole number' if kind is int else 'number'}.")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; it is 0 (greedy) or more.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it is above 0 and at most 1.")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it is 1 or more.")
        if not self.temperature and (self.top_p is not None or self.top_k is not None):
            raise InputError("top_p and top_k choose among sampled tokens; give a temperature above 0 with them.")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed is {self.seed}; it is 0 or more.")

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


def choose_token(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """The next token from logits `[vocabulary]`: temperature, then top-k, then top-p, then a draw."""
    if not sampling.temperature:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: sampling.top_k]
    with np.errstate(over="ignore"):  # a temperature near 0 leaves the largest alone
        weights = np.exp((logits[order].astype(np.float64) - float(logits[order[0]])) / sampling.temperature)
    weights /= weights.sum()
    if sampling.top_p is not None:
        # The smallest set whose probability reaches top_p.
        keep = int(np.searchsorted(np.cumsum(weights), sampling.top_p, "left")) + 1
        order, weights = order[:keep], weights[:keep]
        weights /= weights.sum()
    return int(rng.choice(order, p=weights))
