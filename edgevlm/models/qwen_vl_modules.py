"""Qwen-VL's torch modules (Bai et al. 2023, arXiv 2308.12966), written from the paper and from what the published files of
Qwen/Qwen-VL say: `modeling_qwen.py`, `visual.py` and the names and shapes of the weights.

A vision tower with absolute positions that are interpolated to the picture's grid, a resampler of one cross-attention layer
whose queries and keys have 2-D sine positions, and a decoder with fused QKV, rotary positions, RMS norms and SwiGLU.
`state_dict()` has the published names. Torch is needed, so only the workshop imports this module; it knows nothing of
tokenizers, prompts or bundles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .decoder import ATTENTION, CachedDecoder, StaticCache, attention_node

__all__ = [
    "Decoder",
    "QwenVL",
    "QwenVLConfig",
    "Resampler",
    "VisionEncoder",
    "VisualConfig",
    "resize_matrix",
    "sine_positions",
]

#: Side of the grid of positions that the tower was trained with, whatever the picture's (visual.py).
PRETRAINED_GRID = 16
#: Width of the resampler's heads: it has `output_dim // 128` of them (visual.py).
RESAMPLER_HEAD = 128
#: Of the norms in the vision tower and the resampler; the decoder's is in the configuration.
VISUAL_EPSILON = 1e-6

#: (layer, query, key, value), `[B, H, S, D]` each → what was read, `[B, H, S, D]`.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass
class VisualConfig:
    """The entry `visual` of `config.json`. `n_queries` is not in the published ones, whose resampler has 256."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float
    output_dim: int
    image_start_id: int
    n_queries: int = 256

    @property
    def grid(self) -> int:
        """Patches along a side of the picture."""
        return self.image_size // self.patch_size

    @property
    def query_grid(self) -> int:
        """Queries along a side: they stand on a square, and what is over has no place."""
        return math.isqrt(self.n_queries)

    @property
    def places(self) -> int:
        """Places that a picture takes in the prompt."""
        return self.query_grid**2


@dataclass
class QwenVLConfig:
    """`config.json`. transformers sets `_attn_implementation` in all its configurations; here it says whether a graph is being
    traced."""

    visual: VisualConfig
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    seq_length: int = 2048
    max_position_embeddings: int = 8192
    layer_norm_epsilon: float = 1e-6
    rotary_emb_base: float = 10000.0
    rotary_pct: float = 1.0
    no_bias: bool = True
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    _attn_implementation: str = "eager"

    @property
    def head_dim(self) -> int:
        """Width of a head of the decoder."""
        return self.hidden_size // self.num_attention_heads

    @property
    def context_length(self) -> int:
        """The longest sequence. Beyond `seq_length`, the published `use_dynamic_ntk` chooses the rotary base by the length of
        the prompt, which no cached decoder can follow; without it the same angles serve any length."""
        return self.seq_length if self.use_dynamic_ntk else self.max_position_embeddings


# ------------------------------------------------------------------------------------------ positions


def sine_positions(width: int, side: int) -> Tensor:
    """float32 `[side², width]`: sines and cosines of the column, then of the row, of each place of a square, a quarter of the
    width each (visual.py, after He et al. 2022, arXiv 2111.06377)."""
    if width % 4:
        raise ValueError(f"a width of {width} cannot be split into sines and cosines of column and row")
    place = torch.arange(side, dtype=torch.float64)
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = place[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, 0)
    return torch.cat([columns, rows], 1).float()


def resize_matrix(source: int, target: int) -> Tensor | None:
    """float32 `[1, target², source²]`, which takes a table of positions on a square of `source`² to one of `target`² places
    bicubically, as `get_abs_pos` does (visual.py); None where they are equal.

    Interpolation is linear, so what it makes of the identity is its matrix.
    """
    if source == target:
        return None
    identity = torch.eye(source**2).reshape(1, source**2, source, source)
    made = functional.interpolate(identity, size=(target, target), mode="bicubic", align_corners=False)
    return made.flatten(2).transpose(1, 2)


