"""Published OpenFlamingo weights become a folder: what is in it, and what is refused with which words."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_open_flamingo import OPEN_FLAMINGOS, TinyOpenFlamingo, make_open_flamingo

from edgevlm.errors import CheckpointError, OutputError, UnsupportedModelError, WeightsError

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

from edgevlm.export.checkpoint import open_checkpoint  # noqa: E402
from edgevlm.export.convert_open_flamingo import convert_open_flamingo  # noqa: E402

LLAMA, MPT, MOSAIC, HALF = OPEN_FLAMINGOS


def convert(paths: dict[str, Path], output: Path, **options: Any) -> Path:
    return convert_open_flamingo(paths["weights"], str(paths["vision"]), str(paths["language"]), output, **options)


def loaded(folder: Path) -> dict[str, Any]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyOpenFlamingo, Path], dict[str, Path]]:
    """Copies the three inputs of a configuration, which are made once, into a folder."""
    made: dict[str, tuple[Path, dict[str, Path]]] = {}

    def copy(tiny: TinyOpenFlamingo, folder: Path) -> dict[str, Path]:
        if repr(tiny) not in made:
            base = tmp_path_factory.mktemp("published")
            made[repr(tiny)] = (base, make_open_flamingo(base, tiny))
        base, paths = made[repr(tiny)]
        shutil.copytree(base, folder)
        return {name: folder / path.relative_to(base) for name, path in paths.items()}

    return copy


@pytest.fixture
def inputs(tmp_path: Path, fresh: Any) -> dict[str, Path]:
    """The three inputs on Llama, to be spoiled."""
    return fresh(LLAMA, tmp_path / "inputs")


def edit_state(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(error: type[Exception], paths: dict[str, Path], tmp_path: Path, **options: Any) -> str:
    """The text of the error; nothing is left behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as caught:
        convert(paths, tmp_path / "out", **options)
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("tiny", OPEN_FLAMINGOS, ids=lambda tiny: tiny.name)
def test_every_weight_arrives(tmp_path: Path, fresh: Any, tiny: TinyOpenFlamingo) -> None:
    paths = fresh(tiny, tmp_path / "inputs")
    told: list[str] = []
    out = convert(paths, tmp_path / "out", stage=told.append)
    weights = loaded(out)

    state = torch.load(paths["weights"], weights_only=True)
    body, table = (
        ("model.layers", "model.embed_tokens") if tiny.language == "llama" else ("transformer.blocks", "transformer.wte")
    )
    trained = {}
    for name, tensor in state.get("model_state_dict", state).items():
        name = name.removeprefix("module.").replace(f"lang_encoder.{body}.", "gated_cross_attn_layers.")
        name = name.replace("gated_cross_attn_layer.", "").replace("lang_encoder.gated", "gated")
        trained[name.replace("lang_encoder.", "language_model.")] = tensor
    assert f"language_model.{table}.weight" in trained
    for name, tensor in trained.items():
        assert torch.equal(weights.pop(name), tensor)
    tower = load_file(paths["vision"] / "model.safetensors")
    for name in [name for name in weights if name.startswith("vision_tower.")]:
        assert torch.equal(weights.pop(name), tower[("vision_model." * tiny.whole_clip) + name.removeprefix("vision_tower.")])
    pickled = paths["language"] / "pytorch_model.bin"
    own = torch.load(pickled, weights_only=True) if tiny.mosaic else load_file(paths["language"] / "model.safetensors")
    renamed = {".norm_": ".ln_", ".ffn.up_proj": ".mlp.mlp_up", ".ffn.down_proj": ".mlp.mlp_down"} if tiny.mosaic else {}
    head = weights.pop("language_model.lm_head.weight", None)
    for name in list(weights):
        source = name.removeprefix("language_model.")
        for new, old in renamed.items():
            source = source.replace(new, old)
        assert torch.equal(weights.pop(name), own[source])
    if tiny.tied:
        assert head is None
    else:
        assert torch.equal(head[:-2], own["lm_head.weight"])
        assert torch.allclose(head[-2:], own["lm_head.weight"].mean(0), atol=1e-6)
        assert any("2 added tokens get the mean" in text for text in told)
    assert any("only tensors are let in" in text for text in told)


