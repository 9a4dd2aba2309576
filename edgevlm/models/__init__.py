"""Families of vision-language models, one file each, named as the user types them.

A family says how a checkpoint is split into parts, how the bundle describes it, how a prompt is put together, and how
the runtime turns a picture into what the decoder reads. It imports torch only inside the functions that the workshop
calls.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..bundle import CrossAttention, KVCache, Manifest
from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from ..prompt import Prompt, PromptBuilder, Request

__all__ = [
    "Embedded",
    "Family",
    "PartSpec",
    "Rows",
    "RunPart",
    "aliases",
    "family_by_name",
    "family_for_config",
    "parts_needed",
]

#: Runs a part by its name. What comes out may lie on a GPU: it can be indexed and sliced by its first axis, reshaped, and
#: concatenated along the first axis without leaving it.
RunPart = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]
#: Of one picture: the embeddings `[places, hidden]` that take its places in the prompt, or its rows of the decoder's
#: cross-attention, `cross_key_values.N.key|value`, `[1, heads, places, head_dim]` each.
Embedded = np.ndarray | Mapping[str, np.ndarray]


@dataclass(frozen=True)
class PartSpec:
    """One part to trace: a torch module and what goes in and comes out.

    `inputs` maps each input's name to its dimensions (an int, or a name where it is dynamic) and dtype as numpy names
    it, `outputs` likewise, in the order of the module's arguments and results.
    """

    name: str
    module: Any
    inputs: Mapping[str, tuple[tuple[int | str, ...], str]]
    outputs: Mapping[str, tuple[tuple[int | str, ...], str]]


@dataclass(frozen=True)
class Rows:
    """Which rows of a stored weight make one of the model's: `count` from `first` on, of every `period` rows."""

    first: int
    count: int
    period: int

    def of(self, stored: Any) -> Any:
        """Those rows of an array or tensor `[rows, …]`."""
        runs = stored.reshape(-1, self.period, *stored.shape[1:])[:, self.first : self.first + self.count]
        return runs.reshape(-1, *stored.shape[1:])


class Family(Protocol):
    """What each file in this package offers at module level."""

    ARCHITECTURES: tuple[str, ...]
    ALIASES: Mapping[str, str]
    PARTS: tuple[str, ...]
    """The parts that every bundle of the family has."""
    PICTURES: tuple[int, int | None]
    """The fewest and the most pictures that a prompt may hold; None: any number."""

    # the workshop
    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raises UnsupportedModelError, naming what is not covered and what is."""

    def build_model(self, folder: Path) -> Any:
        """The torch model for the configuration in `folder`, without its weights."""

    def part_specs(self, model: Any, dtype: str) -> list[PartSpec]:
        """The parts of a model, to be computed in `dtype`, each behind those whose outputs it takes."""

    def weight_name(self, name: str) -> str:
        """One name for a weight, whichever layout (of parameter or checkpoint) it is given in."""

    def split_weight(self, config: Mapping[str, Any], name: str, shape: Sequence[int]) -> Mapping[str, Rows | None]:
        """What a stored weight of a checkpoint with this `config.json` holds: names as `weight_name` gives them, each with
        its rows, None for all of them. Only families with a layout that holds several weights in one offer it."""

    def bundle_files(self, folder: Path) -> Mapping[str, str]:
        """Text files of the bundle that the checkpoint lacks, or has in another form, by name. Only families with such a
        layout offer it."""

    def describe(self, folder: Path, config: Any, dtype: str) -> Manifest:
        """What the runtime must know of the checkpoint; parts and files are filled in by the export."""

    # the robot
    def build_prompt(self, builder: PromptBuilder, manifest: Manifest, request: Request) -> Prompt:
        """Token ids and places as the checkpoint's own processor has them. Raises PromptError."""

    def encode_image(self, run: RunPart, manifest: Manifest, pixel_values: np.ndarray) -> Embedded:
        """float `[tiles, 3, H, W]` of one picture, mostly one tile, through the parts that see nothing but the picture."""

    def embed_image(self, run: RunPart, manifest: Manifest, encoded: Embedded, instruction: Sequence[int]) -> Embedded:
        """What `encode_image` gave, through the part that reads the instruction too. Only families whose bundles have an
        `instruction_length` offer it."""

    # the reference
    def load_reference(self, folder: Path) -> Any:
        """The torch model in float32, with its weights, as published."""

    def process(self, processor: Any, request: Request, text: str) -> Mapping[str, np.ndarray]:
        """What the checkpoint's own processor makes of a request: `input_ids` `[S]`, `pixel_values` `[pictures, 3, H, W]`,
        perhaps `instruction_ids` `[T]`. `text` is the prompt as the runtime wrote it."""

    def reference_inputs(self, model: Any, prompt: Prompt, pixel_values: np.ndarray) -> Mapping[str, Any]:
        """What `generate` of the reference takes for a prompt."""