def resized(matrix: Tensor | None, table: Tensor) -> Tensor:
    """A table of positions `[L, C]` on another grid, `[1, M, C]`, computed in float32."""
    table = table.unsqueeze(0)
    return table if matrix is None else (matrix.float() @ table.float()).to(table.dtype)


# ------------------------------------------------------------------------------------------- pictures


def attend(config: QwenVLConfig, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """query `[B, H, S, D]`, key and value `[B, H, L, D]`, mask of floats → `[B, H, S, D]`."""
    scale = query.shape[-1] ** -0.5
    if config._attn_implementation == ATTENTION:
        return attention_node(query, key, value, mask, scale)
    return functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)


def split_heads(rows: Tensor, heads: int) -> Tensor:
    """`[B, L, H·D]` → `[B, H, L, D]`."""
    return rows.view(*rows.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(heads: Tensor) -> Tensor:
    """`[B, H, L, D]` → `[B, L, H·D]`."""
    return heads.transpose(1, 2).flatten(2)


class VisualAttention(nn.Module):
    """Self-attention `[B, L, width]`. The rows of `in_proj` are query, key and value of the first head, then of the second and
    so on (visual.py, VisualAttention), not all queries first."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.config, width = config, config.visual.width
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        heads = split_heads(self.in_proj(hidden), self.config.visual.heads)
        return self.out_proj(merge_heads(attend(self.config, *heads.chunk(3, -1))))


class VisualBlock(nn.Module):
    """A layer of the tower, norms first (visual.py, VisualAttentionBlock)."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        width = config.visual.width
        inner = int(width * config.visual.mlp_ratio)
        self.ln_1, self.ln_2 = nn.LayerNorm(width, VISUAL_EPSILON), nn.LayerNorm(width, VISUAL_EPSILON)
        self.attn = VisualAttention(config)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, inner))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(inner, width))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.ln_1(hidden))
        return hidden + self.mlp(self.ln_2(hidden))


class PackedProjections(nn.Module):
    """Projections of queries, keys and values, and of what was read. `state_dict()` has the first three as one matrix, under
    the names of torch's MultiheadAttention, which the published resampler is made with; apart, each is a graph's weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.register_state_dict_post_hook(_pack)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_unpack)  # type: ignore[no-untyped-call]


#: The order in which torch's MultiheadAttention packs them.
PACKED = ("query", "key", "value")


def _pack(_: nn.Module, state: dict[str, Tensor], prefix: str, __: Any) -> None:
    for kind in ("weight", "bias"):
        state[f"{prefix}in_proj_{kind}"] = torch.cat([state.pop(f"{prefix}{name}.{kind}") for name in PACKED])


def _unpack(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
    for kind in ("weight", "bias"):
        packed = state.pop(f"{prefix}in_proj_{kind}", None)
        if packed is not None:
            state.update(zip((f"{prefix}{name}.{kind}" for name in PACKED), packed.chunk(3), strict=True))


class Resampler(nn.Module):
    """vision_features `[B, patches, width]` → image_features `[B, queries, output_dim]` (visual.py, Resampler, and what
    VisionTransformer has behind it). The part `resampler`, made of the modules of `Visual`."""

    def __init__(self, visual: Visual) -> None:
        super().__init__()
        self.attn_pool, self.ln_post, self.proj = visual.attn_pool, visual.ln_post, visual.proj

    def forward(self, vision_features: Tensor) -> Tensor:
        return self.ln_post(self.attn_pool(vision_features)) @ self.proj


class AttentionPool(nn.Module):
    """The one cross-attention layer: learnt queries, on a square, read the patches `[B, patches, width]`.

    Positions are added to queries and keys, not to values; the keys' are those of the queries' square, interpolated to the
    patches'.
    """

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.config, visual = config, config.visual
        width, side = visual.output_dim, visual.query_grid
        self.pos_embed = nn.Parameter(sine_positions(width, side), requires_grad=False)
        self.query = nn.Parameter(0.02 * torch.randn(side**2, width))
        self.kv_proj = nn.Identity() if visual.width == width else nn.Linear(visual.width, width, bias=False)
        self.attn = PackedProjections(width)
        self.ln_q, self.ln_kv = nn.LayerNorm(width, VISUAL_EPSILON), nn.LayerNorm(width, VISUAL_EPSILON)
        self.resize: Tensor | None
        self.register_buffer("resize", resize_matrix(side, visual.grid), persistent=False)

    def forward(self, vision_features: Tensor) -> Tensor:
        heads, attn = self.config.visual.output_dim // RESAMPLER_HEAD, self.attn
        rows = self.ln_kv(self.kv_proj(vision_features))
        queries = attn.query((self.ln_q(self.query) + self.pos_embed).unsqueeze(0)).expand(rows.shape[0], -1, -1)
        keys = attn.key(rows + resized(self.resize, self.pos_embed))
        read = attend(self.config, *(split_heads(part, heads) for part in (queries, keys, attn.value(rows))))
        return attn.out_proj(merge_heads(read))


class VisualTransformer(nn.Module):
    """The layers of the tower, under the published name."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisualBlock(config) for _ in range(config.visual.layers))


