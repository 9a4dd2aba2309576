"""Recipes: which weight is quantized how, as data.

A recipe is an ordered list of rules over parts and parameter names; the first rule that matches a weight decides. It
says what, and nothing of packing or backends. As a file (TOML or JSON):

    name = "mine"
    [[rules]]
    parts = "decoder"                 # shell patterns
    weights = "*.self_attn.*"
    method = "int4"                   # int4, int8 or float
    block_size = 32
    [[rules]]
    method = "int8"                   # everything else
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import RecipeError

__all__ = ["METHODS", "RECIPES", "Recipe", "Rule", "load_recipe"]

METHODS = ("float", "int8", "int4")


@dataclass(frozen=True)
class Rule:
    """What happens to the weights whose part and name match (shell patterns).

    `float` leaves them, `int8` is symmetric with a scale for each output channel (each row of an embedding table),
    `int4` is symmetric with a scale for each `block_size` input dimensions of an output channel.
    """

    method: str
    parts: str = "*"
    weights: str = "*"
    block_size: int = 32

    def matches(self, part: str, weight: str) -> bool:
        return fnmatchcase(part, self.parts) and fnmatchcase(weight, self.weights)


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; the first match wins, and a weight without a match stays float."""

    name: str
    rules: tuple[Rule, ...]

    def rule_for(self, part: str, weight: str) -> Rule:
        return next((rule for rule in self.rules if rule.matches(part, weight)), Rule("float"))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "rules": [asdict(rule) for rule in self.rules]}


#: T5's table of position biases: a few hundred numbers that every layer adds to its scores.
_BIASES = Rule("float", weights="*.relative_attention_bias.*")

#: int4 keeps at eight bits what costs little and hurts most: embeddings, the output head, the vision side.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("int8", (_BIASES, Rule("int8"))),
        Recipe(
            "int4",
            (
                _BIASES,
                Rule("int8", "decoder", "*lm_head.*"),
                Rule("int4", "decoder"),
                Rule("int4", "text_encoder"),
                Rule("int8"),
            ),
        ),
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
    extra = sorted(set(data) - {"name", "rules"})
    if extra:
        raise RecipeError(f"{path} has unknown keys: {', '.join(extra)}. A recipe has 'name' and 'rules'.")
    name = data.get("name", path.stem)
    if not isinstance(name, str):
        raise RecipeError(f"{path} has the name {name!r}; it is a text.")
    rules = []
    for number, entry in enumerate(data["rules"], 1):
        where = f"{path}, rule {number}"
        if not isinstance(entry, dict) or "method" not in entry:
            raise RecipeError(f"{where} has no 'method'; it is one of {', '.join(METHODS)}.")
        unknown = sorted(set(entry) - set(Rule.__dataclass_fields__))
        if unknown:
            raise RecipeError(
                f"{where} has unknown keys: {', '.join(unknown)}. Known are {', '.join(Rule.__dataclass_fields__)}."
            )
        if entry["method"] not in METHODS:
            raise RecipeError(f"{where} has the method {entry['method']!r}; it is one of {', '.join(METHODS)}.")
        block = entry.get("block_size", 32)
        if not isinstance(block, int) or isinstance(block, bool) or block < 16 or block & (block - 1):
            raise RecipeError(
                f"{where} has the block_size {block!r}; it is a power of two, 16 or more (TensorRT takes 32, 64, 128)."
            )
        for pattern in ("parts", "weights"):
            if not isinstance(entry.get(pattern, "*"), str):
                raise RecipeError(f"{where}: {pattern!r} is {entry[pattern]!r}; it is a shell pattern such as '*.mlp.*'.")
        rules.append(Rule(**entry))
    return Recipe(name, tuple(rules))
