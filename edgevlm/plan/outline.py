"""What a model is made of, as far as memory and time depend on it: weights by part and form, the KV cache, pictures.

Of a bundle everything is in its manifest. Of a checkpoint, `config.json` and the processor's file are enough: the family builds
the model without storage, as the export does, and splits it into the same parts with the same names of weights, so that a
recipe means here what it means there. That takes torch and transformers (extra `export`) and seconds, most of them their
import. A second description of every architecture would need neither, and would have to follow each default of each
configuration class of transformers. Published configurations of a few models ship with the package (`published.json`).
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..bundle import MANIFEST, Bundle, Manifest
from ..errors import CheckpointError, CheckpointNotFoundError, InputError, ManifestError, UnsupportedModelError
from ..export.checkpoint import read_object
from ..images import ImageProcessor
from ..models import PartSpec, aliases, family_by_name, family_for_config, parts_needed
from ..quant.recipe import BLOCKS, Recipe

__all__ = [
    "Outline",
    "PartOutline",
    "Sight",
    "Stack",
    "Weight",
    "is_bundle",
    "outline_bundle",
    "outline_checkpoint",
    "published",
]

_PUBLISHED = Path(__file__).with_name("published.json")
#: What is read of a checkpoint; no weights.
_FILES = ("*.json", "*.jinja", "*.txt")
#: Bytes of one weight, without its scales, by form.
WIDTHS = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int4": 0.5, "uint8": 1.0}
_FORMS = {"int8": "int8", "w8a8": "int8", "int4": "int4", "int3": "int4", "nf4": "int4", "fp4": "int4"}


@dataclass(frozen=True)
class Weight:
    """A parameter: `linear` layers multiply by it, of a `table` a step reads rows, anything else is `other`."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class PartOutline:
    """The weights of one part as they are stored. `stored` has bytes by form, scales with the weights they belong to; `scales`
    bytes of these. `tables` are the bytes of which a step reads rows alone, `largest` those of the largest linear layer,
    `linear` how many weights take part in products for every row, `head` how many for the last row alone."""

    stored: Mapping[str, int]
    tables: int
    largest: int
    linear: int
    head: int = 0
    largest_form: str = "float32"

    @property
    def size(self) -> int:
        return sum(self.stored.values())


@dataclass(frozen=True)
class Stack:
    """A stack of transformer layers: the widths that activations have, and how many layers look at everything."""

    width: int
    inner: int
    heads: int
    head_dim: int
    layers: int
    whole: int


@dataclass(frozen=True)
class Sight:
    """What the pictures of a prompt take: `tiles` go through the vision encoder, `batch` of them at once, `patches` rows each;
    `places` in the prompt, all pictures together; `shown` (width, height) of one tile."""

    images: int
    tiles: int
    batch: int
    patches: int
    places: int
    shown: tuple[int, int]