class Visual(nn.Module):
    """All that sees: pixel_values `[B, 3, H, W]` → image_features `[B, queries, output_dim]` (visual.py, VisionTransformer)."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        visual = config.visual
        width, out = visual.width, visual.output_dim
        self.conv1 = nn.Conv2d(3, width, visual.patch_size, visual.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(PRETRAINED_GRID**2, width))
        self.ln_pre = nn.LayerNorm(width, VISUAL_EPSILON)
        self.transformer = VisualTransformer(config)
        self.attn_pool = AttentionPool(config)
        self.ln_post = nn.LayerNorm(out, VISUAL_EPSILON)
        self.proj = nn.Parameter(out**-0.5 * torch.randn(out, out))
        self.resize: Tensor | None
        self.register_buffer("resize", resize_matrix(PRETRAINED_GRID, visual.grid), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return Resampler(self)(VisionEncoder(self)(pixel_values))


class VisionEncoder(nn.Module):
    """pixel_values `[B, 3, H, W]` → vision_features `[B, patches, width]`. The part `vision_encoder`, made of the modules of
    `Visual`."""

    def __init__(self, visual: Visual) -> None:
        super().__init__()
        self.conv1, self.ln_pre, self.transformer = visual.conv1, visual.ln_pre, visual.transformer
        self.positional_embedding = visual.positional_embedding
        self.resize: Tensor | None
        self.register_buffer("resize", visual.resize, persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        hidden = self.ln_pre(hidden + resized(self.resize, self.positional_embedding))
        for block in self.transformer.resblocks:
            hidden = block(hidden)
        return hidden


# ------------------------------------------------------------------------------------------- language


class QwenRMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps)` in float32, then scaled in the weight's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(hidden.dtype) * self.weight


def apply_rotary_pos_emb(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """query and key `[B, H, S, D]` turned by angles `[B, S, D]`, in float32; the tracer replaces it by one operator each."""

    def turn(heads: Tensor) -> Tensor:
        first, second = heads.float().chunk(2, -1)
        return (heads * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)).to(heads.dtype)

    return turn(query), turn(key)


@dataclass
class Positions:
    """What attention takes of the positions `[B, S]`: cos and sin `[B, S, turned]` of the angles, for the first `turned`
    channels of a head; and `logn`, `[B, 1, S, 1]` by which queries are scaled, None where it is 1 throughout."""

    cos: Tensor
    sin: Tensor
    logn: Tensor | None


class Attention(nn.Module):
    """Self-attention of the decoder, `[B, S, hidden]`; how keys are kept and masked is the caller's."""

    def __init__(self, config: QwenVLConfig, index: int) -> None:
        super().__init__()
        self.config, self.index, width = config, index, config.hidden_size
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width, bias=not config.no_bias)

    def forward(self, hidden: Tensor, positions: Positions, attention: Attend) -> Tensor:
        query, key, value = (split_heads(rows, self.config.num_attention_heads) for rows in self.c_attn(hidden).chunk(3, -1))
        turned = positions.cos.shape[-1]
        if turned == query.shape[-1]:
            query, key = apply_rotary_pos_emb(query, key, positions.cos, positions.sin)
        else:
            pair = apply_rotary_pos_emb(query[..., :turned], key[..., :turned], positions.cos, positions.sin)
            query, key = (torch.cat([new, old[..., turned:]], -1) for new, old in zip(pair, (query, key), strict=True))
        if positions.logn is not None:
            query = query * positions.logn
        return self.c_proj(merge_heads(attention(self.index, query, key, value)))


