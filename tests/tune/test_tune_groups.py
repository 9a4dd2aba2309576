"""Groups found in the weights' names of many families, and recipes that name them in few rules."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

from edgevlm.bundle import Bundle
from edgevlm.quant.recipe import Recipe, Rule
from edgevlm.tune.groups import CANDIDATES, Group, Weight, candidates_of, find_groups, list_weights, recipe_from

LAYERS = range(12)


def weights_of(part: str, *patterns: str, size: int = 100) -> list[Weight]:
    """`{}` in a pattern is the number of a layer."""
    return [Weight(part, p.format(n), size, True) for p in patterns for n in (LAYERS if "{}" in p else range(1))]


LLAMA = [
    *weights_of("vision_encoder", "vision_tower.encoder.layers.{}.self_attn.q_proj.weight",
                "vision_tower.encoder.layers.{}.mlp.fc1.weight"),
    Weight("vision_encoder", "vision_tower.embeddings.position_embedding.weight", 10, False),
    *weights_of("projector", "multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.weight"),
    Weight("embed_tokens", "language_model.embed_tokens.weight", 1000, False),
    *weights_of("decoder", "language_model.layers.{}.self_attn.q_proj.weight",
                "language_model.layers.{}.self_attn.o_proj.weight", "language_model.layers.{}.mlp.up_proj.weight"),
    *weights_of("decoder", "lm_head.weight", size=1000),
]  # fmt: skip


def test_groups_of_a_llama() -> None:
    groups = {group.name: group for group in find_groups(LLAMA)}
    assert list(groups) == [
        "vision_encoder first layers", "vision_encoder middle layers", "vision_encoder last layers", "vision_encoder tables",
        "projector", "embed_tokens",
        "decoder attention, first layers", "decoder attention, middle layers", "decoder attention, last layers",
        "decoder mlp, first layers", "decoder mlp, middle layers", "decoder mlp, last layers", "decoder head",
    ]  # fmt: skip
    assert sum(group.size for group in groups.values()) == sum(weight.size for weight in LLAMA)
    middle = {weight.name for weight in groups["decoder mlp, middle layers"].weights}
    assert middle == {f"language_model.layers.{n}.mlp.up_proj.weight" for n in (4, 5, 6, 7)}
    tried = {name: candidates_of(group) for name, group in groups.items()}
    assert tried["vision_encoder tables"] == tried["embed_tokens"] == ["int8"]
    assert tried["vision_encoder last layers"] == ["int8", "w8a8", "int4"]
    assert tried["projector"] == tried["decoder head"] == tried["decoder mlp, last layers"] == ["int8", "int4"]
    assert CANDIDATES["int4"].algorithm != "rtn"


@pytest.mark.parametrize(
    ("part", "names", "found"),
    [
        (
            "decoder",  # T5: the layer holds numbered ones
            ["decoder.block.{}.layer.0.SelfAttention.q.weight", "decoder.block.{}.layer.2.DenseReluDense.wi_0.weight"],
            {"decoder attention, first layers", "decoder mlp, middle layers"},
        ),
        ("decoder", ["transformer.h.{}.attn.c_attn.weight", "transformer.h.{}.mlp.w1.weight"], {"decoder mlp, last layers"}),
        ("decoder", ["model.layers.{}.attention.wqkv.weight", "model.layers.{}.feed_forward.w2.weight"],
         {"decoder attention, last layers", "decoder mlp, first layers"}),
        ("decoder", ["blocks.{}.attn.Wqkv.weight", "gated_cross_attn_layers.{}.ff.1.weight"], {"decoder mlp, first layers"}),
        ("qformer", ["qformer.encoder.layer.{}.crossattention.attention.query.weight"], {"qformer middle layers"}),
        ("projector", ["mlp1.1.weight", "mlp1.3.weight"], {"projector"}),
        ("vision_encoder", ["blocks.{}.mlp.fc1.weight", "merger.mlp.0.weight", "merger.mlp.2.weight"],
         {"vision_encoder first layers", "vision_encoder outer layers"}),
    ],
)  # fmt: skip
def test_groups_of_other_names(part: str, names: list[str], found: set[str]) -> None:
    assert found <= {group.name for group in find_groups(weights_of(part, *names))}


@pytest.mark.parametrize(("layers", "places"), [(1, {""}), (2, {" first layers", " last layers"}), (5, {" middle layers"})])
def test_few_layers(layers: int, places: set[str]) -> None:
    weights = [Weight("vision_encoder", f"layers.{n}.mlp.fc1.weight", 1, True) for n in range(layers)]
    assert {f"vision_encoder{place}" for place in places} <= {group.name for group in find_groups(weights)}


def test_a_stack_whose_numbers_have_gaps() -> None:
    """Flamingo's gated layers come after every fourth one."""
    weights = [Weight("decoder", f"model.layers.{n}.gated.self_attn.q_proj.weight", 1, True) for n in (3, 7, 11)]
    assert [len(group.weights) for group in find_groups(weights)] == [1, 1, 1]


