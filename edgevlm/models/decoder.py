"""The language decoder that every family ends in, as a torch module around a KV cache of fixed capacity, and the smaller
modules that families share.

transformers' own modelling code runs unchanged: attention goes through its `AttentionInterface`, its cache is replaced
by one that hands new rows through, and what must stay one node becomes a standard ONNX operator (`TensorScatter`,
`Attention`, opset 24). Torch is needed, so only the workshop imports this module; the robot runs the graphs.

Why a bool mask and not the operator's own causality: https://onnx.ai/onnx/operators/onnx__Attention.html aligns
`is_causal` and `nonpad_kv_seqlen` differently from what a right-padded batch needs, and builders drop the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic
from transformers import AttentionInterface
from transformers.cache_utils import Cache, EncoderDecoderCache

__all__ = [
    "ATTENTION",
    "CachedDecoder",
    "CrossDecoder",
    "Embedding",
    "LastHiddenState",
    "NewRows",
    "StaticCache",
    "attention_node",
]

#: The name under which transformers finds the attention below.
ATTENTION = "edgevlm"


class NewRows(Cache):  # type: ignore[misc]  # transformers is not typed
    """Stands where transformers expects its cache; hands new keys and values through, the attention below stores them."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def get_mask_sizes(self, query: Any, *_: Any) -> tuple[Any, int]:
        return query, 0