class FeedForward(nn.Module):
    """SwiGLU: `w1(x) · silu(w2(x))`, each half as wide as `intermediate_size` says."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size // 2, not config.no_bias
        self.w1, self.w2 = nn.Linear(width, inner, bias=bias), nn.Linear(width, inner, bias=bias)
        self.c_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.c_proj(self.w1(hidden) * functional.silu(self.w2(hidden)))


class Block(nn.Module):
    """A layer of the decoder, norms first."""

    def __init__(self, config: QwenVLConfig, index: int) -> None:
        super().__init__()
        width, epsilon = config.hidden_size, config.layer_norm_epsilon
        self.ln_1, self.attn = QwenRMSNorm(width, epsilon), Attention(config, index)
        self.ln_2, self.mlp = QwenRMSNorm(width, epsilon), FeedForward(config)

    def forward(self, hidden: Tensor, positions: Positions, attention: Attend) -> Tensor:
        hidden = hidden + self.attn(self.ln_1(hidden), positions, attention)
        return hidden + self.mlp(self.ln_2(hidden))


class Transformer(nn.Module):
    """Embeddings, decoder layers and `visual`, under the published names; called, it is the layers and the last norm."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.ln_f = QwenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = Visual(config)
        turned = config.head_dim if config.rotary_pct == 1.0 else int(config.head_dim * config.rotary_pct)
        self.frequencies: Tensor
        frequencies = 1.0 / config.rotary_emb_base ** (torch.arange(0, turned, 2).float() / turned)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, hidden: Tensor, position_ids: Tensor, attention: Attend) -> Tensor:
        """`[B, S, hidden]` at positions int64 `[B, S]` to what the head reads."""
        positions = self.read_positions(position_ids, hidden.dtype)
        for block in self.h:
            hidden = block(hidden, positions, attention)
        return self.ln_f(hidden)

    def read_positions(self, position_ids: Tensor, dtype: torch.dtype) -> Positions:
        angles = position_ids.unsqueeze(-1).float() * self.frequencies.float()
        angles = torch.cat([angles, angles], -1)
        config, logn = self.config, None
        if config.use_logn_attn and config.context_length > config.seq_length and not self.training:
            # log(n) / log(seq_length) for the n-th token, no less than 1 (modeling_qwen.py, logn_tensor).
            length = (position_ids + 1).float().log() / math.log(config.seq_length)
            logn = length.clamp(min=1.0).to(dtype).unsqueeze(1).unsqueeze(-1)
        return Positions(angles.cos().to(dtype), angles.sin().to(dtype), logn)


# ------------------------------------------------------------------------------------------ the whole


