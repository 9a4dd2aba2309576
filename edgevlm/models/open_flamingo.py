"""OpenFlamingo (Awadalla et al. 2023, arXiv 2308.01390; https://github.com/mlfoundations/open_flamingo, version 2).

A CLIP tower, a perceiver resampler, and Llama or MPT with a gated cross-attention before every n-th decoder layer. A
`<image>` token keeps its own embedding; from it to the next one, the gated layers read the latents of that picture and
of no other (`only_attend_immediate_media`), and text before the first picture reads none. `<|endofchunk|>` ends the
text that belongs to a picture, and an answer.

transformers has no such model, so its modules are written here, with the published names of parameters. The folder that
`edgevlm convert` writes from the published weights is what is read: `OpenFlamingoForConditionalGeneration`.

Parts: `vision_encoder`, `resampler`, `cross_kv` (keys and values of every gated layer, once a picture), `embed_tokens`,
`decoder`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle import CrossAttention, ImageTokens, KVCache, Manifest
from ..errors import CheckpointError, UnsupportedModelError, WeightsError
from . import llava

if TYPE_CHECKING:
    from ..prompt import Prompt, PromptBuilder, Request
    from . import Embedded, PartSpec, RunPart

ARCHITECTURES = ("OpenFlamingoForConditionalGeneration",)
#: None of the published weights can be exported as they are: `edgevlm convert` comes first.
ALIASES: dict[str, str] = {}

PARTS = ("vision_encoder", "resampler", "embed_tokens", "decoder")
PICTURES = (0, None)

IMAGE, END = "<image>", "<|endofchunk|>"

#: A chat as the examples that the model was trained on: `<|endofchunk|>` behind an answer, and behind text that a further
#: picture follows. What a question looks like (`Question:… Short answer:`) is the user's to say.
DIALOGUE = (
    "{% set seen = namespace(picture=false, text=false) %}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set seen.text = true %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}"
    f"{{% if seen.picture and seen.text %}}{END}{{% endif %}}{IMAGE}"
    "{% set seen.picture = true %}{% set seen.text = false %}"
    "{% else %}{{ part['text'] }}{% set seen.text = true %}{% endif %}"
    "{% endfor %}{% endif %}"
    f"{{% if message['role'] == 'assistant' %}}{END}{{% set seen.text = false %}}{{% endif %}}"
    "{% endfor %}"
)

TOWERS = ("clip_vision_model",)
DECODERS = ("llama", "mpt")
NORMS = ("layernorm", "low_precision_layernorm")


# ----------------------------------------------------------------------------------------- the workshop


@dataclass(frozen=True)
class AttentionSizes:
    """Of the resampler or the gated layers: heads, their width, and the inner width of the feed-forward layers."""

    heads: int
    head_dim: int
    intermediate_size: int


@dataclass
class OpenFlamingoConfig:
    """`config.json`, with transformers' own configurations of the tower and of the language model.

    `vision_post_layernorm` says that patch features went through the tower's last norm: open_clip does so since
    version 2.23, the published weights were trained with older ones. transformers sets `_attn_implementation` in all
    its configurations; here it says whether a graph is being traced.
    """

    vision_config: Any
    text_config: Any
    cross_attn_every_n_layers: int
    resampler: AttentionSizes
    resampler_depth: int
    resampler_latents: int
    cross_attention: AttentionSizes
    image_token_id: int
    endofchunk_token_id: int
    vision_post_layernorm: bool = False
    _attn_implementation: str = "eager"

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output head is the table of embeddings."""
        return bool(self.text_config.tie_word_embeddings)

    @property
    def gated_layers(self) -> list[int]:
        """The decoder layers with a gated cross-attention before them, counted from 0."""
        every = self.cross_attn_every_n_layers
        return list(range(every - 1, self.text_config.num_hidden_layers, every))


