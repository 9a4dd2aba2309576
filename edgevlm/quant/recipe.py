"""Recipes: which weight is quantized how, as data.

A recipe is an ordered list of rules over parts and parameter names; the first rule that matches a weight decides. It
says what, and nothing of packing or backends. As a file (TOML or JSON):

    name = "mine"
    kv_cache = "int8"                 # or "float", the default
    [[rules]]
    parts = "decoder"                 # shell patterns
    weights = "*.self_attn.*"
    method = "int4"                   # see METHODS
    algorithm = "awq"                 # rtn, awq, gptq, awq-gptq
    block_size = 32
    [[rules]]
    method = "int8"                   # everything else
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import RecipeError

__all__ = ["ALGORITHMS", "METHODS", "RANGES", "RECIPES", "Recipe", "Rule", "load_recipe"]

METHODS = ("float", "int8", "w8a8", "int4", "int3", "nf4", "fp4")
ALGORITHMS = ("rtn", "awq", "gptq", "awq-gptq")
RANGES = ("minmax", "percentile", "mse")
CACHES = ("float", "int8")
#: Methods whose scales belong to blocks of inputs.
BLOCKS = ("int4", "int3", "nf4", "fp4")


@dataclass(frozen=True)
class Rule:
    """What happens to the weights whose part and name match (shell patterns).

    `float` leaves them. `int8` is symmetric with a scale for each output channel (each row of an embedding table). `w8a8` is
    the same with activations in eight bits too, of a fixed scale that calibration finds. `int4` is symmetric with a scale for
    each `block_size` inputs of an output channel (0: one for all of them; without it, 32, or one where there are fewer
    inputs); `int3` is the same with half as many levels, for comparisons: it saves no bytes. `nf4` and `fp4` are bitsandbytes'
    types, which ONNX Runtime alone runs.

    `algorithm` is how `int4` and `int3` choose their numbers: `rtn` rounds to nearest, `awq` and `gptq` look at calibration
    samples. `smooth` is SmoothQuant's share of the difficulty that moves from activations to weights (0 to 1, for `w8a8`),
    `range` how the scale of its activations is chosen. An `optional` rule may match nothing.
    """

    method: str
    parts: str = "*"
    weights: str = "*"
    block_size: int | None = None
    algorithm: str = "rtn"
    smooth: float = 0.5
    range: str = "minmax"
    optional: bool = False

    def matches(self, part: str, weight: str) -> bool:
        return fnmatchcase(part, self.parts) and fnmatchcase(weight, self.weights)

    @property
    def calibrated(self) -> bool:
        """Whether it needs to see what goes into its layers."""
        return self.method == "w8a8" or self.algorithm != "rtn"


_DEFAULTS = {name: f.default for name, f in Rule.__dataclass_fields__.items()}


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; the first match wins, and a weight without a match stays float. `kv_cache` is what keys and values are
    kept in: `float`, as the graph computes, or `int8`."""

    name: str
    rules: tuple[Rule, ...]
    kv_cache: str = "float"

    def rule_for(self, part: str, weight: str) -> Rule:
        return next((rule for rule in self.rules if rule.matches(part, weight)), Rule("float"))

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration samples."""
        return self.kv_cache != "float" or any(rule.calibrated for rule in self.rules)

    def require_matches(self, weights: Mapping[str, Sequence[str]]) -> None:
        """Raises RecipeError where a rule fits none of a model's weights, by part."""
        for number, rule in enumerate(self.rules, 1):
            if rule.optional or any(rule.matches(part, name) for part, names in weights.items() for name in names):
                continue
            parts = [part for part in weights if fnmatchcase(part, rule.parts)]
            if not parts:
                raise RecipeError(
                    f"Rule {number} of the recipe {self.name!r} is for the parts {rule.parts!r}; this model has "
                    f"{', '.join(weights)}."
                )
            names = [name for part in parts for name in weights[part]]
            near = difflib.get_close_matches(rule.weights.strip("*"), names, n=3, cutoff=0.3)
            shown = near + [name for name in names if name not in near][: 6 - len(near)]
            raise RecipeError(
                f"Rule {number} of the recipe {self.name!r} fits no weight: no name in {', '.join(parts)} is like "
                f"{rule.weights!r}. Names there are, among {len(names)}: {', '.join(shown)}. `edgevlm inspect --weights` lists "
                "them; `optional = true` lets a rule fit nothing."
            )

    def to_dict(self) -> dict[str, Any]:
        """As a file has it: what is not said is as it always is."""
        rules = [{k: v for k, v in asdict(rule).items() if k == "method" or v != _DEFAULTS[k]} for rule in self.rules]
        return {"name": self.name, "rules": rules, **({"kv_cache": self.kv_cache} if self.kv_cache != "float" else {})}


#: T5's table of position biases: a few hundred numbers that every layer adds to its scores.
_BIASES = Rule("float", weights="*.relative_attention_bias.*", optional=True)
#: What sees pictures, and runs once a picture: as many products as the decoder's prefill, of activations with wide channels.
_VISION = ("vision_encoder", "qformer", "resampler")


