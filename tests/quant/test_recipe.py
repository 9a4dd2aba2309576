"""Recipes as data: which rule decides, and what is said of a file that is none."""

from __future__ import annotations

import json
import sys
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
    (Rule("int8", "decoder", "lm_head.*"), Rule("int4", "decoder", "*.self_attn.*", 64), Rule("int4", "decoder", "*", 32)),
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
    assert set(RECIPES) == {"int8", "int4"}
    for name in RECIPES:
        assert load_recipe(name) is RECIPES[name]
        assert RECIPES[name].name == name
    assert load_recipe(EXPECTED) is EXPECTED
    int4 = RECIPES["int4"]
    assert int4.rule_for("decoder", "language_model.layers.3.mlp.up_proj.weight") == Rule("int4", "decoder", "*", 32)
    assert {
        int4.rule_for(part, w).method
        for part, w in [("decoder", "lm_head.weight"), ("vision_encoder", "x"), ("embed_tokens", "y")]
    } == {"int8"}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_built_in_recipes_know_encoders(recipe: Recipe) -> None:
    block = "language_model.encoder.block.0.layer.0.SelfAttention"
    for part in ("text_encoder", "decoder"):
        assert recipe.rule_for(part, f"{block}.relative_attention_bias.weight").method == "float"
        assert recipe.rule_for(part, f"{block}.q.weight").method == recipe.name
    for part in ("vision_encoder", "resampler", "qformer", "projector", "cross_kv", "embed_tokens"):
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
        ({"rules": [{"method": "int3"}]}, "rule 1 has the method 'int3'; it is one of float, int8, int4"),
        ({"rules": [{"method": ["int8"]}]}, "rule 1 has the method"),
        ({"rules": [{"method": None}]}, "rule 1 has the method None"),
        ({"rules": [RULE | {"bits": 4}]}, "unknown keys: bits. Known are method, parts, weights, block_size"),
        ({"rules": [RULE | {"block_size": 8}]}, "block_size 8"),
        ({"rules": [RULE | {"block_size": 48}]}, "block_size 48"),
        ({"rules": [RULE | {"block_size": 0}]}, "block_size 0"),
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
