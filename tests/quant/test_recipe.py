"""Recipes as data: which rule decides, and what is said of a file that is none."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgevlm.errors import RecipeError
from edgevlm.quant.recipe import RECIPES, Recipe, Rule, load_recipe

RULES = [
    {"parts": "decoder", "weights": "lm_head.*", "method": "int8"},
    {"parts": "decoder", "weights": "*.self_attn.*", "method": "int4", "block_size": 64},
    {"parts": "decoder", "method": "int4"},
]
EXPECTED = Recipe(
    "mine",
    (Rule("int8", "decoder", "lm_head.*"), Rule("int4", "decoder", "*.self_attn.*", 64), Rule("int4", "decoder")),
)


def test_the_first_match_decides() -> None:
    attention, head = "language_model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
    assert EXPECTED.rule_for("decoder", head).method == "int8"
    assert EXPECTED.rule_for("decoder", attention).block_size == 64
    assert EXPECTED.rule_for("decoder", "language_model.layers.0.mlp.up_proj.weight") == Rule("int4", "decoder")
    assert EXPECTED.rule_for("vision_encoder", attention).method == "float"
    assert EXPECTED.rule_for("Decoder", head).method == "float", "names are compared as they are written"
    assert Recipe("r", (Rule("float", weights="*.q_proj.*"), Rule("int8"))).rule_for("decoder", attention).method == "float"


def test_built_in_recipes() -> None:
    assert set(RECIPES) == {"int8", "int4", "int4-rtn", "int4-gptq", "int4-awq-gptq", "w8a8", "nf4", "fp4"}
    assert {name for name, recipe in RECIPES.items() if not recipe.calibrated} == {"int8", "int4-rtn", "nf4", "fp4"}
    for name in RECIPES:
        assert load_recipe(name) is RECIPES[name]
        assert RECIPES[name].name == name
    assert load_recipe(EXPECTED) is EXPECTED
    int4 = RECIPES["int4"]
    assert int4.rule_for("decoder", "language_model.layers.3.mlp.up_proj.weight") == Rule("int4", "decoder", algorithm="awq")
    assert {
        int4.rule_for(part, w).method
        for part, w in [("decoder", "lm_head.weight"), ("vision_encoder", "x"), ("embed_tokens", "y")]
    } == {"int8"}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_built_in_recipes_know_encoders(recipe: Recipe) -> None:
    block, inside = "language_model.encoder.block.0.layer.0.SelfAttention", recipe.name.split("-")[0]
    seeing = "w8a8" if inside == "w8a8" else "int8"
    for part in ("text_encoder", "decoder"):
        assert recipe.rule_for(part, f"{block}.relative_attention_bias.weight").method == "float"
        assert recipe.rule_for(part, f"{block}.q.weight").method == ("int8" if inside == "w8a8" else inside)
    for part in ("vision_encoder", "resampler", "qformer"):
        assert recipe.rule_for(part, "x.weight").method == seeing
    for part in ("projector", "cross_kv", "embed_tokens"):
        assert recipe.rule_for(part, "x.weight").method == "int8"
    for head in ("language_model.lm_head.weight", "lm_head.additional_fc.weight"):
        assert recipe.rule_for("decoder", head).method == "int8"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no TOML before Python 3.11")
def test_toml(tmp_path: Path) -> None:
    lines = ['name = "mine"']
    for rule in RULES:
        lines += ["[[rules]]", *(f"{key} = {json.dumps(value)}" for key, value in rule.items())]
    (tmp_path / "r.toml").write_text("\n".join(lines))
    assert load_recipe(tmp_path / "r.toml") == load_recipe(str(tmp_path / "r.toml")) == EXPECTED


def test_json_and_what_a_manifest_holds(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"rules": RULES}))
    assert load_recipe(path) == EXPECTED, "a file without a name is called after itself"
    path.write_text(json.dumps(EXPECTED.to_dict()))
    assert load_recipe(path) == EXPECTED


@pytest.mark.parametrize("name", ["int5", "INT8", "nowhere.toml", ".", ""])
def test_names_that_stand_for_nothing(name: str) -> None:
    with pytest.raises(RecipeError, match="int8, int4"):
        load_recipe(name)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("r.json", b"{"),
        ("r.json", b"\xff\xfe"),
        ("r.json", b"[" * 100_000),
        ("r.toml", b"rules = ["),
        ("r.toml", b'{"rules": []}'),
        ("r.txt", b"rules"),
    ],
)
def test_unreadable_files(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(RecipeError, match="cannot be read as"):
        load_recipe(tmp_path / file)


RULE = {"method": "int4"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "no list of 'rules'"),
        ({}, "no list of 'rules'"),
        ({"rules": []}, "no list of 'rules'"),
        ({"rules": {"method": "int8"}}, "no list of 'rules'"),
        ({"rules": [RULE], "colour": 1}, "unknown keys: colour"),
        ({"rules": [RULE], "name": 5}, "name"),
        ({"rules": [RULE, "int8"]}, "rule 2 has no 'method'"),
        ({"rules": [{"parts": "decoder"}]}, "rule 1 has no 'method'"),
        ({"rules": [{"method": "int2"}]}, "rule 1 has the method 'int2'; it is one of float, int8, w8a8, int4, int3, nf4, fp4"),
        ({"rules": [{"method": ["int8"]}]}, "rule 1 has the method"),
        ({"rules": [{"method": None}]}, "rule 1 has the method None"),
        ({"rules": [RULE | {"bits": 4}]}, "unknown keys: bits. Known are method, parts, weights, block_size"),
        ({"rules": [RULE | {"block_size": 8}]}, "block_size 8"),
        ({"rules": [RULE | {"block_size": 48}]}, "block_size 48"),
        ({"rules": [RULE | {"method": "int8", "block_size": 32}]}, "has a block_size, but int8 has no blocks; int4, int3"),
        ({"rules": [RULE | {"method": "nf4", "block_size": 16}]}, "block_size 16; nf4 takes 32 or more"),
        ({"rules": [RULE | {"algorithm": "AWQ"}]}, "algorithm 'AWQ'; it is one of rtn, awq, gptq, awq-gptq"),
        (
            {"rules": [RULE | {"method": "w8a8", "algorithm": "awq"}]},
            "asks for the algorithm awq with w8a8; it is for int4 and",
        ),
        ({"rules": [RULE | {"smooth": 0.5}]}, "has 'smooth', which is about activations; int4 leaves them"),
        ({"rules": [RULE | {"range": "mse"}]}, "has 'range', which is about activations; int4 leaves them"),
        ({"rules": [{"method": "w8a8", "range": "max"}]}, "range 'max'; it is one of minmax, percentile, mse"),
        ({"rules": [{"method": "w8a8", "smooth": 1.5}]}, "smooth 1.5; it is a number from 0 (off) to 1"),
        ({"rules": [{"method": "w8a8", "smooth": True}]}, "smooth True"),
        ({"rules": [{"method": "w8a8", "smooth": float("nan")}]}, "smooth nan"),
        ({"rules": [RULE | {"optional": "yes"}]}, "'optional' is 'yes'; it is true or false"),
        ({"rules": [RULE], "kv_cache": "int4"}, "kv_cache 'int4'; it is one of float, int8"),
        ({"rules": [RULE], "kv_cache": ["int8"]}, "kv_cache ['int8']"),
        ({"rules": [RULE | {"block_size": -32}]}, "block_size -32"),
        ({"rules": [RULE | {"block_size": "32"}]}, "block_size '32'"),
        ({"rules": [RULE | {"block_size": 32.0}]}, "block_size 32.0"),
        ({"rules": [RULE | {"block_size": True}]}, "block_size True"),
        ({"rules": [RULE | {"parts": ["decoder"]}]}, "'parts' is"),
        ({"rules": [RULE | {"weights": None}]}, "'weights' is None"),
    ],
)
def test_bad_recipes(tmp_path: Path, data: object, said: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(data))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


# ---------------------------------------------------------------------------------------- rules that fit nothing

WEIGHTS = {
    "vision_encoder": ["vision_tower.layers.0.mlp.fc1.weight"],
    "decoder": [*(f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo"), "lm_head.weight"],
}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            Rule("int8", "decoders"),
            "Rule 2 of the recipe 'r' is for the parts 'decoders'; this model has vision_encoder, decoder.",
        ),
        (
            Rule("int8", "decoder", "*self_attention*"),
            "Rule 2 of the recipe 'r' fits no weight: no name in decoder is like '*self_attention*'. Names there are, among 5",
        ),
        (Rule("int8", weights="*.q_PROJ.*"), "no name in vision_encoder, decoder is like '*.q_PROJ.*'"),
    ],
)
def test_a_rule_that_fits_nothing(rule: Rule, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe("r", (Rule("int4", "decoder"), rule)).require_matches(WEIGHTS)
    assert said in str(caught.value)
    if rule.parts != "decoders":
        assert "model.layers.0.self_attn.q_proj.weight" in str(caught.value)
        assert str(caught.value).endswith("`edgevlm inspect --weights` lists them; `optional = true` lets a rule fit nothing.")
    Recipe("r", (Rule("int4", "decoder"), replace(rule, optional=True))).require_matches(WEIGHTS)


def test_what_a_manifest_holds_of_calibration(tmp_path: Path) -> None:
    rules = (
        Rule("w8a8", "vision_encoder", smooth=0.8, range="mse", optional=True),
        Rule("int4", block_size=0, algorithm="awq"),
    )
    recipe = Recipe("full", rules, "int8")
    (tmp_path / "r.json").write_text(json.dumps(recipe.to_dict()))
    assert load_recipe(tmp_path / "r.json") == recipe
    assert recipe.to_dict()["rules"][1] == {"method": "int4", "block_size": 0, "algorithm": "awq"}
    assert recipe.calibrated
    assert Recipe("cache", (Rule("float"),), "int8").calibrated