@dataclass(frozen=True)
class Outline:
    """A model, or a bundle. `manifest` describes it, `recipe` how weights are stored (None: as the graph computes); `side`
    is the size (width, height) of a picture or tile, None where any is taken, `patch` the side of a patch, in pixels,
    `tokenizer` the size of tokenizer.json, in bytes."""

    name: str
    manifest: Manifest
    parts: Mapping[str, PartOutline]
    decoder: Stack
    vision: Stack
    side: tuple[int, int] | None
    patch: int
    processor: ImageProcessor
    recipe: str | None = None
    weights: Mapping[str, tuple[Weight, ...]] = field(default_factory=dict)
    is_bundle: bool = False
    tokenizer: int = 0
    onnxruntime_only: bool = False

    @property
    def bytes_per_token(self) -> int:
        """Of the KV cache, for one position."""
        return self.manifest.kv_cache.bytes_per_token()

    @property
    def cross_bytes_per_row(self) -> int:
        cross = self.manifest.cross_attention
        return 2 * cross.layers * cross.heads * cross.head_dim * (2 if cross.dtype == "float16" else 4) if cross else 0

    @property
    def width(self) -> int:
        """Bytes of one number that a graph computes with."""
        return 2 if self.manifest.dtype == "float16" else 4

    def under(self, recipe: Recipe, name: str | None = None, kv_cache: str | None = None) -> Outline:
        """The same checkpoint with its weights stored as a recipe says. Raises RecipeError where a rule fits nothing."""
        recipe.require_matches({part: [w.name for w in ws if w.kind != "other"] for part, ws in self.weights.items()})
        dtype = self.manifest.dtype
        kept = "int8" if (kv_cache or recipe.kv_cache) == "int8" else dtype
        manifest = replace(self.manifest, kv_cache=replace(self.manifest.kv_cache, dtype=kept))
        parts = {part: _stored(part, weights, recipe, dtype, manifest.vocab_size) for part, weights in self.weights.items()}
        only = any(rule.method in ("nf4", "fp4") for rule in recipe.rules)
        return replace(self, manifest=manifest, parts=parts, recipe=name or recipe.name, onnxruntime_only=only)

    def look(self, images: int, resolution: tuple[int, int] | None, visual_tokens: int | None = None) -> Sight:
        """What `images` pictures of `resolution` (width, height) take; without one, of the size that a tile has, or of 1,280 by
        960 pixels. Raises InputError for a number of pictures that the model does not take."""
        fewest, most = family_by_name(self.manifest.family).PICTURES
        if images < fewest or (most is not None and images > most):
            takes = f"exactly {fewest}" if fewest == most else f"{fewest} or more" if most is None else f"{fewest} to {most}"
            raise InputError(f"{self.name} was asked about {images} pictures; a {self.manifest.family} model takes {takes}.")
        patches = self.manifest.patches
        if not images:
            return Sight(0, 0, 0, 0, 0, (0, 0))
        any_size = patches is not None or self.processor.tiles is not None
        if visual_tokens is not None and not any_size:
            raise InputError(
                f"{self.name} gives every picture {self.manifest.image.places} places; visual tokens can be bounded where "
                "pictures may have any size (InternVL, Qwen2-VL and later)."
            )
        processor = self.processor.limit(places=max(1, self.manifest.image.places), visual_tokens=visual_tokens)
        width, height = resolution or self.side or (1280, 960)
        rows, columns = processor.output_size(height, width)
        if patches is not None:
            count = (rows // patches.size) * (columns // patches.size)
            return Sight(images, images, 1, count, images * (count // patches.merge**2), (columns, rows))
        tiles = processor.count_tiles(height, width)
        shown = self.side or (columns, rows)
        cut = (shown[0] // self.patch) * (shown[1] // self.patch) + 1  # and the class token
        return Sight(images, images * tiles, tiles, cut, images * tiles * self.manifest.image.places, shown)


# ------------------------------------------------------------------------------------------------ a bundle


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a bundle."""
    return (folder / MANIFEST).is_file()


def outline_bundle(folder: Path) -> Outline:
    """From the manifest of a bundle. Raises BundleError and its kinds."""
    manifest = Bundle.open(folder, check_files=False).manifest
    missing = [part for part in parts_needed(family_by_name(manifest.family), manifest) if part not in manifest.parts]
    if missing:
        raise ManifestError(
            f"{folder} is a {manifest.family} bundle without the part {', '.join(missing)}. Export the checkpoint again."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        processor = ImageProcessor.from_config({**_processor_config(folder, manifest.family), **manifest.image_options})
    except (OSError, ValueError, RecursionError, AttributeError) as exc:
        raise ManifestError(f"{folder} has no readable config.json or processor: {exc}. Export the checkpoint again.") from exc
    head = manifest.vocab_size * _head_width(manifest, config)
    parts = {}
    for name, part in manifest.parts.items():
        stored = {form: size for form, size in part.weights.items() if form in WIDTHS}
        table = part.size if name == "embed_tokens" else 0
        # Beside quantized weights, floats are nearly all scales.
        quantized = {form: size for form, size in stored.items() if not form.startswith("float")}
        floats = sum(size / WIDTHS[form] for form, size in stored.items() if form.startswith("float"))
        count = sum(size / WIDTHS[form] for form, size in quantized.items()) or floats
        form = "int8" if "int8" in stored else next((f for f in stored if f.startswith("float")), "float32")
        last = head if name == "decoder" and head < count else 0
        largest = int(last * WIDTHS[form]) if last else 0
        if quantized:
            low = min(quantized, key=lambda form: WIDTHS[form])
            stored = {**quantized, low: part.size - sum(size for form, size in quantized.items() if form != low)}
        parts[name] = PartOutline(stored, table, largest, 0 if table else int(count - last), int(last), form)
    recipe = (manifest.recipe or {}).get("name")
    outline = _outline(str(folder), manifest, parts, config, processor, recipe, {}, is_bundle=True)
    only = any(part.onnxruntime_only for part in manifest.parts.values())
    return replace(outline, tokenizer=_tokenizer_size(folder, manifest), onnxruntime_only=only)


def _head_width(manifest: Manifest, config: Mapping[str, Any]) -> int:
    """What the output layer reads."""
    return int(_first(_text(config), ("hidden_size", "d_model", "n_embd"), manifest.hidden_size))


# -------------------------------------------------------------------------------------------- a checkpoint


def published() -> dict[str, Any]:
    """The configurations that ship with the package, by Hub id."""
    return json.loads(_PUBLISHED.read_text(encoding="utf-8"))["models"]


@contextlib.contextmanager
def _configuration(model: str) -> Iterator[tuple[Path, str]]:
    """A folder with the configuration of an alias, Hub id, folder or shipped model, and its name."""
    from ..export.checkpoint import ASSETS

    local = Path(model).expanduser()
    if local.is_dir() or (ASSETS / model / "config.json").is_file():
        yield (local, local.resolve().name) if local.is_dir() else (ASSETS / model, model)
        return
    hub_id = aliases().get(model, model)
    if local.exists() or hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~", "demo/")):
        raise CheckpointNotFoundError(
            f"{model!r} is neither a folder here, nor an alias ({', '.join(sorted(aliases()))}), nor a shipped model, nor a "
            "Hub id (owner/name)."
        )
    known = published().get(hub_id)
    with tempfile.TemporaryDirectory(prefix="edgevlm-") as scratch:
        folder = Path(scratch)
        if known is None:
            folder = _download_configuration(model, hub_id)
        for name, content in (known or {}).get("files", {}).items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        yield folder, hub_id


def _download_configuration(model: str, hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_FILES)))
    except Exception as exc:  # the Hub client's own HTTP library raises errors that its public names do not cover
        raise CheckpointNotFoundError(
            f"The configuration of {model!r} ({hub_id}) is not at hand, and the Hub could not be reached. Copy its config.json "
            "and preprocessor_config.json into a folder and give that; or try one that ships with EdgeVLM: "
            f"{', '.join(sorted(published()))}. ({type(exc).__name__})"
        ) from exc


def outline_checkpoint(model: str, dtype: str) -> Outline:
    """From configuration files alone; the graphs compute in `dtype` (`float32`, `float16`).

    Raises CheckpointNotFoundError, CheckpointError, UnsupportedModelError.
    """
    with _configuration(model) as (folder, name):
        path = folder / "config.json"
        if not path.is_file():
            what = "neither a bundle (edgevlm.json) nor a checkpoint (config.json)"
            raise CheckpointError(f"{folder} is {what}: it has none of these files.")
        config = read_object(path)
        if config.get("quantization_config"):
            raise UnsupportedModelError(
                f"{name} is quantized already; what it takes is known when it is exported: plan the bundle, or the float model."
            )
        return _outline_config(name, folder, config, dtype)


def _outline_config(name: str, folder: Path, config: dict[str, Any], dtype: str) -> Outline:
    family_name, family = family_for_config(config)
    with tempfile.TemporaryDirectory(prefix="edgevlm-") as scratch:
        stand_in = _with_tokenizer(folder, Path(scratch), config)

        from huggingface_hub.errors import StrictDataclassError

        from ..export.trace import build_fake

        try:
            fake = build_fake(lambda: family.build_model(stand_in), dtype)
            specs = family.part_specs(fake.model, dtype)
            manifest = family.describe(stand_in, fake.model.config, dtype)
        except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as exc:
            raise CheckpointError(f"{folder / 'config.json'} does not describe a {family_name} model: {exc}.") from exc
    weights = {spec.name: tuple(_weights_of(fake, spec, family)) for spec in specs}
    read = manifest.image_options
    processor = ImageProcessor.from_config({**_processor_config(folder, family_name), **read})
    described = fake.model.config
    full = described.to_dict() if hasattr(described, "to_dict") else config
    parts = {part: _stored(part, ws, Recipe("float", ()), dtype, manifest.vocab_size) for part, ws in weights.items()}
    outline = _outline(name, manifest, parts, full, processor, None, weights)
    return replace(outline, tokenizer=_tokenizer_size(folder, manifest))


def _tokenizer_size(folder: Path, manifest: Manifest) -> int:
    """Bytes of tokenizer.json; without one, as many for each entry as a vocabulary of 151,643 with its merges takes."""
    path = folder / "tokenizer.json"
    return path.stat().st_size if path.is_file() else 73 * manifest.vocab_size


def _with_tokenizer(folder: Path, scratch: Path, config: Mapping[str, Any]) -> Path:
    """The folder, or where it has no tokenizer, one with the same files and a tokenizer that knows the tokens that stand for
    pictures: `describe` looks them up, and nothing here depends on their text."""
    if (folder / "tokenizer.json").is_file():
        return folder
    for path in folder.iterdir():
        (scratch / path.name).symlink_to(path.resolve())
    keys = ("image_token_id", "image_token_index", "video_token_id", "img_context_token_id")
    numbers = [config[key] for key in keys if isinstance(config.get(key), int)]
    texts = ("<image>", "<img>", "</img>", "<IMG_CONTEXT>", "<fake_token_around_image>", "<|endofchunk|>", "<imgpad>")
    added = [{"id": number, "content": f"<{number}>"} for number in numbers]
    added += [{"id": 10**9 + n, "content": text} for n, text in enumerate(texts)]
    (scratch / "tokenizer.json").write_text(json.dumps({"added_tokens": added}), encoding="utf-8")
    return scratch


def _weights_of(fake: Any, spec: PartSpec, family: Any) -> Iterator[Weight]:
    """The parameters that a part's outputs depend on, by the names that recipes use. A module may hold more than its
    graph will: a tower's layers behind the one whose features are taken, the embeddings beside a decoder."""
    from torch import nn

    read, factors = _read_by(fake, spec)
    seen: set[tuple[int, str]] = set()
    for owner in spec.module.modules():
        kind = "linear" if isinstance(owner, nn.Linear) else "table" if isinstance(owner, nn.Embedding) else "other"
        for local, parameter in owner.named_parameters(recurse=False):
            if id(parameter) not in read or (id(parameter), kind) in seen:
                continue
            seen.add((id(parameter), kind))
            shape = tuple(int(d) for d in parameter.shape)
            matrix = len(shape) == 2
            # torch's own attention holds the weights of three linear layers as one parameter.
            product = matrix and (id(parameter) in factors or local == "in_proj_weight")
            what = "linear" if product else kind if matrix and local == "weight" else "other"
            yield Weight(family.weight_name(fake.names[id(parameter)]), shape, what)


def _read_by(fake: Any, spec: PartSpec) -> tuple[set[int], set[int]]:
    """The ids of the parameters that the outputs of a part depend on, and of those that are multiplied by outside of layers,
    found by running it on tensors without storage."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_leaves

    from ..export.trace import one_node_each

    made: dict[int, list[Any]] = {}
    factors: set[int] = set()
    alive: list[Any] = []  # an id may be given away again otherwise

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.nn.functional.linear):
                factors.update(id(leaf) for leaf in inputs[1:2])
            changed = inputs[:1] if func is torch.Tensor.__setitem__ else []
            for leaf in [*tree_leaves(out), *changed]:
                if isinstance(leaf, torch.Tensor):
                    made[id(leaf)] = [*made.get(id(leaf), []), *(x for x in inputs if x is not leaf)]
                    alive.append(leaf)
            return out

    dims = dict.fromkeys(dim for shape, _ in spec.inputs.values() for dim in shape if isinstance(dim, str))
    sizes = {dim: 3 + n for n, dim in enumerate(dims)}
    with torch.no_grad(), one_node_each(spec.module), fake.mode:
        arguments = [
            torch.zeros([sizes[d] if isinstance(d, str) else d for d in shape], dtype=getattr(torch, dtype))
            for shape, dtype in spec.inputs.values()
        ]
        with Recorder():
            waiting = [leaf for leaf in tree_leaves(spec.module.eval()(*arguments)) if isinstance(leaf, torch.Tensor)]
    found: set[int] = set()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) not in found:
            found.add(id(tensor))
            waiting += made.get(id(tensor), [])
    return found & set(fake.names), factors


def _stored(part: str, weights: tuple[Weight, ...], recipe: Recipe, dtype: str, vocabulary: int) -> PartOutline:
    """What the weights of a part take under a recipe: int8 has a scale for each output channel (row of a table), four bits one
    for each block of inputs. Scales are as wide as the graph computes."""
    wide = int(WIDTHS[dtype])
    stored: defaultdict[str, int] = defaultdict(int)
    tables = largest = linear = head = 0
    largest_form = dtype
    for weight in weights:
        rule = recipe.rule_for(part, weight.name)
        form = _FORMS.get(rule.method, dtype) if weight.kind != "other" else dtype
        if weight.kind == "table" and form == "int4":
            form = "int8"
        size = int(weight.count * WIDTHS[form])
        if form == "int8":
            size += weight.shape[0] * wide
        elif form == "int4":
            block = rule.block_size if rule.block_size is not None else 64 if rule.method in BLOCKS[2:] else 32
            inner = weight.shape[1]
            size += math.ceil(inner / min(block or inner, inner)) * weight.shape[0] * wide
        stored[form] += size
        if weight.kind == "table" and part == "embed_tokens":
            tables += size
        elif part == "decoder" and _is_head(weight, vocabulary):
            head += weight.count
        else:
            linear += weight.count
        if weight.kind == "linear" and size > largest:
            largest, largest_form = size, form
    return PartOutline(dict(stored), tables, largest, linear, head, largest_form)


def _is_head(weight: Weight, vocabulary: int) -> bool:
    """Whether it makes the logits; Flamingo has a small layer of its own for added tokens."""
    within = not any(word.isdigit() for word in weight.name.split("."))
    return weight.kind == "linear" and within and 0.9 * vocabulary <= weight.shape[0] <= vocabulary


# ------------------------------------------------------------------------------------------------- widths


def _outline(
    name: str, manifest: Manifest, parts: Mapping[str, PartOutline], config: Mapping[str, Any], processor: ImageProcessor,
    recipe: str | None, weights: Mapping[str, tuple[Weight, ...]], *, is_bundle: bool = False,
) -> Outline:  # fmt: skip
    text, vision = _text(config), _vision(config)
    kv = manifest.kv_cache
    width = int(_first(text, ("hidden_size", "d_model", "n_embd"), manifest.hidden_size))
    heads = int(_first(text, ("num_attention_heads", "num_heads", "n_heads"), kv.heads))
    inner = int(_first(text, ("intermediate_size", "ffn_dim", "d_ff"), 4 * width))
    decoder = Stack(width, inner, heads, kv.head_dim, kv.layers, kv.layers)
    seen = int(_first(vision, ("embed_dim", "hidden_size", "width"), 1024))
    ratio = _first(vision, ("mlp_ratio",), 4)
    layers = int(_first(vision, ("depth", "num_hidden_layers", "layers"), 24))
    tower = int(_first(vision, ("num_heads", "num_attention_heads", "heads"), max(1, seen // 64)))
    if manifest.family == "qwen2_vl" and not vision.get("intermediate_size"):
        deep = int(seen * ratio)
    else:
        deep = int(_first(vision, ("intermediate_size",), seen * ratio))
        seen = int(_first(vision, ("hidden_size", "embed_dim", "width"), seen)) if manifest.family != "flamingo" else seen
    whole = vision.get("fullatt_block_indexes")
    looks = len(set(whole) & set(range(layers))) if whole and manifest.patches and manifest.patches.window else layers
    stack = Stack(seen, deep, tower, seen // tower, layers, looks)
    side = _first(vision, ("image_size",), None)
    pair = None
    if manifest.patches is None:
        pair = (int(side[1]), int(side[0])) if isinstance(side, list | tuple) else (int(side or 224), int(side or 224))
    patch = _first(vision, ("patch_size",), 14)
    patch = int(patch[0] if isinstance(patch, list | tuple) else patch)
    return Outline(name, manifest, parts, decoder, stack, pair, patch, processor, recipe, weights, is_bundle)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("text_config") or config.get("llm_config") or config


def _vision(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("vision_config") or config.get("visual") or {}


def _first(config: Mapping[str, Any], keys: tuple[str, ...], default: Any) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), default)


def _processor_config(folder: Path, family: str) -> dict[str, Any]:
    for name, inside in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            found = found.get(inside, {}) if inside else found
            if found:
                return found
    kinds = {
        "qwen2_vl": "Qwen2VLImageProcessor", "qwen3_vl": "Qwen2VLImageProcessor", "internvl": "GotOcr2ImageProcessor",
        "flamingo": "IdeficsImageProcessor", "open_flamingo": "CLIPImageProcessor", "blip2": "BlipImageProcessor",
    }  # fmt: skip
    if family in ("qwen2_vl", "qwen3_vl", "internvl"):
        raise CheckpointError(
            f"{folder} has no preprocessor_config.json; what a picture of any size takes depends on it. Copy it beside "
            "config.json."
        )
    return {"image_processor_type": kinds.get(family, "CLIPImageProcessor")}