def check_config(config: Mapping[str, Any]) -> None:
    vision, text = config.get("vision_config", {}), config.get("text_config", {})
    tower, language = vision.get("model_type", TOWERS[0]), text.get("model_type", DECODERS[0])
    for what, is_, known in (("vision tower", tower, TOWERS), ("language model", language, DECODERS)):
        if is_ not in known:
            raise UnsupportedModelError(
                f"OpenFlamingo with the {what} {is_!r} is not supported; supported: {', '.join(known)}."
            )
    if language == "llama":
        llava.check_rotary(text)
        return
    attention, scale = text.get("attn_config") or {}, text.get("logit_scale")
    refused = {
        "no ALiBi": not attention.get("alibi", True),
        "a prefix mask": attention.get("prefix_lm", False),
        f"the attention {attention.get('attn_type')!r}": attention.get("attn_type", "multihead_attention")
        != "multihead_attention",
        f"the norm {text.get('norm_type')!r}": text.get("norm_type", NORMS[0]) not in NORMS,
        f"the logit scale {scale!r}": isinstance(scale, str) and scale != "inv_sqrt_d_model",
    }
    if found := [name for name, is_so in refused.items() if is_so]:
        raise UnsupportedModelError(
            f"MPT with {' and '.join(found)} is not supported; supported is causal multi-head attention with ALiBi, layer "
            "norms and a logit scale that is a number or 'inv_sqrt_d_model'."
        )