def parts_needed(family: Family, manifest: Manifest) -> list[str]:
    """The parts that a bundle must have."""
    cross, needed = manifest.cross_attention, list(family.PARTS)
    if cross:
        needed.append("cross_kv")
        made = manifest.parts["cross_kv"].inputs if "cross_kv" in manifest.parts else {}
        needed += {"prompt": ["text_encoder"], "images": ["resampler"] * ("image_features" in made)}[cross.source]
    return list(dict.fromkeys(needed))


def cross_tensors(cross: CrossAttention, length: str) -> dict[str, tuple[tuple[int | str, ...], str]]:
    """Keys and values of every cross-attention layer, as inputs or outputs of a PartSpec."""
    shape = ("batch_size", cross.heads, length, cross.head_dim)
    return {f"cross_key_values.{n}.{which}": (shape, cross.dtype) for n in range(cross.layers) for which in ("key", "value")}


def decoder_spec(
    module: Any, kv: KVCache, cross: CrossAttention | None, hidden: int, vocabulary: int, dtype: str, *, mrope: bool = False
) -> PartSpec:
    """The part `decoder` around a `CachedDecoder`; its interface is the same in all families, but for what is read beside the
    sequence and, with `mrope`, the positions of the rotary embedding."""
    shape = ("batch_size", kv.heads, "capacity", kv.head_dim)
    cache = {f"past_key_values.{n}.{which}": (shape, dtype) for n in range(kv.layers) for which in ("key", "value")}
    turns = {"mrope_position_ids": ((3, "batch_size", "sequence_length"), "int64")} if mrope else {}
    read = {}
    if cross:
        mask = (("batch_size", "sequence_length", "cross_length"), "bool")
        read = {"cross_attention_mask": mask, **cross_tensors(cross, "cross_length")}
    return PartSpec(
        "decoder",
        module,
        {
            "inputs_embeds": (("batch_size", "sequence_length", hidden), dtype),
            "position_ids": (("batch_size", "sequence_length"), "int64"),
            "last_token_index": (("batch_size",), "int64"),
            **cache,
            **turns,
            **read,
        },
        {
            "logits": (("batch_size", 1, vocabulary), dtype),
            **{name.replace("past_key_values", "present"): value for name, value in cache.items()},
        },
    )


def embedding_spec(module: Any, hidden: int, dtype: str) -> PartSpec:
    """The part `embed_tokens`."""
    return PartSpec(
        "embed_tokens",
        module,
        {"input_ids": (("batch_size", "sequence_length"), "int64")},
        {"inputs_embeds": (("batch_size", "sequence_length", hidden), dtype)},
    )


def added_token(folder: Path, token_id: int) -> str:
    """The text of an added token. Raises UnsupportedModelError where the tokenizer has none with this number."""
    names = _added_tokens(folder)
    if token_id not in names:
        raise UnsupportedModelError(
            f"config.json says that the image token is number {token_id}, but tokenizer.json adds no token with that number. "
            "Save the processor that belongs to this checkpoint into its folder."
        )
    return names[token_id]


def token_number(folder: Path, token: str) -> int:
    """The number of an added token. Raises UnsupportedModelError where the tokenizer has none with this text."""
    for number, text in _added_tokens(folder).items():
        if text == token:
            return number
    raise UnsupportedModelError(
        f"tokenizer.json adds no token {token!r}, which marks a picture. Save the processor that belongs to this checkpoint "
        "into its folder."
    )


def _added_tokens(folder: Path) -> dict[int, str]:
    table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return {int(entry["id"]): str(entry["content"]) for entry in table.get("added_tokens", [])}


#: Files beside the families.
_SHARED = ("decoder", "internvl_chat", "qwen_vl_modules", "tiktoken")


def _modules() -> dict[str, Any]:
    names = [m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED]
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def aliases() -> dict[str, str]:
    """Short names and the Hub ids they stand for."""
    return {alias: target for module in _modules().values() for alias, target in module.ALIASES.items()}


def family_by_name(name: str) -> Family:
    """The family of a manifest."""
    modules = _modules()
    if name not in modules:
        raise UnsupportedModelError(
            f"The bundle's family is {name!r}; this EdgeVLM knows {', '.join(sorted(modules))}. Use a newer EdgeVLM, or export "
            "the checkpoint again."
        )
    return modules[name]


def family_for_config(config: Mapping[str, Any]) -> tuple[str, Family]:
    """The family that covers a checkpoint's `config.json`."""
    wanted = [str(a) for a in config.get("architectures") or []]
    known: list[str] = []
    for name, module in _modules().items():
        known += module.ARCHITECTURES
        if set(wanted) & set(module.ARCHITECTURES):
            module.check_config(config)
            return name, module
    asked = " / ".join(wanted) or f"model_type {config.get('model_type')!r} without 'architectures'"
    raise UnsupportedModelError(f"The checkpoint's architecture is {asked}; supported are {', '.join(sorted(known))}.")