def _decoder_in(method: str, **options: Any) -> tuple[Rule, ...]:
    """What costs little and hurts most stays at eight bits: embeddings, the output head, the vision side."""
    return (
        _BIASES,
        Rule("int8", "decoder", "*lm_head.*", optional=True),
        Rule(method, "decoder", **options),
        Rule(method, "text_encoder", optional=True, **options),
        Rule("int8"),
    )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("int8", (_BIASES, Rule("int8"))),
        Recipe("int4", _decoder_in("int4", algorithm="awq")),
        Recipe("int4-rtn", _decoder_in("int4")),
        Recipe("int4-gptq", _decoder_in("int4", algorithm="gptq")),
        Recipe("int4-awq-gptq", _decoder_in("int4", algorithm="awq-gptq")),
        Recipe("w8a8", (_BIASES, *(Rule("w8a8", part, optional=True) for part in _VISION), Rule("int8"))),
        Recipe("nf4", _decoder_in("nf4")),
        Recipe("fp4", _decoder_in("fp4")),
    )
}


def load_recipe(recipe: str | Path | Recipe) -> Recipe:
    """A recipe by name, or from a `.toml` or `.json` file. Raises RecipeError."""
    if isinstance(recipe, Recipe):
        return recipe
    if str(recipe) in RECIPES:
        return RECIPES[str(recipe)]
    path = Path(recipe)
    if not path.is_file():
        raise RecipeError(f"{str(recipe)!r} is neither a recipe ({', '.join(RECIPES)}) nor a recipe file (.toml or .json).")
    try:
        text = path.read_text(encoding="utf-8")
        data = _parse_toml(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, OSError, RecursionError) as exc:
        raise RecipeError(f"{path} cannot be read as {'TOML' if path.suffix == '.toml' else 'JSON'}: {exc}.") from exc
    return _recipe_from(data, path)


def _parse_toml(text: str) -> Any:
    if sys.version_info < (3, 11):
        raise RecipeError("TOML recipes need Python 3.11 or newer; write the recipe as JSON.")
    import tomllib

    return tomllib.loads(text)


def _recipe_from(data: Any, path: Path) -> Recipe:
    if not isinstance(data, dict) or not isinstance(data.get("rules"), list) or not data["rules"]:
        raise RecipeError(f"{path} has no list of 'rules'.")
    extra = sorted(set(data) - {"name", "rules", "kv_cache"})
    if extra:
        raise RecipeError(f"{path} has unknown keys: {', '.join(extra)}. A recipe has 'name', 'rules' and 'kv_cache'.")
    name = data.get("name", path.stem)
    if not isinstance(name, str):
        raise RecipeError(f"{path} has the name {name!r}; it is a text.")
    _require_one_of(data.get("kv_cache", "float"), "kv_cache", CACHES, str(path))
    rules = tuple(_rule_from(entry, f"{path}, rule {number}") for number, entry in enumerate(data["rules"], 1))
    return Recipe(name, rules, data.get("kv_cache", "float"))


def _require_one_of(value: Any, what: str, known: Sequence[str], where: str) -> None:
    if value not in known:
        raise RecipeError(f"{where} has the {what} {value!r}; it is one of {', '.join(known)}.")


def _rule_from(entry: Any, where: str) -> Rule:
    if not isinstance(entry, dict) or "method" not in entry:
        raise RecipeError(f"{where} has no 'method'; it is one of {', '.join(METHODS)}.")
    unknown = sorted(set(entry) - set(Rule.__dataclass_fields__))
    if unknown:
        raise RecipeError(f"{where} has unknown keys: {', '.join(unknown)}. Known are {', '.join(Rule.__dataclass_fields__)}.")
    for what, known in (("method", METHODS), ("algorithm", ALGORITHMS), ("range", RANGES)):
        _require_one_of(entry.get(what, known[0]), what, known, where)
    method, algorithm = entry["method"], entry.get("algorithm", "rtn")
    if algorithm != "rtn" and method not in ("int4", "int3"):
        raise RecipeError(f"{where} asks for the algorithm {algorithm} with {method}; it is for int4 and int3.")
    block = entry.get("block_size")
    if "block_size" in entry and method not in BLOCKS:
        raise RecipeError(f"{where} has a block_size, but {method} has no blocks; {', '.join(BLOCKS)} do.")
    if block is not None and (
        not isinstance(block, int) or isinstance(block, bool) or block < 0 or (block and (block < 16 or block & (block - 1)))
    ):
        raise RecipeError(
            f"{where} has the block_size {block!r}; it is a power of two, 16 or more (TensorRT takes up to 256), or 0 for "
            "one scale a channel."
        )
    if block is not None and method in ("nf4", "fp4") and block < 32:
        raise RecipeError(f"{where} has the block_size {block!r}; {method} takes 32 or more.")
    smooth = entry.get("smooth", 0.5)
    if isinstance(smooth, bool) or not isinstance(smooth, int | float) or not 0 <= smooth <= 1:
        raise RecipeError(f"{where} has the smooth {smooth!r}; it is a number from 0 (off) to 1.")
    for only in ("smooth", "range"):
        if only in entry and method != "w8a8":
            raise RecipeError(f"{where} has {only!r}, which is about activations; {method} leaves them as they are.")
    if not isinstance(entry.get("optional", False), bool):
        raise RecipeError(f"{where}: 'optional' is {entry['optional']!r}; it is true or false.")
    for pattern in ("parts", "weights"):
        if not isinstance(entry.get(pattern, "*"), str):
            raise RecipeError(f"{where}: {pattern!r} is {entry[pattern]!r}; it is a shell pattern such as '*.mlp.*'.")
    return Rule(**entry)
