"""Groups of a model's weights that are quantized alike, and recipes that say so in few rules.

What a weight belongs to is read from the part it is in and from its name: the first number in it that counts something is the
layer, a module called attention is attention, all else in a layer is its MLP. It knows names and sizes, not families.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..bundle import Bundle
from ..graphs import load_graph
from ..quant.quantize import quantizable
from ..quant.recipe import RECIPES, Recipe, Rule

__all__ = ["CANDIDATES", "Group", "Weight", "candidates_of", "find_groups", "list_weights", "recipe_from"]

#: What looks at pictures: eight-bit activations are for it.
VISION = ("vision_encoder", "qformer", "resampler")
#: Parts whose layers are so many and so large that attention and MLP are told apart.
TEXT = ("decoder", "text_encoder")
_PLACES = {1: ("",), 2: ("first", "last"), 3: ("first", "middle", "last")}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.[^.]+\.)")
_ATTENTION = re.compile("attn|attention", re.IGNORECASE)

#: What is tried on a group, from large to small. `int4` is what the recipe of that name does to a decoder.
CANDIDATES: Mapping[str, Rule] = {
    "int8": Rule("int8"),
    "w8a8": Rule("w8a8"),
    "int4": next(replace(r, parts="*", weights="*", optional=False) for r in RECIPES["int4"].rules if r.method == "int4"),
}


@dataclass(frozen=True)
class Weight:
    """A weight that a recipe can quantize. `linear`: it is multiplied with, not looked up."""

    part: str
    name: str
    size: int
    linear: bool


@dataclass(frozen=True)
class Group:
    """Weights that are changed together."""

    name: str
    weights: tuple[Weight, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(weight.size for weight in self.weights)


def list_weights(bundle: Bundle) -> list[Weight]:
    """Weights that a recipe can quantize, part by part; those that no recipe of the package touches are left out."""
    found = []
    for part in bundle.manifest.parts:
        model = load_graph(bundle.part_path(part))
        linear = set(quantizable(model, linear=True))
        for name in quantizable(model):
            tensor = model.graph.initializers[name].const_value
            assert tensor is not None
            if RECIPES["int8"].rule_for(part, name).method != "float":
                found.append(Weight(part, name, tensor.nbytes, name in linear))
    return found


def find_groups(weights: Iterable[Weight]) -> list[Group]:
    """The groups of a model, part by part, each weight in one of them."""
    by_part: dict[str, list[Weight]] = {}
    for weight in weights:
        by_part.setdefault(weight.part, []).append(weight)
    groups: list[Group] = []
    for part, own in by_part.items():
        members: dict[str, list[Weight]] = {}
        places = _layers([weight.name for weight in own])
        for weight in own:
            members.setdefault(_group_of(weight, places), []).append(weight)
        alone = len(members) == 1
        groups += [Group(part if alone or not name else f"{part} {name}", tuple(found)) for name, found in members.items()]
    return groups


def candidates_of(group: Group) -> list[str]:
    """What can be tried on a group. Tables are kept in eight bits at least: nothing looks rows up in four."""
    if not all(weight.linear for weight in group.weights):
        return ["int8"]
    return [name for name in CANDIDATES if name != "w8a8" or group.weights[0].part in VISION]


@dataclass(frozen=True)
class _Layer:
    """Where a name has its layer: what comes before the number, the number, and what comes after."""

    stack: str
    number: int
    tail: str


def _layers(names: Sequence[str]) -> dict[str, tuple[_Layer, str]]:
    """The layer of each name that has one, and where in its stack it stands."""
    found: dict[str, _Layer] = {}
    for name in names:
        if match := _NUMBER.search(name):
            found[name] = _Layer(name[: match.start()], int(match[0]), name[match.end() + 1 :])
    numbers: dict[str, set[int]] = {}
    for layer in found.values():
        numbers.setdefault(layer.stack, set()).add(layer.number)
    ordered = {stack: sorted(every) for stack, every in numbers.items()}
    places: dict[str, tuple[_Layer, str]] = {}
    for name, layer in found.items():
        every = ordered[layer.stack]
        shares = _PLACES[min(3, len(every))]
        places[name] = layer, shares[every.index(layer.number) * len(shares) // len(every)]
    return places


def _group_of(weight: Weight, places: Mapping[str, tuple[_Layer, str]]) -> str:
    if not weight.linear:
        return "tables"
    if weight.name not in places:
        return "head" if weight.part == "decoder" else "outer layers"
    layer, place = places[weight.name]
    what = ("attention" if _ATTENTION.search(layer.tail) else "mlp") if weight.part in TEXT else ""
    return ", ".join(filter(None, [what, f"{place} layers" * bool(place)]))


# -------------------------------------------------------------------------------------------------- recipes


def recipe_from(name: str, groups: Sequence[Group], chosen: Mapping[str, Rule]) -> Recipe:
    """A recipe in which each group named in `chosen` is quantized so, and everything else stays float."""
    wanted: dict[str, dict[str, Rule]] = {}
    for group in groups:
        for weight in group.weights:
            wanted.setdefault(weight.part, {})[weight.name] = chosen.get(group.name, Rule("float"))
    rules: list[Rule] = []
    for part, of in wanted.items():
        # What is usual in a part is said last; whichever takes the fewest rules is.
        tried = [_short_rules(part, of, usual) for usual in (Rule("float"), *dict.fromkeys(of.values()))]
        tried.append([_rule(rule, part, glob.escape(weight)) for weight, rule in of.items() if rule.method != "float"])
        shortest = min((found for found in tried if _say(found, part, of)), key=len)
        rules += shortest
    return Recipe(name, tuple(rules) or (Rule("float"),))


def _rule(rule: Rule, part: str, weights: str = "*") -> Rule:
    return replace(rule, parts=part, weights=weights)


def _say(rules: Sequence[Rule], part: str, wanted: Mapping[str, Rule]) -> bool:
    """Whether the rules say what is wanted of each weight."""
    recipe = Recipe("", tuple(rules))
    return all(replace(recipe.rule_for(part, weight), parts="*", weights="*") == rule for weight, rule in wanted.items())


def _short_rules(part: str, wanted: Mapping[str, Rule], usual: Rule) -> list[Rule]:
    """Rules for the weights that are not as usual, then one for the rest; what no rule fits stays float."""
    places = _layers(list(wanted))
    patterns: dict[str, Rule] = {glob.escape(name): rule for name, rule in wanted.items() if name not in places}
    for stack in dict.fromkeys(layer.stack for layer, _ in places.values()):
        layers = {name: layer for name, (layer, _) in places.items() if layer.stack == stack}
        patterns |= _stack_patterns(glob.escape(stack), {layers[name]: wanted[name] for name in layers})
    rules = [_rule(rule, part, pattern) for pattern, rule in patterns.items() if rule != usual]
    return rules if usual.method == "float" else [*rules, _rule(usual, part)]


def _stack_patterns(stack: str, wanted: Mapping[_Layer, Rule]) -> dict[str, Rule]:
    """What a stack of layers becomes: whole layers where they are of one kind, else modules, else weights."""
    for depth in (0, 1, None):
        units: dict[tuple[int, str], set[Rule]] = {}
        for layer, rule in wanted.items():
            head = layer.tail if depth is None else ".".join(layer.tail.split(".")[:depth])
            units.setdefault((layer.number, head), set()).add(rule)
        if all(len(rules) == 1 for rules in units.values()):
            break
    single = {unit: next(iter(rules)) for unit, rules in units.items()}
    patterns: dict[str, Rule] = {}
    for head in dict.fromkeys(head for _, head in single):
        end = glob.escape(head) if depth is None else f"{glob.escape(head)}.*".lstrip(".")
        own = {number: rule for (number, of), rule in single.items() if of == head}
        if len(set(own.values())) == 1:
            patterns[f"{stack}*.{end}"] = next(iter(own.values()))
        else:
            patterns |= {f"{stack}{number}.{end}": rule for number, rule in own.items()}
    return patterns