@pytest.mark.parametrize("tiny", OPEN_FLAMINGOS, ids=lambda tiny: tiny.name)
def test_the_folder_says_what_the_weights_are(tmp_path: Path, fresh: Any, tiny: TinyOpenFlamingo) -> None:
    from transformers import AutoTokenizer

    paths = fresh(tiny, tmp_path / "inputs")
    out = convert(paths, tmp_path / "out", cross_attn_every_n_layers=tiny.every)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["OpenFlamingoForConditionalGeneration"]
    assert config["cross_attn_every_n_layers"] == tiny.every
    assert config["resampler"] == {
        "depth": tiny.depth, "latents": tiny.latents, "heads": 1, "head_dim": 64, "intermediate_size": 72}  # fmt: skip
    assert config["cross_attention"] == {"heads": 2, "head_dim": 64, "intermediate_size": 80}
    assert config["vision_config"]["hidden_act"] == "quick_gelu"
    text = config["text_config"]
    assert text["model_type"] == tiny.language
    if tiny.mosaic:
        assert text["expansion_ratio"] == 3
        assert text["attn_config"] | tiny.attention == text["attn_config"]

    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (paths["language"], out))
    words = len(before)
    assert len(after) == text["vocab_size"] == words + 2
    assert (config["endofchunk_token_id"], config["image_token_id"]) == (words, words + 1)
    ids = after("<image>How many cubes?<|endofchunk|><image>two")["input_ids"]
    assert [i for i in ids if i >= words] == [words + 1, words, words + 1]
    assert after.decode(ids, skip_special_tokens=True).replace(" ", "") == "Howmanycubes?two"
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"][0] == words
    images = json.loads((out / "preprocessor_config.json").read_text())
    assert images["crop_size"] == {"height": 28, "width": 28}
    assert open_checkpoint(str(out)).config == config