class _CrossKeysKnown(EncoderDecoderCache):  # type: ignore[misc]
    """Tells an encoder-decoder model of transformers that its cross-attention keys and values are there already."""

    def __init__(self, cross: Sequence[Tensor]) -> None:
        self.self_attention_cache = NewRows()
        self.cross_attention_cache = NewRows()
        self.cross_attention_cache.layers = [_Layer(*pair) for pair in zip(cross[::2], cross[1::2], strict=True)]
        self.is_updated = dict.fromkeys(range(len(cross) // 2), True)

    def get_seq_length(self, *_: Any) -> int:
        return 0


@dataclass
class _Layer:
    keys: Tensor
    values: Tensor


class StaticCache:
    """The KV cache of one trace: what came in, what goes out, and the masks that layers share.

    `position_ids` `[B, S]` are places in the cache. `cross` and `cross_mask` (bool `[B, 1, S, cross_length]`) are what the
    decoder reads beside its own sequence.
    """

    def __init__(
        self, past: Sequence[Tensor], position_ids: Tensor, cross: Sequence[Tensor] = (), cross_mask: Tensor | None = None
    ) -> None:
        self.past, self.present = list(past), list(past)
        self.position_ids = position_ids
        self.start = position_ids.select(1, 0)
        self.masks: dict[int | None, Tensor] = {}
        self.cross, self.cross_mask = list(cross), cross_mask
        self.relative_bias: Tensor | None = None

    def store(self, index: int, new: Tensor) -> Tensor:
        past = self.past[index]
        inputs = [past, new, self.start]
        self.present[index] = symbolic("TensorScatter", inputs, {"axis": 2}, dtype=past.dtype, shape=past.shape, version=24)
        return self.present[index]

    def key_positions(self) -> Tensor:
        """int64 `[1, 1, 1, capacity]`."""
        return torch.arange(self.past[0].shape[2]).view(1, 1, 1, -1)

    def mask(self, window: int | None) -> Tensor:
        """bool `[B, 1, S, capacity]`, true where a query may look: not after itself, and inside its sliding window."""
        if window not in self.masks:
            keys = self.key_positions()
            queries = self.position_ids.unsqueeze(1).unsqueeze(-1)
            visible = keys <= queries
            self.masks[window] = visible if window is None else visible & (keys > queries - window)
        return self.masks[window]

    def bias(self, module: Any) -> Tensor:
        """T5's relative position bias `[B, H, S, capacity]` of its first layer, which all layers share (arXiv 1910.10683,
        section 2.1)."""
        if self.relative_bias is None:
            distance = self.key_positions().squeeze(1) - self.position_ids.unsqueeze(-1)
            bucket = module._relative_position_bucket(
                distance, bidirectional=False, num_buckets=module.relative_attention_num_buckets,
                max_distance=module.relative_attention_max_distance,
            )  # fmt: skip
            self.relative_bias = module.relative_attention_bias(bucket).permute(0, 3, 1, 2)
        return self.relative_bias


def attention_node(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The standard operator: query `[B, H, S, D]`, key and value `[B, H_kv, L, D]`, mask bool or float, broadcast to
    `[B, H, S, L]` → `[B, H, S, D]`."""
    inputs = [query, key, value] if mask is None else [query, key, value, mask]
    return symbolic("Attention", inputs, {"scale": scale}, dtype=query.dtype, shape=query.shape, version=24)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, edgevlm_cache: StaticCache | None = None, edgevlm_mask: Tensor | None = None,
    sliding_window: int | None = None, position_bias: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: query `[B, H, S, D]`, key and value `[B, H_kv, S, D]` → `[B, S, H, D]`."""
    mask, bias = edgevlm_mask if edgevlm_mask is not None else attention_mask, position_bias
    cache = edgevlm_cache
    if cache is not None and (getattr(module, "is_cross_attention", False) or not module.is_causal):
        key, value = cache.cross[2 * module.layer_idx : 2 * module.layer_idx + 2]
        mask, bias = cache.cross_mask, None
    elif cache is not None:
        key = cache.store(2 * module.layer_idx, key)
        value = cache.store(2 * module.layer_idx + 1, value)
        mask = cache.mask(sliding_window)
        if position_bias is not None:
            bias = cache.bias(module)
    if bias is not None:
        # One mask of floats: what may not be seen gets the least number there is, as transformers has it.
        bias = bias.to(query.dtype)
        mask = bias if mask is None else torch.where(mask, bias, torch.finfo(bias.dtype).min)
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    return attention_node(query, key, value, mask, scale).transpose(1, 2), None


# Not in transformers' table of mask functions, so a model hands no mask of its own to it.
AttentionInterface.register(ATTENTION, _attention)


class Embedding(nn.Module):
    """input_ids int64 `[B, S]` → `[B, S, hidden]`."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


class LastHiddenState(nn.Module):
    """A whole vision tower: pixel_values `[B, 3, H, W]` → every token of its last layer, `[B, tokens, width]`."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.tower(pixel_values=pixel_values).last_hidden_state


class CachedDecoder(nn.Module):
    """Language model and head around a KV cache that is updated in place.

    forward(inputs_embeds `[B, S, hidden]`, position_ids int64 `[B, S]`, last_token_index int64 `[B]`,
    past `2·layers × [B, H_kv, capacity, D]`) → logits `[B, 1, vocabulary]` of the chosen row, then the cache.
    New rows are written from `position_ids[:, 0]` on; a query sees the keys at positions up to its own. Rows of a
    right-padded batch write rubbish behind their end, which no query sees before it is overwritten.

    With `mrope`, int64 `[3, B, S]` follows: the positions that the rotary embedding turns by (time, height, width), which
    are other numbers than the places in the cache. With `cross_layers`, a bool mask `[B, S, cross_length]` and as many
    pairs `[B, H, cross_length, D]` follow.

    Families whose model is called in another way override `hidden_states`.
    """

    def __init__(
        self, language_model: nn.Module, lm_head: nn.Module, layers: int, cross_layers: int = 0, *, mrope: bool = False
    ) -> None:
        super().__init__()
        self.language_model, self.lm_head = language_model, lm_head
        self.layers, self.cross_layers, self.mrope = layers, cross_layers, mrope

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, last_token_index: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        past, rest = tensors[: 2 * self.layers], tensors[2 * self.layers :]
        turns, rest = (rest[0], rest[1:]) if self.mrope else (position_ids, rest)
        mask = rest[0].unsqueeze(1) if self.cross_layers else None
        cache = StaticCache(past, position_ids, rest[1:], mask)
        hidden = self.hidden_states(inputs_embeds, turns, cache)
        row = last_token_index.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
        return (self.lm_head(torch.gather(hidden, 1, row)), *cache.present)

    def hidden_states(self, inputs_embeds: Tensor, position_ids: Tensor, cache: StaticCache) -> Tensor:
        """`[B, S, hidden]`, what the head reads; `position_ids` are those that the rotary embedding turns by."""
        return self.language_model(
            inputs_embeds=inputs_embeds, position_ids=position_ids, past_key_values=NewRows(), use_cache=True,
            edgevlm_cache=cache,
        ).last_hidden_state  # fmt: skip


class CrossDecoder(CachedDecoder):
    """A decoder behind an encoder, as T5's: it counts its own positions and asks the cache for cross keys and values."""

    def hidden_states(self, inputs_embeds: Tensor, position_ids: Tensor, cache: StaticCache) -> Tensor:
        # The states themselves are not read, since keys and values are known; that they are there switches reading on.
        return self.language_model(
            inputs_embeds=inputs_embeds, encoder_hidden_states=inputs_embeds,
            past_key_values=_CrossKeysKnown(cache.cross), use_cache=True, edgevlm_cache=cache,
        ).last_hidden_state  # fmt: skip
