"""BLIP-2 (Li et al. 2023, arXiv 2301.12597) and InstructBLIP (Dai et al. 2023, arXiv 2305.06500): a vision tower, a
Q-Former that asks it with a fixed number of learnt queries, a language model.

`Blip2ForConditionalGeneration` and `InstructBlipForConditionalGeneration` of transformers: EVA-like tower; OPT, Llama,
Mistral, Qwen2 or T5. What the queries found takes places in front of the text, before its first token, as many as
there are queries whatever the picture's size. InstructBLIP's Q-Former reads the instruction as well.

Parts: `vision_encoder`, `qformer`, `projector`, `embed_tokens`, `decoder`; for T5 `text_encoder` reads pictures and
text, `cross_kv` makes keys and values of what it read once a prompt, and the decoder has the answer alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle import CrossAttention, ImageTokens, KVCache, Manifest
from ..errors import PromptError, UnsupportedModelError
from . import llava

if TYPE_CHECKING:
    from ..prompt import Prompt, PromptBuilder, Request
    from . import PartSpec, RunPart

ARCHITECTURES = ("Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration")
ALIASES = {"blip2": "Salesforce/blip2-opt-2.7b", "instructblip": "Salesforce/instructblip-vicuna-7b"}

PARTS = ("vision_encoder", "qformer", "projector", "embed_tokens", "decoder")
PICTURES = (1, 1)

DECODERS = ("opt", "t5", *llava.DECODERS)


# ----------------------------------------------------------------------------------------- the workshop


def check_config(config: Mapping[str, Any]) -> None:
    text = config.get("text_config") or {}
    decoder = text.get("model_type", "opt")
    if decoder not in DECODERS:
        raise UnsupportedModelError(
            f"BLIP-2 with the language model {decoder!r} is not supported; supported are {', '.join(DECODERS)}."
        )
    llava.check_rotary(text)
    width, hidden = text.get("word_embed_proj_dim"), text.get("hidden_size")
    if width and hidden and width > hidden:
        raise UnsupportedModelError(
            f"The embeddings are {width} wide, what the queries found only {hidden}; it cannot fill them."
        )
    queries = config.get("num_query_tokens", 32)
    if not isinstance(queries, int) or queries < 1:
        raise UnsupportedModelError(f"config.json has num_query_tokens = {queries!r}; it is a whole number of 1 or more.")


def build_model(folder: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, _architecture(folder))(config)


def _architecture(folder: Path) -> str:
    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    return next(name for name in named if name in ARCHITECTURES)


def weight_name(name: str) -> str:
    return name


def part_specs(model: Any, dtype: str) -> list[PartSpec]:
    from . import PartSpec, cross_tensors, decoder_spec, embedding_spec
    from .decoder import CachedDecoder, Embedding, LastHiddenState

    config, language = model.config, model.language_model
    vision, text, queries = config.vision_config, config.text_config, config.num_query_tokens
    modules = _modules()
    kv, cross = kv_cache(text, dtype), cross_attention(text, dtype)
    side, patch = vision.image_size, vision.patch_size
    features = (("batch_size", (side // patch) ** 2 + 1, vision.hidden_size), dtype)
    found = (("batch_size", queries, config.qformer_config.hidden_size), dtype)
    instruction = {"instruction_ids": (("batch_size", "instruction_length"), "int64")} if _reads_instruction(config) else {}
    # OPT may have embeddings narrower than its layers.
    width = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
    specs = [
        PartSpec(
            "vision_encoder",
            LastHiddenState(model.vision_model),
            {"pixel_values": (("batch_size", 3, side, side), dtype)},
            {"vision_features": features},
        ),
        PartSpec(
            "qformer",
            modules["instructed" if instruction else "qformer"](model.qformer, model.query_tokens),
            {"vision_features": features, **instruction},
            {"query_features": found},
        ),
        PartSpec(
            "projector",
            model.language_projection if width == text.hidden_size else modules["cut"](model.language_projection, width),
            {"query_features": found},
            {"image_features": (("batch_size", queries, width), dtype)},
        ),
        embedding_spec(Embedding(model.get_input_embeddings()), width, dtype),
    ]
    if cross is None:
        body = language.model.decoder if text.model_type == "opt" else language.model
        decoder = CachedDecoder(body, language.lm_head, kv.layers)
        return [*specs, decoder_spec(decoder, kv, None, width, text.vocab_size, dtype)]
    rows = ("batch_size", "source_length", width)
    for stack in (language.encoder, language.decoder):
        _fix_buckets(stack.block[0].layer[0].SelfAttention)
    return [
        *specs,
        PartSpec(
            "text_encoder",
            modules["text_encoder"](language.encoder),
            {"inputs_embeds": (rows, dtype), "attention_mask": (("batch_size", "source_length"), "bool")},
            {"encoder_hidden_states": (rows, dtype)},
        ),
        PartSpec(
            "cross_kv",
            modules["cross_kv"](language.decoder),
            {"encoder_hidden_states": (rows, dtype)},
            cross_tensors(cross, "source_length"),
        ),
        decoder_spec(modules["decoder"](language, kv.layers, cross.layers), kv, cross, width, text.vocab_size, dtype),
    ]


def _modules() -> dict[str, type[Any]]:
    from torch import Tensor, nn

    from .decoder import CrossDecoder

    class QFormer(nn.Module):
        """vision_features `[B, patches + 1, width]` → what each query found, `[B, queries, width]`."""

        def __init__(self, qformer: nn.Module, queries: nn.Parameter) -> None:
            super().__init__()
            self.qformer, self.queries = qformer, queries

        def forward(self, vision_features: Tensor) -> Tensor:
            queries = self.queries.expand(vision_features.shape[0], -1, -1)
            return self.qformer(query_embeds=queries, encoder_hidden_states=vision_features).last_hidden_state

    class InstructedQFormer(nn.Module):
        """The same with instruction_ids int64 `[B, T]`, which the queries attend to."""

        def __init__(self, qformer: nn.Module, queries: nn.Parameter) -> None:
            super().__init__()
            self.qformer, self.queries = qformer, queries

        def forward(self, vision_features: Tensor, instruction_ids: Tensor) -> Tensor:
            queries = self.queries.expand(vision_features.shape[0], -1, -1)
            states = self.qformer(
                input_ids=instruction_ids, query_embeds=queries, encoder_hidden_states=vision_features
            ).last_hidden_state
            return states[:, : queries.shape[1]]

    class CutProjection(nn.Module):
        """For embeddings narrower than the projection: transformers fills the places with the first of its numbers, in
        their order (`masked_scatter`), and so does a checkpoint that was trained there."""

        def __init__(self, projection: nn.Module, width: int) -> None:
            super().__init__()
            self.projection, self.width = projection, width

        def forward(self, query_features: Tensor) -> Tensor:
            queries = query_features.shape[1]
            numbers = self.projection(query_features).flatten(1)[:, : queries * self.width]
            return numbers.view(-1, queries, self.width)

    class TextEncoder(nn.Module):
        """inputs_embeds `[B, S, hidden]`, attention_mask bool `[B, S]` → `[B, S, hidden]`."""

        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            return self.encoder(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, edgevlm_mask=attention_mask[:, None, None, :]
            ).last_hidden_state

    class CrossKV(nn.Module):
        """encoder_hidden_states `[B, S, hidden]` → keys and values of every decoder layer, `[B, H, S, D]` each."""

        def __init__(self, decoder: Any) -> None:
            super().__init__()
            self.layers = nn.ModuleList([block.layer[1].EncDecAttention for block in decoder.block])

        def forward(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
            made = []
            layer: Any
            for layer in self.layers:
                shape = (*encoder_hidden_states.shape[:2], layer.n_heads, layer.key_value_proj_dim)
                made += [project(encoder_hidden_states).view(shape).transpose(1, 2) for project in (layer.k, layer.v)]
            return tuple(made)

    class T5Decoder(CrossDecoder):
        def __init__(self, language: Any, layers: int, cross_layers: int) -> None:
            super().__init__(language.decoder, language.lm_head, layers, cross_layers)
            # T5 1.0 shares one table between embeddings and head, and scales between them; 1.1 and Flan do not.
            self.scale = language.config.d_model**-0.5 if language.config.scale_decoder_outputs else 1.0

        def hidden_states(self, inputs_embeds: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
            return super().hidden_states(inputs_embeds, position_ids, cache) * self.scale

    return {
        "qformer": QFormer, "instructed": InstructedQFormer, "cut": CutProjection,
        "text_encoder": TextEncoder, "cross_kv": CrossKV, "decoder": T5Decoder,
    }  # fmt: skip


def _fix_buckets(attention: Any) -> None:
    """Relative distances get their buckets from a table instead of a logarithm, whose last bit differs between runtimes
    and would move a distance at a border into the neighbouring bucket."""
    import torch

    if hasattr(attention, "edgevlm_buckets"):
        return
    longest, compute = attention.relative_attention_max_distance, attention._relative_position_bucket
    # Further away than the longest distance everything shares one bucket.
    table = compute(
        torch.arange(-longest, longest + 1), bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets, max_distance=longest,
    )  # fmt: skip
    attention.register_buffer("edgevlm_buckets", table, persistent=False)
    attention._relative_position_bucket = lambda distance, **_: table[distance.clamp(-longest, longest) + longest]


def kv_cache(text: Any, dtype: str) -> KVCache:
    if text.model_type == "t5":
        return KVCache(layers=text.num_decoder_layers, heads=text.num_heads, head_dim=text.d_kv, dtype=dtype)
    if text.model_type == "opt":
        heads = text.num_attention_heads
        return KVCache(layers=text.num_hidden_layers, heads=heads, head_dim=text.hidden_size // heads, dtype=dtype)
    return llava.kv_cache(text, dtype)


def cross_attention(text: Any, dtype: str) -> CrossAttention | None:
    if text.model_type != "t5":
        return None
    return CrossAttention(text.num_decoder_layers, text.num_heads, text.d_kv, dtype, source="prompt")


def _reads_instruction(config: Any) -> bool:
    return bool(config.model_type == "instructblip")


def describe(folder: Path, config: Any, dtype: str) -> Manifest:
    from . import added_token

    text = config.text_config
    # Checkpoints from before transformers 4.46 have no image token, and the same places.
    token_id = -1 if config.image_token_index is None else config.image_token_index
    manifest = Manifest(
        family="blip2",
        dtype=dtype,
        kv_cache=kv_cache(text, dtype),
        # T5 counts distances, not positions; 512 is what it was trained with.
        context_length=getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 512,
        hidden_size=getattr(text, "word_embed_proj_dim", None) or text.hidden_size,
        vocab_size=text.vocab_size,
        image=ImageTokens(added_token(folder, token_id) if token_id >= 0 else "", token_id, config.num_query_tokens),
        cross_attention=cross_attention(text, dtype),
        instruction_length=config.qformer_config.max_position_embeddings if _reads_instruction(config) else None,
    )
    if manifest.cross_attention is None:
        return manifest
    start = getattr(text, "decoder_start_token_id", None)
    return replace(manifest, decoder_start_id=start if start is not None else text.pad_token_id)


# -------------------------------------------------------------------------------------------- the robot


def build_prompt(builder: PromptBuilder, manifest: Manifest, request: Request) -> Prompt:
    """As Blip2Processor: the places of the picture, then the tokens of the text, its BOS among them."""
    from ..prompt import Prompt

    if len(request.images) != 1:
        raise PromptError(
            f"BLIP-2 answers about one picture, which comes before the text; {len(request.images)} were given. Ask about "
            "each picture in a call of its own."
        )
    text, ids = builder.encode(request.without_images())
    if manifest.image.token_id in ids:
        raise PromptError(
            f"the prompt holds the image token {manifest.image.token}; the picture's places are put in front of the text: "
            "leave the token out"
        )
    instruction: tuple[int, ...] = ()
    if manifest.instruction_length is not None:
        assert builder.instruction is not None
        instruction = tuple(builder.instruction.encode(text))
        if len(instruction) > manifest.instruction_length:
            raise PromptError(
                f"the instruction has {len(instruction)} tokens for the Q-Former, which reads {manifest.instruction_length} "
                "at most; shorten it"
            )
    places = manifest.image.places
    return Prompt([manifest.image.token_id] * places + ids, ((0, places),), text, instruction=instruction)


def encode_image(run: RunPart, manifest: Manifest, pixel_values: np.ndarray) -> np.ndarray:
    features = run("vision_encoder", {"pixel_values": pixel_values})["vision_features"]
    return features[0] if manifest.instruction_length is not None else _ask(run, {"vision_features": features})


def embed_image(run: RunPart, manifest: Manifest, encoded: np.ndarray, instruction: Sequence[int]) -> np.ndarray:
    return _ask(run, {"vision_features": encoded[None], "instruction_ids": np.array([instruction], np.int64)})


def _ask(run: RunPart, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    found = run("qformer", feeds)["query_features"]
    return run("projector", {"query_features": found})["image_features"][0]


# ---------------------------------------------------------------------------------------- the reference


def load_reference(folder: Path) -> Any:
    import torch
    import transformers

    model = getattr(transformers, _architecture(folder)).from_pretrained(folder, dtype=torch.float32)
    if model.config.image_token_index is None:
        # transformers 5 leaves the picture out where there is no such number; -1 is what the prompt below has there.
        model.config.image_token_index = -1
    return model


def process(processor: Any, request: Request, text: str) -> Mapping[str, np.ndarray]:
    old = not processor.num_query_tokens
    if old:  # it leaves the places to the model, which put them in front; the rest can be compared
        processor.num_query_tokens = 0
    batch = processor(text=text, images=list(request.images), return_tensors="np")
    made = {"pixel_values": batch["pixel_values"]}
    if not old:
        made["input_ids"] = batch["input_ids"][0]
    if "qformer_input_ids" in batch:
        made["instruction_ids"] = batch["qformer_input_ids"][0]
    return made


def reference_inputs(model: Any, prompt: Prompt, pixel_values: np.ndarray) -> Mapping[str, Any]:
    import torch

    ids = torch.tensor([prompt.ids])
    inputs = {"pixel_values": torch.from_numpy(pixel_values), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # The ids say where the picture goes; they may lie outside of the table.
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids.clamp(min=0))
    if prompt.instruction:
        inputs["qformer_input_ids"] = torch.tensor([prompt.instruction])
    return inputs