def read_config(config: Mapping[str, Any]) -> OpenFlamingoConfig:
    """What `config.json` says. Raises CheckpointError where something is missing."""
    from transformers import CLIPVisionConfig, LlamaConfig, MptConfig

    check_config(config)
    text = dict(config["text_config"])
    kind = {"llama": LlamaConfig, "mpt": MptConfig}[text.pop("model_type")]
    try:
        sizes = config["resampler"]
        return OpenFlamingoConfig(
            vision_config=CLIPVisionConfig(**{k: v for k, v in config["vision_config"].items() if k != "model_type"}),
            text_config=kind(**text),
            cross_attn_every_n_layers=int(config["cross_attn_every_n_layers"]),
            resampler=AttentionSizes(*(int(sizes[k]) for k in ("heads", "head_dim", "intermediate_size"))),
            resampler_depth=int(sizes["depth"]),
            resampler_latents=int(sizes["latents"]),
            cross_attention=AttentionSizes(
                *(int(config["cross_attention"][k]) for k in ("heads", "head_dim", "intermediate_size"))
            ),
            image_token_id=int(config["image_token_id"]),
            endofchunk_token_id=int(config["endofchunk_token_id"]),
            vision_post_layernorm=bool(config.get("vision_post_layernorm", False)),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(
            f"config.json lacks what OpenFlamingo needs ({type(exc).__name__}: {exc}). `edgevlm convert` writes it from the "
            "published weights."
        ) from exc


def build_model(folder: Path) -> Any:
    """The torch model that `config.json` in `folder` describes, with parameters of any value."""
    return model_from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def model_from_config(config: Mapping[str, Any]) -> Any:
    """The same from the parsed `config.json`."""
    return _torch().OpenFlamingo(read_config(config))


def weight_name(name: str) -> str:
    return name


def part_specs(model: Any, dtype: str) -> list[PartSpec]:
    from . import PartSpec, cross_tensors, decoder_spec, embedding_spec
    from .decoder import Embedding

    config, modules = model.config, _torch()
    vision, text = config.vision_config, config.text_config
    kv, cross, width = kv_cache(text, dtype), cross_attention(config, dtype), vision.hidden_size
    pixels = ("batch_size", vision.num_channels, vision.image_size, vision.image_size)
    features = (("batch_size", (vision.image_size // vision.patch_size) ** 2, width), dtype)
    return [
        PartSpec("vision_encoder", model.vision_encoder(), {"pixel_values": (pixels, dtype)}, {"vision_features": features}),
        PartSpec(
            "resampler",
            model.perceiver,
            {"vision_features": features},
            {"image_features": (("batch_size", cross.places, width), dtype)},
        ),
        PartSpec(
            "cross_kv",
            modules.CrossKeyValues(model.gated_cross_attn_layers),
            {"image_features": (("batch_size", "image_tokens", width), dtype)},
            cross_tensors(cross, "image_tokens"),
        ),
        embedding_spec(Embedding(model.embedding), text.hidden_size, dtype),
        decoder_spec(modules.Decoder(model), kv, cross, text.hidden_size, text.vocab_size, dtype),
    ]


def kv_cache(text: Any, dtype: str) -> KVCache:
    heads = text.num_attention_heads
    depth = getattr(text, "head_dim", None) or text.hidden_size // heads
    return KVCache(text.num_hidden_layers, getattr(text, "num_key_value_heads", heads), depth, dtype)


def cross_attention(config: OpenFlamingoConfig, dtype: str) -> CrossAttention:
    sizes = config.cross_attention
    return CrossAttention(
        len(config.gated_layers), sizes.heads, sizes.head_dim, dtype, source="images", places=config.resampler_latents
    )


def describe(folder: Path, config: OpenFlamingoConfig, dtype: str) -> Manifest:
    from . import added_token

    text, image = config.text_config, config.image_token_id
    return Manifest(
        family="open_flamingo",
        dtype=dtype,
        kv_cache=kv_cache(text, dtype),
        context_length=text.max_seq_len if text.model_type == "mpt" else text.max_position_embeddings,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        image=ImageTokens(added_token(folder, image), image, 1),
        cross_attention=cross_attention(config, dtype),
    )


# ---------------------------------------------------------------------------------------- torch modules


@functools.cache
def _torch() -> SimpleNamespace:
    """The torch modules. Torch is imported when the workshop asks for them, never on the robot."""
    import torch
    from torch import Tensor, nn
    from transformers import CLIPVisionModel, LlamaForCausalLM

    from .decoder import ATTENTION, CachedDecoder, NewRows, StaticCache, attention_node

    def attend(traced: bool, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """query `[B, H, S, D]`, key and value `[B, H, L, D]`, mask bool or float → `[B, H, S, D]`."""
        if traced:
            return attention_node(query, key, value, mask, scale)
        scores = query @ key.transpose(-1, -2) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ value

    def split_heads(rows: Tensor, head_dim: int) -> Tensor:
        """`[B, L, H·D]` → `[B, H, L, D]`."""
        return rows.view(*rows.shape[:2], -1, head_dim).transpose(1, 2)

    def merge_heads(heads: Tensor) -> Tensor:
        """`[B, H, L, D]` → `[B, L, H·D]`."""
        return heads.transpose(1, 2).flatten(2)

    def feed_forward(width: int, inner: int) -> nn.Sequential:
        return nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False)
        )

    # ------------------------------------------------------------------------------------------ pictures

    class PerceiverAttention(nn.Module):
        """Latents `[B, n, D]` read a picture's features `[B, places, D]` and themselves: helpers.py, PerceiverAttention."""

        def __init__(self, config: OpenFlamingoConfig) -> None:
            super().__init__()
            self.config, sizes, width = config, config.resampler, config.vision_config.hidden_size
            inner = sizes.heads * sizes.head_dim
            self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
            self.to_q = nn.Linear(width, inner, bias=False)
            self.to_kv = nn.Linear(width, 2 * inner, bias=False)
            self.to_out = nn.Linear(inner, width, bias=False)

        def forward(self, features: Tensor, latents: Tensor) -> Tensor:
            depth = self.config.resampler.head_dim
            latents = self.norm_latents(latents)
            key, value = self.to_kv(torch.cat([self.norm_media(features), latents], 1)).chunk(2, -1)
            query, key, value = (split_heads(rows, depth) for rows in (self.to_q(latents), key, value))
            traced = self.config._attn_implementation == ATTENTION
            return self.to_out(merge_heads(attend(traced, query, key, value, None, depth**-0.5)))

    class Resampler(nn.Module):
        """vision_features `[B, places, D]` → latents `[B, n, D]`: helpers.py, PerceiverResampler, for single frames."""

        def __init__(self, config: OpenFlamingoConfig) -> None:
            super().__init__()
            width = config.vision_config.hidden_size
            self.latents = nn.Parameter(torch.zeros(config.resampler_latents, width))
            self.layers = nn.ModuleList(
                nn.ModuleList([PerceiverAttention(config), feed_forward(width, config.resampler.intermediate_size)])
                for _ in range(config.resampler_depth)
            )
            self.norm = nn.LayerNorm(width)

        def forward(self, vision_features: Tensor) -> Tensor:
            latents = self.latents.unsqueeze(0).expand(vision_features.shape[0], -1, -1)
            for layer in self.layers:
                attention, feed = layer.children()
                latents = attention(vision_features, latents) + latents
                latents = feed(latents) + latents
            return self.norm(latents)

    class VisionEncoder(nn.Module):
        """pixel_values `[B, 3, H, W]` → vision_features `[B, places, D]`: every patch of the last layer, no class token."""

        def __init__(self, tower: Any, post_layernorm: bool) -> None:
            super().__init__()
            self.tower, self.post_layernorm = tower, post_layernorm

        def forward(self, pixel_values: Tensor) -> Tensor:
            features = self.tower(pixel_values).last_hidden_state[:, 1:]
            return self.tower.post_layernorm(features) if self.post_layernorm else features

    # -------------------------------------------------------------------------------- gated cross-attention

    class CrossAttention(nn.Module):
        """Text reads latents: helpers.py, MaskedCrossAttention. Keys and values are made apart, once a picture."""

        def __init__(self, config: OpenFlamingoConfig) -> None:
            super().__init__()
            self.config, sizes, width = config, config.cross_attention, config.text_config.hidden_size
            inner = sizes.heads * sizes.head_dim
            self.norm = nn.LayerNorm(width)
            self.to_q = nn.Linear(width, inner, bias=False)
            self.to_kv = nn.Linear(config.vision_config.hidden_size, 2 * inner, bias=False)
            self.to_out = nn.Linear(inner, width, bias=False)

        def keys_values(self, latents: Tensor) -> tuple[Tensor, Tensor]:
            """latents `[B, L, D]` → key and value, `[B, heads, L, head_dim]` each."""
            key, value = self.to_kv(latents).chunk(2, -1)
            depth = self.config.cross_attention.head_dim
            return split_heads(key, depth), split_heads(value, depth)

        def forward(self, hidden: Tensor, key: Tensor, value: Tensor, look: Look) -> Tensor:
            depth = self.config.cross_attention.head_dim
            query = split_heads(self.to_q(self.norm(hidden)), depth)
            traced = self.config._attn_implementation == ATTENTION
            read = merge_heads(attend(traced, query, key, value, look.mask, depth**-0.5))
            return self.to_out(torch.where(look.sees, read, torch.zeros((), dtype=read.dtype)))

    class Look:
        """Which latents each token reads, `mask` bool `[B, 1, S, L]`, and whether it reads any, `sees` bool `[B, S, 1]`.

        A token that reads none looks at all of them, since a softmax over nothing is no number, and what it has read
        is replaced by 0 afterwards.
        """

        def __init__(self, mask: Tensor) -> None:
            seen = mask.any(-1, keepdim=True)
            self.mask, self.sees = mask | ~seen, seen.squeeze(1)

    class GatedBlock(nn.Module):
        """`x + tanh(gate) · attention(x)`, then the same with a feed-forward layer: helpers.py, GatedCrossAttentionBlock."""

        def __init__(self, config: OpenFlamingoConfig) -> None:
            super().__init__()
            self.attn = CrossAttention(config)
            self.attn_gate = nn.Parameter(torch.zeros(1))
            self.ff = feed_forward(config.text_config.hidden_size, config.cross_attention.intermediate_size)
            self.ff_gate = nn.Parameter(torch.zeros(1))

        def forward(self, hidden: Tensor, key: Tensor, value: Tensor, look: Look) -> Tensor:
            hidden = self.attn(hidden, key, value, look) * self.attn_gate.tanh() + hidden
            return self.ff(hidden) * self.ff_gate.tanh() + hidden

    class CrossKeyValues(nn.Module):
        """latents `[B, n, D]` → key and value of every gated layer in turn, `[B, heads, n, head_dim]`."""

        def __init__(self, blocks: nn.ModuleDict) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
            blocks: Any = self.blocks.values()
            return tuple(tensor for block in blocks for tensor in block.attn.keys_values(latents))

    # ------------------------------------------------------------------------------------------------ MPT

    class MptAttention(nn.Module):
        """MPT's self-attention, `[B, S, hidden]` to the same; how keys are kept and masked is the caller's."""

        def __init__(self, config: Any, index: int) -> None:
            super().__init__()
            width, options, bias = config.hidden_size, config.attn_config, not config.no_bias
            self.index, self.clip = index, options.clip_qkv
            self.head_dim = width // config.n_heads
            self.scale = options.softmax_scale or self.head_dim**-0.5
            self.Wqkv = nn.Linear(width, 3 * width, bias=bias)
            self.out_proj = nn.Linear(width, width, bias=bias)
            # Over all heads together, as in llm-foundry; transformers' MPT has none.
            self.q_ln, self.k_ln = (
                nn.LayerNorm(width, eps=config.layer_norm_epsilon, bias=bias) if options.qk_ln else nn.Identity()
                for _ in range(2)
            )

        def forward(self, hidden: Tensor, attention: Any) -> Tensor:
            rows = self.Wqkv(hidden)
            if self.clip:
                rows = rows.clamp(-self.clip, self.clip)
            query, key, value = rows.chunk(3, -1)
            heads = [split_heads(part, self.head_dim) for part in (self.q_ln(query), self.k_ln(key), value)]
            return self.out_proj(merge_heads(attention(self.index, *heads, self.scale)))

    class MptFeedForward(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            width, inner, bias = config.hidden_size, int(config.expansion_ratio * config.hidden_size), not config.no_bias
            self.up_proj, self.act = nn.Linear(width, inner, bias=bias), nn.GELU()
            self.down_proj = nn.Linear(inner, width, bias=bias)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.down_proj(self.act(self.up_proj(hidden)))

    class MptBlock(nn.Module):
        def __init__(self, config: Any, index: int) -> None:
            super().__init__()
            options = {"eps": config.layer_norm_epsilon, "bias": not config.no_bias}
            self.norm_1, self.attn = nn.LayerNorm(config.hidden_size, **options), MptAttention(config, index)
            self.norm_2, self.ffn = nn.LayerNorm(config.hidden_size, **options), MptFeedForward(config)

        def forward(self, hidden: Tensor, attention: Any) -> Tensor:
            hidden = self.attn(self.norm_1(hidden), attention) + hidden
            return self.ffn(self.norm_2(hidden)) + hidden

    class MptModel(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            bias = not config.no_bias
            self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
            self.blocks = nn.ModuleList(MptBlock(config, index) for index in range(config.n_layers))
            self.norm_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon, bias=bias)

    class MptHead(nn.Linear):
        """hidden `[…, hidden]` → logits `[…, vocabulary]`, scaled where the configuration says so."""

        def __init__(self, config: Any) -> None:
            super().__init__(config.hidden_size, config.vocab_size, bias=False)
            scale = config.logit_scale
            self.scale = config.hidden_size**-0.5 if isinstance(scale, str) else scale

        def forward(self, hidden: Tensor) -> Tensor:
            logits = super().forward(hidden)
            return logits if self.scale is None else logits * self.scale

    class Mpt(nn.Module):
        """MPT with the parameter names of transformers' MptForCausalLM, and its options as llm-foundry has them.

        transformers' own disregards `qk_ln`, `no_bias`, `expansion_ratio` and `logit_scale`, and its attention cannot
        be replaced.
        """

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.transformer = MptModel(config)
            self.lm_head = MptHead(config)
            self.slopes: Tensor
            slopes = alibi_slopes(config.n_heads, config.attn_config.alibi_bias_max)
            self.register_buffer("slopes", torch.tensor(slopes).view(1, -1, 1, 1), persistent=False)

        def alibi(self, distance: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
            """float `[B, H, S, L]`: slope · distance where a key is visible, else the least number there is.

            distance is key − query, `[B, 1, S, L]`. The published bias is that of the key's position alone, which
            differs by a constant that the softmax takes out; of the distance, near keys get small numbers, which half
            precision holds exactly.
            """
            bias = distance.to(dtype) * self.slopes.to(dtype)
            return torch.where(visible, bias, torch.finfo(dtype).min)

    # ------------------------------------------------------------------------------------------- the whole

    def through_layers(
        language: Any, blocks: nn.ModuleDict, hidden: Tensor, run_layer: Any, cross: Sequence[Tensor], look: Look
    ) -> Tensor:
        """Embeddings `[B, S, hidden]` through all layers and the last norm. `run_layer(layer, hidden)` is one layer of the
        language model; `cross` has key and value of each gated layer."""
        mpt = isinstance(language, Mpt)
        body = language.transformer if mpt else language.model
        pairs = iter(zip(cross[::2], cross[1::2], strict=True))
        for index, layer in enumerate(body.blocks if mpt else body.layers):
            if str(index) in blocks:
                hidden = blocks[str(index)](hidden, *next(pairs), look)
            hidden = run_layer(layer, hidden)
        return body.norm_f(hidden) if mpt else body.norm(hidden)

    class OpenFlamingo(nn.Module):
        """The whole model; eager, it is the reference that a bundle is compared with."""

        def __init__(self, config: OpenFlamingoConfig) -> None:
            super().__init__()
            self.config = config
            self.vision_tower = CLIPVisionModel(config.vision_config)
            self.perceiver = Resampler(config)
            self.gated_cross_attn_layers = nn.ModuleDict({str(layer): GatedBlock(config) for layer in config.gated_layers})
            text = config.text_config
            self.language_model = Mpt(text) if text.model_type == "mpt" else LlamaForCausalLM(text)

        @property
        def all_tied_weights_keys(self) -> dict[str, str]:
            """The output head's name and that of the table it shares, as transformers' models have it."""
            table = "transformer.wte" if isinstance(self.language_model, Mpt) else "model.embed_tokens"
            tied = self.config.tie_word_embeddings
            return {"language_model.lm_head.weight": f"language_model.{table}.weight"} if tied else {}

        def tie_weights(self) -> None:
            """Makes tied weights one parameter. A new model has two, as transformers' have while they are traced, so that the
            head keeps its name, by which recipes know it."""
            if self.config.tie_word_embeddings:
                self.language_model.lm_head.weight = self.embedding.weight

        @property
        def embedding(self) -> Any:
            """The table of the tokens' embeddings."""
            model = self.language_model
            return model.transformer.wte if isinstance(model, Mpt) else model.model.embed_tokens

        def vision_encoder(self) -> VisionEncoder:
            """The part `vision_encoder`."""
            return VisionEncoder(self.vision_tower, self.config.vision_post_layernorm)

        def encode_images(self, pixel_values: Tensor) -> Tensor:
            """`[pictures, 3, H, W]` → latents `[pictures, n, D]`."""
            return self.perceiver(self.vision_encoder()(pixel_values))

        def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
            """Logits float `[1, S, vocabulary]` behind each of the tokens int64 `[1, S]`, without a cache.

            pixel_values are the pictures float `[pictures, 3, H, W]`, in the order of their `<image>` tokens, or None.
            """
            latents = None if pixel_values is None else self.encode_images(pixel_values)
            return self.read(input_ids, latents, input_ids.shape[1])

        def read(self, input_ids: Tensor, latents: Tensor | None, prompt: int) -> Tensor:
            """The same with latents `[pictures, n, D]`. Only the first `prompt` tokens can begin a picture: what the model
            says reads the last one."""
            positions = torch.arange(input_ids.shape[1])
            places = (input_ids == self.config.image_token_id) & (positions < prompt)
            pictures = 0 if latents is None else len(latents)
            if int(places.sum()) != pictures:
                raise ValueError(f"{int(places.sum())} <image> tokens, {pictures} pictures")
            if latents is None:  # nobody reads what stands there
                latents = self.perceiver.latents.unsqueeze(0)
            time = torch.arange(1, len(latents) + 1).repeat_interleave(latents.shape[1])
            look = Look((places.cumsum(1).unsqueeze(-1) == time).unsqueeze(1))
            cross = CrossKeyValues(self.gated_cross_attn_layers)(latents.flatten(0, 1).unsqueeze(0))

            hidden = self.embedding(input_ids)
            distance = positions - positions.view(-1, 1)  # key − query, [S, S]
            visible = distance <= 0
            language = self.language_model
            if isinstance(language, Mpt):
                bias = language.alibi(distance[None, None], visible, hidden.dtype)

                def attention(_: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
                    return attend(False, query, key, value, bias, scale)

                def run_layer(layer: Any, hidden: Tensor) -> Tensor:
                    return layer(hidden, attention)
            else:
                angles = language.model.rotary_emb(hidden, positions.unsqueeze(0))
                mask = torch.zeros(visible.shape, dtype=hidden.dtype).masked_fill(~visible, torch.finfo(hidden.dtype).min)

                def run_layer(layer: Any, hidden: Tensor) -> Tensor:
                    return layer(hidden, attention_mask=mask[None, None], position_embeddings=angles)

            return language.lm_head(through_layers(language, self.gated_cross_attn_layers, hidden, run_layer, cross, look))

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

            It has no cache of keys and values and stops only where the criteria, given ids and logits, say so: a reference,
            not a way to answer.
            """
            length, logits = input_ids.shape[1], []
            latents = None if pixel_values is None else self.encode_images(pixel_values)
            for _step in range(max_new_tokens):
                logits.append(self.read(input_ids, latents, length)[:, -1])
                input_ids = torch.cat([input_ids, logits[-1].argmax(-1, keepdim=True)], 1)
                if stopping_criteria is not None and bool(stopping_criteria(input_ids, logits[-1])):
                    break
            return SimpleNamespace(sequences=input_ids, logits=tuple(logits))

    class Decoder(CachedDecoder):
        """The decoder part: `CachedDecoder` with the gated layers between those of the language model."""

        def __init__(self, model: OpenFlamingo) -> None:
            config, language = model.config, model.language_model
            super().__init__(language, language.lm_head, config.text_config.num_hidden_layers, len(config.gated_layers))
            self.blocks = model.gated_cross_attn_layers

        def hidden_states(self, inputs_embeds: Tensor, position_ids: Tensor, cache: StaticCache) -> Tensor:
            language: Any = self.language_model
            if isinstance(language, Mpt):
                distance = cache.key_positions() - position_ids.unsqueeze(1).unsqueeze(-1)
                bias = language.alibi(distance, cache.mask(None), inputs_embeds.dtype)

                def attention(index: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
                    key, value = cache.store(2 * index, key), cache.store(2 * index + 1, value)
                    return attention_node(query, key, value, bias, scale)

                def run_layer(layer: Any, hidden: Tensor) -> Tensor:
                    return layer(hidden, attention)
            else:
                angles = language.model.rotary_emb(inputs_embeds, position_ids)

                def run_layer(layer: Any, hidden: Tensor) -> Tensor:
                    return layer(
                        hidden, position_embeddings=angles, past_key_values=NewRows(), use_cache=True, edgevlm_cache=cache
                    )

            assert cache.cross_mask is not None
            return through_layers(language, self.blocks, inputs_embeds, run_layer, cache.cross, Look(cache.cross_mask))

    return SimpleNamespace(OpenFlamingo=OpenFlamingo, CrossKeyValues=CrossKeyValues, Decoder=Decoder, Look=Look)


def alibi_slopes(heads: int, largest: float) -> list[float]:
    """One slope a head (Press et al. 2021, arXiv 2108.12409, section 3): 2^(−largest·k/n) for k = 1…n, n the power of two at
    or above `heads`. Where that is more than there are heads, MPT takes every second one first."""
    power = 1 << (heads - 1).bit_length()
    slopes = [2.0 ** (-largest * (k + 1) / power) for k in range(power)]
    return slopes if power == heads else (slopes[1::2] + slopes[::2])[:heads]


# -------------------------------------------------------------------------------------------- the robot


def build_prompt(builder: PromptBuilder, manifest: Manifest, request: Request) -> Prompt:
    """A string or a list is written down as it stands, and `<image>` and `<|endofchunk|>` work in it; see `DIALOGUE` for chats.

    A list gets `<|endofchunk|>` before a picture that follows text, the first picture aside, where it has none.
    """
    from ..prompt import ChatTemplate

    if request.prompt is None and not request.listed:
        chat = builder.with_template(ChatTemplate(DIALOGUE, builder.tokenizer.names))
        return _seeing(chat.build(request), manifest)
    text = request.prompt
    if text is None or IMAGE not in text:
        text = _written(request)
    return _seeing(builder.build(replace(request, prompt=text), raw=True), manifest)


def _written(request: Request) -> str:
    from ..prompt import TextPart

    text, pictures = "", 0
    for part in request.messages[0].content:
        if isinstance(part, TextPart):
            text += part.text
            continue
        text += END * (pictures > 0 and not text.endswith((IMAGE, END))) + IMAGE
        pictures += 1
    return text


def _seeing(prompt: Prompt, manifest: Manifest) -> Prompt:
    """Every token looks at the last picture before it, an image token at its own."""
    seen = np.cumsum(np.array(prompt.ids) == manifest.image.token_id) - 1
    return replace(prompt, sees=tuple(seen.tolist()))


def encode_image(run: RunPart, manifest: Manifest, pixel_values: np.ndarray) -> Embedded:
    features = run("resampler", run("vision_encoder", {"pixel_values": pixel_values}))
    return run("cross_kv", features)


# ---------------------------------------------------------------------------------------- the reference


def load_reference(folder: Path) -> Any:
    """The model in float32, from what `edgevlm convert` wrote. Raises WeightsError where a weight is missing or misshapen."""
    import torch
    from safetensors import safe_open
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.no_grad():
        model = build_model(folder).eval()
        model.tie_weights()
        missing = dict(model.named_parameters())
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys() & missing.keys():
                    tensor, parameter = file.get_tensor(name), missing.pop(name)
                    if tensor.shape != parameter.shape:
                        raise WeightsError(
                            f"The weight {name!r} has the shape {list(tensor.shape)}; config.json asks for "
                            f"{list(parameter.shape)}."
                        )
                    parameter.copy_(tensor)
    if missing:
        raise WeightsError(f"{folder} lacks {len(missing)} weights, {next(iter(missing))!r} among them. Convert it again.")
    return model


def process(processor: Any, request: Request, text: str) -> Mapping[str, np.ndarray]:
    """There is no processor of OpenFlamingo: CLIP's pictures, the language model's tokens."""
    if not hasattr(processor, "image_processor"):
        raise ValueError("transformers has no processor for the tower in this folder")
    ids = {"input_ids": np.array(processor.tokenizer(text)["input_ids"])}
    if not request.images:
        return ids
    return ids | {"pixel_values": processor.image_processor(list(request.images), return_tensors="np")["pixel_values"]}


def reference_inputs(model: Any, prompt: Prompt, pixel_values: np.ndarray) -> Mapping[str, Any]:
    import torch

    pixels = {"pixel_values": torch.from_numpy(pixel_values)} if len(pixel_values) else {}
    return {"input_ids": torch.tensor([prompt.ids]), **pixels}
