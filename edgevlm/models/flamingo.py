"""Flamingo (Alayrac et al. 2022, arXiv 2204.14198) as Idefics, its open version (arXiv 2306.16527): a frozen vision
tower, a perceiver resampler, a frozen language model with gated cross-attention layers between its own.

`IdeficsForVisionText2Text` of transformers, with or without the resampler. A picture is one token of the prompt; what
was seen in it reaches the decoder through keys and values of every gated layer, which are made once a picture. Every
token looks at the last picture before it, and none before the first.

Parts: `vision_encoder`, `resampler` (latents in the graph), `cross_kv`, `embed_tokens`, `decoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import numpy as np

from ..bundle import CrossAttention, ImageTokens, KVCache, Manifest
from ..errors import PromptError, UnsupportedModelError
from . import llava

if TYPE_CHECKING:
    from ..prompt import Prompt, PromptBuilder, Request
    from . import PartSpec, RunPart

ARCHITECTURES = ("IdeficsForVisionText2Text",)
ALIASES = {"flamingo": "HuggingFaceM4/idefics-9b-instruct"}

PARTS = ("vision_encoder", "cross_kv", "embed_tokens", "decoder")
PICTURES = (0, None)

IMAGE, AROUND, END = "<image>", "<fake_token_around_image>", "<end_of_utterance>"

#: For chats with a checkpoint that has no template of its own: the dialogue that Idefics' instructed checkpoints were
#: trained on (huggingface.co/HuggingFaceM4/idefics-9b-instruct).
DIALOGUE = (
    "{{ bos_token }}{% for message in messages %}{{ '' if loop.first else '\n' }}"
    "{{ 'Assistant:' if message['role'] == 'assistant' else 'User:' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}"
    f"{{{{ '' if loop.previtem is defined and loop.previtem['type'] == 'image' else '{AROUND}' }}}}{IMAGE}{AROUND}"
    "{% else %}{{ ' ' if loop.first or loop.previtem['type'] == 'text' }}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    f"{END}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '\n' }}}}Assistant:{{% endif %}}"
)


# ----------------------------------------------------------------------------------------- the workshop


def check_config(config: Mapping[str, Any]) -> None:
    llava.check_rotary(config)
    layers, interval = config.get("num_hidden_layers", 32), config.get("cross_layer_interval", 1)
    if not isinstance(interval, int) or interval < 1 or layers % interval:
        raise UnsupportedModelError(
            f"config.json has {layers} layers and a cross_layer_interval of {interval!r}; transformers itself takes only an "
            "interval that divides the layers."
        )


def build_model(folder: Path) -> Any:
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    return IdeficsForVisionText2Text(IdeficsConfig.from_pretrained(folder))


def weight_name(name: str) -> str:
    return name


def part_specs(model: Any, dtype: str) -> list[PartSpec]:
    from . import PartSpec, cross_tensors, decoder_spec, embedding_spec
    from .decoder import LastHiddenState

    config, body = model.config, model.model
    vision, modules = config.vision_config, _modules()
    kv, cross = kv_cache(config, dtype), cross_attention(config, dtype)
    width, vocabulary = vision.embed_dim, config.vocab_size + config.additional_vocab_size
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    features = (("batch_size", patches, width), dtype)
    specs = [
        PartSpec(
            "vision_encoder",
            LastHiddenState(body.vision_model),
            {"pixel_values": (("batch_size", vision.num_channels, vision.image_size, vision.image_size), dtype)},
            {"vision_features": features},
        )
    ]
    if config.use_resampler:
        specs.append(
            PartSpec(
                "resampler",
                body.perceiver_resampler,
                {"vision_features": features},
                {"image_features": (("batch_size", cross.places, width), dtype)},
            )
        )
    return [
        *specs,
        PartSpec(
            "cross_kv",
            modules["cross_kv"](body.gated_cross_attn_layers),
            {_seen(config): (("batch_size", "image_tokens", width), dtype)},
            cross_tensors(cross, "image_tokens"),
        ),
        embedding_spec(modules["embedding"](body.embed_tokens), config.hidden_size, dtype),
        decoder_spec(
            modules["decoder"](body, modules["head"](model.lm_head), kv.layers, cross.layers),
            kv, cross, config.hidden_size, vocabulary, dtype,
        ),
    ]  # fmt: skip


def _seen(config: Any) -> str:
    """What the cross-attention layers look at."""
    return "image_features" if config.use_resampler else "vision_features"


def _modules() -> dict[str, type[Any]]:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from .decoder import CachedDecoder, NewRows

    class CrossKV(nn.Module):
        """Latents or patch features `[B, L, width]` → keys and values of every gated layer, `[B, H, L, D]` each."""

        def __init__(self, layers: Any) -> None:
            super().__init__()
            self.layers = nn.ModuleList([layer.cross_attn for layer in layers])

        def forward(self, features: Tensor) -> tuple[Tensor, ...]:
            made = []
            layer: Any
            for layer in self.layers:
                shape = (*features.shape[:2], layer.num_heads, layer.head_dim)
                key = layer.k_proj(features).view(shape).transpose(1, 2)
                value = layer.v_proj(features).view(shape).transpose(1, 2)
                made += [layer.k_layer_norm(key) if layer.qk_layer_norms else key, value]
            return tuple(made)

    class Embedding(nn.Module):
        """input_ids int64 `[B, S]` → `[B, S, hidden]`, from the base table or, behind it, from that of the added tokens."""

        def __init__(self, table: Any) -> None:
            super().__init__()
            self.table = table

        def forward(self, input_ids: Tensor) -> Tensor:
            base, added = self.table.num_embeddings, self.table.num_additional_embeddings
            rows = F.embedding(input_ids.clamp(max=base - 1), self.table.weight)
            if not added:
                return rows
            more = self.table.additional_embedding((input_ids - base).clamp(min=0))
            return torch.where((input_ids >= base).unsqueeze(-1), more, rows)

    class Head(nn.Module):
        """hidden states `[B, S, hidden]` → logits of the base vocabulary, then of the added tokens."""

        def __init__(self, head: Any) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: Tensor) -> Tensor:
            base = nn.Linear.forward(self.head, hidden)
            return torch.cat([base, self.head.additional_fc(hidden)], -1) if self.head.out_additional_features else base

    class Decoder(CachedDecoder):
        def hidden_states(self, inputs_embeds: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
            config: Any = self.language_model.config
            visible = cache.cross_mask  # [B, 1, S, L]
            # The model asks for features; their keys and values are known, so these are not read.
            batch, _, _, length = visible.shape
            features = torch.zeros(batch, length, 1, config.vision_config.embed_dim, dtype=inputs_embeds.dtype)
            # A row without a picture would be a softmax over nothing; what it gives is multiplied by a gate of 0.
            cache.cross_mask = visible | ~visible.any(-1, keepdim=True)
            return self.language_model(
                inputs_embeds=inputs_embeds, position_ids=position_ids, past_key_values=NewRows(), use_cache=True,
                image_attention_mask=visible.squeeze(1), edgevlm_cache=cache,
                **{"perceiver_embeddings" if config.use_resampler else "image_encoder_embeddings": features},
            ).last_hidden_state  # fmt: skip

    return {
        "cross_kv": CrossKV, "embedding": Embedding, "head": Head, "decoder": Decoder,
    }  # fmt: skip


def kv_cache(config: Any, dtype: str) -> KVCache:
    heads = config.num_attention_heads
    return KVCache(config.num_hidden_layers, heads, config.hidden_size // heads, dtype)


def cross_attention(config: Any, dtype: str) -> CrossAttention:
    heads, vision = config.num_attention_heads, config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    places = config.perceiver_config.resampler_n_latents if config.use_resampler else patches
    layers = config.num_hidden_layers // config.cross_layer_interval
    return CrossAttention(layers, heads, config.hidden_size // heads, dtype, source="images", places=places)


def describe(folder: Path, config: Any, dtype: str) -> Manifest:
    from . import token_number

    return Manifest(
        family="flamingo",
        dtype=dtype,
        kv_cache=kv_cache(config, dtype),
        context_length=config.max_position_embeddings,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size + config.additional_vocab_size,
        image=ImageTokens(IMAGE, token_number(folder, IMAGE), 1),
        cross_attention=cross_attention(config, dtype),
    )


# -------------------------------------------------------------------------------------------- the robot


def build_prompt(builder: PromptBuilder, manifest: Manifest, request: Request) -> Prompt:
    """A list as IdeficsProcessor puts it together; a string or a chat through the template, where there is one."""
    from ..prompt import ChatTemplate

    if builder.template is None and request.prompt is None and not request.listed and builder.knows(END):
        builder = builder.with_template(ChatTemplate(DIALOGUE, builder.tokenizer.names))
    if builder.template is None or request.listed:
        text = _written(builder, request)
        ids = builder.tokenizer.encode(text, add_special_tokens=False)
    else:
        text, ids = builder.encode(request)
    return last_picture(builder.expand(text, ids, request.images), builder.tokenizer.id_of("eos_token"))


def _written(builder: PromptBuilder, request: Request) -> str:
    """Source: processing_idefics.py of transformers 5.23. It puts no end of utterance between two texts: whether a tokenizer
    has that token is asked in a place where version 5 keeps it no more. Write it where a turn ends."""
    from ..prompt import TextPart

    if len(request.messages) != 1 or request.messages[0].plain:
        raise PromptError("this checkpoint has no chat template; give the prompt as a list of pictures and texts")
    text, before = builder.tokenizer.names.get("bos_token", ""), None
    for part in request.messages[0].content:
        if not isinstance(part, TextPart):
            text += f"{IMAGE}{AROUND}" if before == "image" else f"{AROUND}{IMAGE}{AROUND}"
            before = "image"
            continue
        words = part.text.strip(" ")
        if " " not in words and urlparse(words).scheme and urlparse(words).netloc:
            raise PromptError(
                f"the prompt holds the address {words!r}; nothing is downloaded here: open the picture and pass it"
            )
        text, before = text + words, "text"
    return text


def last_picture(prompt: Prompt, end_id: int | None) -> Prompt:
    """Every token sees the last picture before it; behind an end of text, none until the next picture."""
    starts = {start for start, _ in prompt.places}
    sees, shown, ended = [], -1, False
    for index, token in enumerate(prompt.ids):
        if index in starts:
            shown, ended = shown + 1, False
        sees.append(-1 if ended else shown)
        ended = ended or token == end_id
    return replace(prompt, sees=tuple(sees))


def encode_image(run: RunPart, manifest: Manifest, pixel_values: np.ndarray) -> Mapping[str, np.ndarray]:
    features = run("vision_encoder", {"pixel_values": pixel_values})
    if "resampler" in manifest.parts:
        features = run("resampler", features)
    return run("cross_kv", features)


# ---------------------------------------------------------------------------------------- the reference


def load_reference(folder: Path) -> Any:
    import torch
    from transformers import IdeficsForVisionText2Text

    return IdeficsForVisionText2Text.from_pretrained(folder, dtype=torch.float32)


def process(processor: Any, request: Request, text: str) -> Mapping[str, np.ndarray]:
    from ..prompt import TextPart

    items = [part.text if isinstance(part, TextPart) else part.image for part in request.messages[0].content]
    batch = processor(text=items, return_tensors="pt")
    pixels = {"pixel_values": batch["pixel_values"][0].numpy()} if request.images else {}
    return {"input_ids": batch["input_ids"][0].numpy(), "sees": _index(batch["image_attention_mask"][0].numpy()), **pixels}


def _index(mask: np.ndarray) -> np.ndarray:
    return np.where(mask.any(-1), mask.argmax(-1), -1)


def reference_inputs(model: Any, prompt: Prompt, pixel_values: np.ndarray) -> Mapping[str, Any]:
    import torch

    ids = torch.tensor([prompt.ids])
    side = model.config.vision_config.image_size
    pixels = torch.from_numpy(pixel_values) if len(pixel_values) else torch.zeros(1, 3, side, side)
    mask = torch.tensor(prompt.sees)[None, :, None] == torch.arange(len(pixels))
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels[None],
        "image_attention_mask": mask.long(),
    }  # fmt: skip