def test_a_tokenizer_without_padding_gets_a_token_for_it(tmp_path: Path, inputs: dict[str, Path]) -> None:
    settings = json.loads((inputs["language"] / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    settings["chat_template"] = "{{ messages }}"
    (inputs["language"] / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "394 tokens with the added ones" in refused(WeightsError, inputs, tmp_path)
    wider = torch.nn.functional.pad(torch.load(inputs["weights"], weights_only=True)[TABLE], (0, 0, 0, 1))
    edit_state(inputs["weights"], lambda state: state.update({TABLE: wider}))
    out = convert(inputs, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["text_config"]["vocab_size"] == 394
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written["pad_token"] == "<PAD>"
    assert "chat_template" not in written
    assert json.loads((out / "generation_config.json").read_text())["pad_token_id"] == 393


def test_shards(tmp_path: Path, inputs: dict[str, Path]) -> None:
    steps: list[tuple[str, int, int, int]] = []
    whole = convert(inputs, tmp_path / "whole")
    sharded = convert(inputs, tmp_path / "sharded", shard_bytes=200_000, progress=lambda *step: steps.append(step))
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    a, b = open_checkpoint(str(whole)).weights, open_checkpoint(str(sharded)).weights
    assert set(a) == set(b)
    one, other = loaded(whole), loaded(sharded)
    assert all(torch.equal(one[name], other[name]) for name in one)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values()) == sum(step[3] for step in steps)
    assert [step[1] for step in steps] == list(range(len(one)))
    assert {step[0] for step in steps} == set(one) == set(index["weight_map"])


def test_safetensors_do_as_well(tmp_path: Path, inputs: dict[str, Path]) -> None:
    expected = loaded(convert(inputs, tmp_path / "a"))
    state = torch.load(inputs["weights"], weights_only=True)
    inputs["weights"] = tmp_path / "weights.safetensors"
    save_file({name: tensor.clone() for name, tensor in state.items()}, inputs["weights"])
    got = loaded(convert(inputs, tmp_path / "b"))
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_dtypes_are_kept_side_by_side(tmp_path: Path, fresh: Any, inputs: dict[str, Path]) -> None:
    def halve(state: dict[str, Any]) -> None:
        for number, name in enumerate(state):
            state[name] = state[name].to((torch.bfloat16, torch.float16, torch.float32)[number % 3])

    small = replace(LLAMA, lists=False)
    inputs = fresh(small, tmp_path / "again")
    edit_state(inputs["weights"], halve)
    out = convert(inputs, tmp_path / "out")
    state, weights = torch.load(inputs["weights"], weights_only=True), loaded(out)
    assert {t.dtype for t in weights.values()} == {torch.bfloat16, torch.float16, torch.float32}
    assert torch.equal(weights["perceiver.latents"], state["perceiver.latents"])
    for name, entry in open_checkpoint(str(out)).weights.items():  # as the export reads them
        assert torch.equal(torch.from_numpy(entry.map().astype("float32")), weights[name].float())


def test_an_output_head_of_its_own_is_taken(tmp_path: Path, inputs: dict[str, Path]) -> None:
    head = torch.randn(393, 64)
    edit_state(inputs["weights"], lambda state: state.update({"lang_encoder.lm_head.weight": head}))
    assert torch.equal(loaded(convert(inputs, tmp_path / "out"))["language_model.lm_head.weight"], head)


def test_a_table_may_shrink(tmp_path: Path, fresh: Any) -> None:
    """The published code resizes to the tokenizer, also where the language model's table was padded beyond it."""
    inputs = fresh(LLAMA, tmp_path / "inputs")
    own = load_file(inputs["language"] / "model.safetensors")
    own["lm_head.weight"] = torch.cat([own["lm_head.weight"], torch.randn(5, 64)])
    own["model.embed_tokens.weight"] = torch.cat([own["model.embed_tokens.weight"], torch.randn(5, 64)])
    save_file(own, inputs["language"] / "model.safetensors")
    edit_json(inputs["language"] / "config.json", vocab_size=396)
    weights = loaded(convert(inputs, tmp_path / "out"))
    assert torch.equal(weights["language_model.lm_head.weight"], own["lm_head.weight"][:393])


# ----------------------------------------------------------------------------------------------------- refusals

TABLE = "lang_encoder.model.embed_tokens.weight"


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def test_code_in_a_pickle_is_not_run(tmp_path: Path, inputs: dict[str, Path]) -> None:
    trace = tmp_path / "it-ran"
    edit_state(inputs["weights"], lambda state: state.update({"perceiver.extra": Bomb(trace)}))
    text = refused(WeightsError, inputs, tmp_path)
    assert "could run any code" in text
    assert "exec" in text
    assert not trace.exists()
    torch.load(inputs["weights"], weights_only=False)
    assert trace.exists()  # it would have


def test_code_in_the_pickle_of_a_language_model_is_not_run(tmp_path: Path, fresh: Any) -> None:
    inputs = fresh(MOSAIC, tmp_path / "inputs")
    trace = tmp_path / "it-ran"
    edit_state(inputs["language"] / "pytorch_model.bin", lambda state: state.update({"x": Bomb(trace)}))
    assert "pytorch_model.bin is refused" in refused(WeightsError, inputs, tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot be read as what torch.save writes"),
        (b"PK\x03\x04 something", "cannot be read as what torch.save writes"),
        (b"\x80\x02}q\x00.", "cannot be read as what torch.save writes"),
    ],
)
def test_files_that_are_no_pickles_of_torch(tmp_path: Path, inputs: dict[str, Path], content: bytes, expected: str) -> None:
    inputs["weights"].write_bytes(content)
    assert expected in refused(WeightsError, inputs, tmp_path)


def test_the_form_of_files_before_torch_1_6(tmp_path: Path, inputs: dict[str, Path]) -> None:
    expected = convert(inputs, tmp_path / "new")
    state = torch.load(inputs["weights"], weights_only=True)
    torch.save(state, inputs["weights"], _use_new_zipfile_serialization=False)
    found = convert(inputs, tmp_path / "old")
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_a_bare_pickle_with_code(tmp_path: Path, inputs: dict[str, Path]) -> None:
    trace = tmp_path / "it-ran"
    inputs["weights"].write_bytes(pickle.dumps({"perceiver.extra": Bomb(trace)}))
    assert "could run any code" in refused(WeightsError, inputs, tmp_path)
    assert not trace.exists()


def test_a_truncated_file(tmp_path: Path, inputs: dict[str, Path]) -> None:
    content = inputs["weights"].read_bytes()
    inputs["weights"].write_bytes(content[: len(content) // 2])
    assert "may be truncated" in refused(WeightsError, inputs, tmp_path)


def test_no_state_dict(tmp_path: Path, inputs: dict[str, Path]) -> None:
    torch.save([torch.zeros(3)], inputs["weights"])
    assert "holds no state dict" in refused(WeightsError, inputs, tmp_path)
    torch.save({}, inputs["weights"])
    assert "holds no state dict" in refused(WeightsError, inputs, tmp_path)


def test_no_file(tmp_path: Path, inputs: dict[str, Path]) -> None:
    assert "does not exist" in refused(CheckpointError, inputs | {"weights": tmp_path / "no.pt"}, tmp_path)
    assert "is a folder" in refused(CheckpointError, inputs | {"weights": tmp_path}, tmp_path)


def test_missing_weights_are_named_and_counted(tmp_path: Path, inputs: dict[str, Path]) -> None:
    def drop(state: dict[str, Any]) -> None:
        for name in [name for name in state if ".ff." in name or name.startswith("perceiver.layers.1.1.")]:
            if not name.endswith("ff.1.weight"):
                del state[name]

    edit_state(inputs["weights"], drop)
    text = refused(WeightsError, inputs, tmp_path)
    assert "lacks perceiver.layers.1.1.0.weight, perceiver.layers.1.1.0.bias, perceiver.layers.1.1.1.weight" in text
    assert "more" in text


@pytest.mark.parametrize(
    "name", ["perceiver.frame_embs", "lang_encoder.model.layers.0.decoder_layer.mlp.up_proj.weight", "vision_encoder.proj"]
)
def test_unexpected_weights_are_named(tmp_path: Path, inputs: dict[str, Path], name: str) -> None:
    edit_state(inputs["weights"], lambda state: state.update({name: torch.zeros(2, 3)}))
    assert f"has unexpected {name}." in refused(WeightsError, inputs, tmp_path)


def test_the_two_lists_of_the_first_release_must_agree(tmp_path: Path, inputs: dict[str, Path]) -> None:
    name = "lang_encoder.gated_cross_attn_layers.1.attn.to_q.weight"
    edit_state(inputs["weights"], lambda state: state.update({name: state[name] + 1}))
    assert "two different tensors for gated_cross_attn_layers.1.attn.to_q.weight" in refused(WeightsError, inputs, tmp_path)


def test_another_tower(tmp_path: Path, inputs: dict[str, Path]) -> None:
    def widen(state: dict[str, Any]) -> None:
        for name in state:
            if state[name].ndim == 2 and name.endswith("to_kv.weight"):
                state[name] = torch.zeros(len(state[name]), 48)

    edit_state(inputs["weights"], widen)
    text = refused(WeightsError, inputs, tmp_path)
    assert "perceiver.layers.0.0.to_kv.weight in the shape [128, 48]" in text
    assert "[128, 32]" in text
    assert "the tower is 32 wide" in text


def test_another_language_model(tmp_path: Path, fresh: Any, inputs: dict[str, Path]) -> None:
    other = fresh(replace(LLAMA, hidden=48), tmp_path / "other")
    assert "64" in (text := refused(WeightsError, inputs | {"language": other["language"]}, tmp_path))
    assert "the language model 48" in text
    deeper = fresh(replace(LLAMA, layers=6), tmp_path / "deeper")
    text = refused(WeightsError, inputs | {"language": deeper["language"]}, tmp_path)
    assert "before the layers 1, 3; before every n-th of the 6 layers" in text
    mpt = fresh(MPT, tmp_path / "mpt")
    text = refused(CheckpointError, inputs | {"language": mpt["language"]}, tmp_path)
    assert "was trained on Llama, the language model given is MPT" in text


def test_incomplete_towers(tmp_path: Path, inputs: dict[str, Path]) -> None:
    for which, name in (("vision", "vision_model.encoder.layers.1.mlp.fc1.bias"), ("language", "model.norm.weight")):
        path = inputs[which] / "model.safetensors"
        kept = path.read_bytes()
        weights = load_file(path)
        save_file({n: t for n, t in weights.items() if n != name}, path)
        assert f"lacks {name.removeprefix('vision_model.')}" in refused(WeightsError, inputs, tmp_path)
        path.write_bytes(kept)


def test_what_is_not_covered_is_said(tmp_path: Path, inputs: dict[str, Path]) -> None:
    config = inputs["language"] / "config.json"
    kept = config.read_text()
    edit_json(config, architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox")
    text = refused(UnsupportedModelError, inputs, tmp_path)
    assert "GPTNeoXForCausalLM" in text
    assert "LlamaForCausalLM, MptForCausalLM" in text
    config.write_text(kept)
    edit_json(config, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert "'dynamic'" in refused(UnsupportedModelError, inputs, tmp_path)
    config.write_text(kept)
    edit_json(inputs["vision"] / "config.json", model_type="siglip")
    assert "'siglip'" in refused(UnsupportedModelError, inputs, tmp_path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"alibi": False}, "no ALiBi"),
        ({"prefix_lm": True}, "a prefix mask"),
        ({"attn_type": "multiquery_attention"}, "multiquery_attention"),
        ({"norm_type": "rmsnorm"}, "rmsnorm"),
        ({"logit_scale": "odd"}, "odd"),
    ],
)
def test_forms_of_mpt_that_are_not_covered(tmp_path: Path, fresh: Any, values: dict[str, Any], expected: str) -> None:
    inputs = fresh(MOSAIC, tmp_path / "inputs")
    edit_json(inputs["language"] / "config.json", **values)
    text = refused(UnsupportedModelError, inputs, tmp_path)
    assert expected in text
    assert "supported is causal multi-head attention with ALiBi" in text


def test_the_interval_follows_from_the_weights(tmp_path: Path, inputs: dict[str, Path]) -> None:
    text = refused(WeightsError, inputs, tmp_path, cross_attn_every_n_layers=4)
    assert "before every layer number 2, 2 in all; 4 was asked for" in text

    def drop(state: dict[str, Any]) -> None:
        for name in [name for name in state if "gated" in name]:
            del state[name]

    edit_state(inputs["weights"], drop)
    assert "before the layers none" in refused(WeightsError, inputs, tmp_path)


def test_the_table_is_needed(tmp_path: Path, inputs: dict[str, Path]) -> None:
    edit_state(inputs["weights"], lambda state: state.pop(TABLE))
    text = refused(WeightsError, inputs, tmp_path)
    assert "no table of embeddings (lang_encoder.model.embed_tokens.weight)" in text


def test_a_head_that_differs_from_the_table_it_is_tied_to(tmp_path: Path, fresh: Any) -> None:
    inputs = fresh(MPT, tmp_path / "inputs")
    state = torch.load(inputs["weights"], weights_only=True)
    head = {"lang_encoder.lm_head.weight": state["lang_encoder.transformer.wte.weight"]}
    edit_state(inputs["weights"], lambda state: state.update(head))
    convert(inputs, tmp_path / "same")
    edit_state(inputs["weights"], lambda state: state.update({name: t + 1 for name, t in head.items()}))
    assert "an output head that differs from its embeddings" in refused(WeightsError, inputs, tmp_path)


def test_companions_are_needed(tmp_path: Path, inputs: dict[str, Path]) -> None:
    for which, name in (("language", "tokenizer.json"), ("vision", "preprocessor_config.json")):
        path = inputs[which] / name
        kept = path.read_bytes()
        path.unlink()
        assert name in refused(CheckpointError, inputs, tmp_path)
        path.write_bytes(kept)
    (inputs["language"] / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer" in refused(CheckpointError, inputs, tmp_path)


@pytest.mark.parametrize(
    ("which", "values"),
    [
        ("language", {"num_hidden_layers": "four"}),
        ("language", {"num_attention_heads": 0}),
        ("language", {"hidden_size": None}),
        ("vision", {"vision_config": {"hidden_size": "wide"}}),
        ("vision", {"vision_config": []}),
        ("vision", {"vision_config": {"patch_size": 0}}),
    ],
)
def test_damaged_configurations(tmp_path: Path, inputs: dict[str, Path], which: str, values: dict[str, Any]) -> None:
    edit_json(inputs[which] / "config.json", **values)
    refused(CheckpointError, inputs, tmp_path)


def test_a_list_of_special_tokens_is_kept(tmp_path: Path, inputs: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    path = inputs["language"] / "tokenizer_config.json"
    for name in ("extra_special_tokens", "additional_special_tokens"):
        kept = path.read_text()
        edit_json(path, **{name: ["<unk>"]})
        tokenizer = AutoTokenizer.from_pretrained(convert(inputs, tmp_path / name))
        assert tokenizer("<image><|endofchunk|>")["input_ids"][-2:] == [392, 391]
        path.write_text(kept)


def test_integers_are_no_weights(tmp_path: Path, inputs: dict[str, Path]) -> None:
    edit_state(inputs["weights"], lambda state: state.update({"perceiver.norm.bias": torch.zeros(32, dtype=torch.int8)}))
    assert "perceiver.norm.bias in the dtype I8" in refused(WeightsError, inputs, tmp_path)


def test_missing_shards_of_a_pickled_language_model(tmp_path: Path, fresh: Any) -> None:
    inputs = fresh(MOSAIC, tmp_path / "inputs")
    index = {"weight_map": {"a": "pytorch_model.bin", "b": "pytorch_model-00002-of-00002.bin"}}
    (inputs["language"] / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "lacks 1 weight files: pytorch_model-00002-of-00002.bin" in refused(WeightsError, inputs, tmp_path)


def test_an_output_that_exists_stays(tmp_path: Path, inputs: dict[str, Path]) -> None:
    (tmp_path / "out").mkdir()
    assert "exists" in refused(OutputError, inputs, tmp_path)


def test_nothing_half_written_stays(tmp_path: Path, inputs: dict[str, Path]) -> None:
    def stop(_: str, done: int, *__: int) -> None:
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(inputs, tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]
    shutil.rmtree(tmp_path / "inputs")
