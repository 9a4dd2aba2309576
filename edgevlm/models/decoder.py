"""The language decoder that every family ends in, as a torch module around a KV cache of fixed capacity.

transformers' own modelling code runs unchanged: attention goes through its `AttentionInterface`, its cache is replaced
by one that hands new rows through, and what must stay one node becomes a standard ONNX operator (`TensorScatter`,
`Attention`, opset 24). Torch is needed, so only the workshop imports this module; the robot runs the graphs.

Why a bool mask and not the operator's own causality: https://onnx.ai/onnx/operators/onnx__Attention.html aligns
`is_causal` and `nonpad_kv_seqlen` differently from what a right-padded batch needs, and builders drop the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic
from transformers import AttentionInterface
from transformers.cache_utils import Cache

__all__ = ["ATTENTION", "CachedDecoder"]

#: The name under which transformers finds the attention below.
ATTENTION = "edgevlm"


class _NewRows(Cache):  # type: ignore[misc]  # transformers is not typed
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


class _StaticCache:
    """The KV cache of one trace: what came in, what goes out, and the masks that layers share."""

    def __init__(self, past: Sequence[Tensor], position_ids: Tensor) -> None:
        self.past, self.present = list(past), list(past)
        self.position_ids = position_ids
        self.start = position_ids.select(1, 0)
        self.masks: dict[int | None, Tensor] = {}

    def store(self, index: int, new: Tensor) -> Tensor:
        past = self.past[index]
        inputs = [past, new, self.start]
        self.present[index] = symbolic("TensorScatter", inputs, {"axis": 2}, dtype=past.dtype, shape=past.shape, version=24)
        return self.present[index]

    def mask(self, window: int | None) -> Tensor:
        """bool `[B, 1, S, capacity]`, true where a query may look: not after itself, and inside its sliding window."""
        if window not in self.masks:
            keys = torch.arange(self.past[0].shape[2]).view(1, 1, 1, -1)
            queries = self.position_ids.unsqueeze(1).unsqueeze(-1)
            visible = keys <= queries
            self.masks[window] = visible if window is None else visible & (keys > queries - window)
        return self.masks[window]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, edgevlm_cache: _StaticCache | None = None, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: query `[B, H, S, D]`, key and value `[B, H_kv, S, D]` → `[B, S, H, D]`."""
    mask = attention_mask
    if edgevlm_cache is not None:
        key = edgevlm_cache.store(2 * module.layer_idx, key)
        value = edgevlm_cache.store(2 * module.layer_idx + 1, value)
        mask = edgevlm_cache.mask(sliding_window)
    inputs = [query, key, value] if mask is None else [query, key, value, mask]
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    out = symbolic("Attention", inputs, {"scale": scale}, dtype=query.dtype, shape=query.shape, version=24)
    return out.transpose(1, 2), None


# Not in transformers' table of mask functions, so a model hands no mask of its own to it.
AttentionInterface.register(ATTENTION, _attention)


class CachedDecoder(nn.Module):
    """Language model and head around a KV cache that is updated in place.

    forward(inputs_embeds `[B, S, hidden]`, position_ids int64 `[B, S]`, last_token_index int64 `[B]`,
    past `2·layers × [B, H_kv, capacity, D]`) → logits `[B, 1, vocabulary]` of the chosen row, then the cache.
    New rows are written from `position_ids[:, 0]` on; a query sees the keys at positions up to its own. Rows of a
    right-padded batch write rubbish behind their end, which no query sees before it is overwritten.
    """

    def __init__(self, language_model: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.language_model, self.lm_head = language_model, lm_head

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, last_token_index: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        cache = _StaticCache(past, position_ids)
        hidden = self.language_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=_NewRows(),
            use_cache=True,
            edgevlm_cache=cache,
        ).last_hidden_state
        row = last_token_index.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
        return (self.lm_head(torch.gather(hidden, 1, row)), *cache.present)