class QwenVL(nn.Module):
    """The whole model; eager, it is the reference that a bundle is compared with, and can be trained."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in (self.transformer.wte, self.lm_head, *self.transformer.h.modules(), *self.transformer.visual.modules()):
            self._init_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        """Random weights as the published code has them."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """The output head's name and that of the table it shares, as transformers' models have it."""
        return {"lm_head.weight": "transformer.wte.weight"} if self.config.tie_word_embeddings else {}

    def tie_weights(self) -> None:
        """Makes tied weights one parameter. A new model has two, as transformers' have while they are traced, so that the head
        keeps its name, by which recipes know it."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """`[pictures, 3, H, W]` → `[pictures, places, hidden]`."""
        return self.transformer.visual(pixel_values)

    def embed(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """int64 `[B, S]` → `[B, S, hidden]`, in which features `[pictures, places, hidden]` stand between each `<img>` and its
        `</img>`, whatever ids stand there: a file's name in the published tokenizer's output, `<imgpad>` in EdgeVLM's."""
        rows = self.transformer.wte(input_ids)
        if image_features is None:
            return rows
        start = self.config.visual.image_start_id
        inside = (input_ids == start).cumsum(1) - (input_ids == start).long() > (input_ids == start + 1).cumsum(1)
        if int(inside.sum()) != image_features.shape[0] * image_features.shape[1]:
            raise ValueError(f"{int(inside.sum())} places between <img> and </img>, features {list(image_features.shape)}")
        return rows.masked_scatter(inside.unsqueeze(-1), image_features.to(rows.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits `[B, S, vocabulary]` behind each token, without a cache.

        Either input_ids int64 `[B, S]`, with pixel_values `[pictures, 3, H, W]` in the order of the batch's `<img>`, or
        inputs_embeds `[B, S, hidden]`. attention_mask `[B, S]` is 0 (or False) where nobody may look; position_ids int64
        `[B, S]` count from 0 as a default.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            features = None if pixel_values is None else self.encode_images(pixel_values)
            inputs_embeds = self.embed(input_ids, features)
        batch, length = inputs_embeds.shape[:2]
        device = inputs_embeds.device
        if position_ids is None:
            position_ids = torch.arange(length, device=device).expand(batch, -1)
        visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
        if attention_mask is not None:
            visible = visible & attention_mask.bool()[:, None, None]
        # Of floats, so that a row that sees nothing (left padding) has numbers behind it.
        hidden = torch.finfo(inputs_embeds.dtype).min
        mask = torch.zeros(visible.shape, dtype=inputs_embeds.dtype, device=device).masked_fill(~visible, hidden)
        rows = self.transformer(inputs_embeds, position_ids, lambda _, q, k, v: attend(self.config, q, k, v, mask))
        return self.lm_head(rows)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        max_new_tokens: int = 20,
        stopping_criteria: Callable[..., Any] | None = None,
        **_: Any,
    ) -> SimpleNamespace:
        """Greedy, for one prompt int64 `[1, S]`: `sequences` `[1, S + new]`, and `logits`, `[1, vocabulary]` a token.

        It has no cache of keys and values and stops only where the criteria, given ids and logits, say so: a reference, not a
        way to answer. What the model says itself never begins a picture.
        """
        features = None if pixel_values is None else self.encode_images(pixel_values)
        rows, logits = self.embed(input_ids, features), []
        for _step in range(max_new_tokens):
            logits.append(self.forward(inputs_embeds=rows)[:, -1])
            token = logits[-1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], 1)
            rows = torch.cat([rows, self.transformer.wte(token)], 1)
            if stopping_criteria is not None and bool(stopping_criteria(input_ids, logits[-1])):
                break
        return SimpleNamespace(sequences=input_ids, logits=tuple(logits))


class Decoder(CachedDecoder):
    """The part `decoder`: `CachedDecoder` around Qwen's layers."""

    def __init__(self, model: QwenVL) -> None:
        super().__init__(model.transformer, model.lm_head, model.config.num_hidden_layers)

    def hidden_states(self, inputs_embeds: Tensor, position_ids: Tensor, cache: StaticCache) -> Tensor:
        mask = cache.mask(None)

        def attention(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            key, value = cache.store(2 * index, key), cache.store(2 * index + 1, value)
            return attention_node(query, key, value, mask, query.shape[-1] ** -0.5)

        return self.language_model(inputs_embeds, position_ids, attention)