# ------------------------------------------------------------------------------------------------- recipes


def says(recipe: Recipe, weights: list[Weight]) -> dict[str, tuple[str, str]]:
    return {w.name: ((rule := recipe.rule_for(w.part, w.name)).method, rule.algorithm) for w in weights}


def expected(groups: list[Group], chosen: dict[str, Rule]) -> dict[str, tuple[str, str]]:
    rules = {group.name: chosen.get(group.name, Rule("float")) for group in groups}
    return {w.name: (rules[g.name].method, rules[g.name].algorithm) for g in groups for w in g.weights}


def test_every_choice_is_said_exactly() -> None:
    groups = find_groups(LLAMA)
    names = [group.name for group in groups]
    for seed, candidate in itertools.product(range(1, 60, 7), CANDIDATES):
        chosen = {name: CANDIDATES[candidate] for number, name in enumerate(names) if seed >> (number % 6) & 1}
        chosen |= {name: CANDIDATES["int8"] for number, name in enumerate(names) if seed * number % 5 == 3}
        recipe = recipe_from("some", groups, chosen)
        assert says(recipe, LLAMA) == expected(groups, chosen)
        recipe.require_matches({part: [w.name for w in LLAMA if w.part == part] for part in {w.part for w in LLAMA}})


def test_recipes_are_short() -> None:
    groups = find_groups(LLAMA)
    everything = {group.name: CANDIDATES["int8"] for group in groups}
    assert len(recipe_from("r", groups, everything).rules) == 4
    attention = {group.name: CANDIDATES["int4"] for group in groups if "decoder attention" in group.name}
    said = [(r.parts, r.weights, r.method) for r in recipe_from("r", groups, attention).rules]
    assert said == [("decoder", "language_model.layers.*.self_attn.*", "int4")]
    all_but_head = {group.name: CANDIDATES["int4"] for group in groups if "decoder" in group.name and "head" not in group.name}
    said = [(r.parts, r.weights, r.method) for r in recipe_from("r", groups, all_but_head).rules]
    assert said == [("decoder", "language_model.layers.*.*", "int4")]
    first = {group.name: CANDIDATES["int8"] for group in groups if "mlp, first" in group.name}
    assert [r.weights for r in recipe_from("r", groups, first).rules if r.method == "int8"] == [
        f"language_model.layers.{n}.mlp.*" for n in range(4)
    ]
    assert recipe_from("nothing", groups, {}).rules == (Rule("float"),)


def test_names_that_look_like_patterns() -> None:
    odd = [Weight("decoder", name, 1, True) for name in ("a[0].weight", "a0.weight", "b*.weight", "bc.weight", "q?.weight")]
    groups = [Group(weight.name, (weight,)) for weight in odd]
    for group in groups:
        recipe = recipe_from("odd", groups, {group.name: CANDIDATES["int8"]})
        assert [name for name, (method, _) in says(recipe, odd).items() if method == "int8"] == [group.name]


@pytest.mark.parametrize("name", ["clip-llama-gqa-bias", "blip2-t5", "flamingo-every-second"])
def test_groups_of_bundles(tiny: Callable[[str], Any], name: str) -> None:
    weights = list_weights(Bundle.open(tiny(name).bundle, check_files=False))
    groups = find_groups(weights)
    assert sorted(w.name for g in groups for w in g.weights) == sorted(w.name for w in weights)
    assert {"embed_tokens", "decoder attention, first layers", "decoder mlp, last layers"} <= {group.name for group in groups}
    assert not any("relative_attention_bias" in weight.name for weight in weights)
    for group in groups:
        chosen = {group.name: CANDIDATES["int8"]}
        assert says(recipe_from("one", groups, chosen), weights) == expected(groups, chosen)
