"""What is wrong with a checkpoint, or with the place for the bundle, is said; and nothing half done is left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import onnx_ir as ir
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from edgevlm.bundle import MANIFEST, Bundle
from edgevlm.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    EdgeVLMError,
    OutputError,
    UnsupportedModelError,
    WeightsError,
)
from edgevlm.export import export
from edgevlm.export.checkpoint import open_checkpoint
from edgevlm.export.export import export_bundle
from edgevlm.export.trace import PARAMETER
from edgevlm.models import PartSpec
from edgevlm.models import llava as family

pytestmark = pytest.mark.usefixtures("traced_once")

TESTS = Path(__file__).parent.parent


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for a test to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(llava: Callable[[str], Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(llava("clip-qwen2-tied").checkpoint, tmp_path / "sharded"))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def refused(folder: Path, kind: type[EdgeVLMError]) -> str:
    """The text of the error with which an export ends, which leaves nothing beside its output."""
    output = folder.parent / "output" / "bundle"
    with pytest.raises(EdgeVLMError) as caught:
        export_bundle(str(folder), output)
    assert type(caught.value) is kind, caught.value
    assert not output.parent.exists() or list(output.parent.iterdir()) == []
    return str(caught.value)


# ------------------------------------------------------------------------------------- what it is not


def test_folder_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    assert "no config.json" in refused(tmp_path / "notes", CheckpointError)
    (tmp_path / "notes" / "readme.txt").write_text("no checkpoint")
    assert "no config.json" in refused(tmp_path / "notes", CheckpointError)


def test_file_in_place_of_a_folder(broken: Path) -> None:
    shutil.copy(broken / "model.safetensors", broken.parent / "model.safetensors")
    assert "is a file" in refused(broken.parent / "model.safetensors", CheckpointError)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not JSON"), (b"", "is not JSON"), (b"\xff\xfe\x00", "is not JSON"), (b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "holds no object"), (b'"text"', "holds no object"), (b"null", "holds no object"),
    ],
)  # fmt: skip
def test_config_that_is_no_object(broken: Path, content: bytes, said: str) -> None:
    (broken / "config.json").write_bytes(content)
    text = refused(broken, CheckpointError)
    assert said in text
    assert "config.json" in text


@pytest.mark.parametrize(
    "model", ["no such model", "nonsense", "./nowhere", "/nowhere/at/all", "demo/none", "a/b/c", "~/nowhere"]
)
def test_names_that_stand_for_nothing(model: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError) as caught:
        export_bundle(model, tmp_path / "out")
    assert "llava" in str(caught.value), "the aliases are listed"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "hub_id"), [("llava", "llava-hf/llava-1.5-7b-hf"), ("someone/some-llava", "someone/some-llava")]
)
def test_without_network(model: str, hub_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointNotFoundError) as caught:
        export_bundle(model, tmp_path / "out")
    for said in (hub_id, "demo/llava", f"hf download {hub_id}", "could not be reached"):
        assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- what it asks for


@pytest.mark.parametrize("architectures", [["BertModel"], ["LlavaNextForConditionalGeneration", "Other"], [], None])
def test_unsupported_architecture(broken: Path, architectures: list[str] | None) -> None:
    edit_config(broken, lambda c: c.update(architectures=architectures))
    text = refused(broken, UnsupportedModelError)
    assert all(
        name in text for name in ("supported are Blip2For", "LlavaForConditionalGeneration", "IdeficsForVisionText2Text")
    )
    assert all(name in text for name in architectures or ["'llava' without 'architectures'"])


def test_config_without_architectures(broken: Path) -> None:
    edit_config(broken, lambda c: c.pop("architectures"))
    assert "'llava' without 'architectures'" in refused(broken, UnsupportedModelError)


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        (
            "vision_config",
            {"model_type": "pixtral"},
            "'pixtral' is not supported; supported are clip_vision_model, siglip_vision_model",
        ),
        ("text_config", {"model_type": "gemma"}, "'gemma' is not supported; supported are llama, mistral, qwen2"),
        ("text_config", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ("text_config", {"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "'longrope' is not supported"),
    ],
)
def test_unsupported_pieces(broken: Path, section: str, change: dict[str, Any], said: str) -> None:
    edit_config(broken, lambda c: c[section].update(change))
    assert said in refused(broken, UnsupportedModelError)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"architectures": "LlavaForConditionalGeneration"}, CheckpointError),
        ({"architectures": 5}, CheckpointError),
        ({"text_config": None}, CheckpointError),
        ({"vision_config": [1]}, CheckpointError),
        ({"vision_config": {"model_type": "clip_vision_model", "hidden_size": "wide"}}, CheckpointError),
        ({"image_token_index": 3000}, UnsupportedModelError),
    ],
)
def test_nonsense_in_the_config(broken: Path, change: dict[str, Any], kind: type[EdgeVLMError]) -> None:
    edit_config(broken, lambda c: c.update(change))
    assert "config.json" in refused(broken, kind)


@pytest.mark.parametrize(
    ("content", "method"),
    [({"quant_method": "awq", "bits": 4}, "awq"), ({}, "an unknown method"), (["gptq"], "an unknown method")],
)
def test_quantized_checkpoint(broken: Path, content: Any, method: str) -> None:
    edit_config(broken, lambda c: c.update(quantization_config=content))
    text = refused(broken, UnsupportedModelError)
    assert f"already quantized ({method})" in text
    assert "--quantize" in text


def test_null_quantization_is_none(broken: Path) -> None:
    edit_config(broken, lambda c: c.update(quantization_config=None))
    assert open_checkpoint(str(broken)).config["quantization_config"] is None


def test_missing_companions(broken: Path) -> None:
    (broken / "processor_config.json").unlink()
    assert "neither preprocessor_config.json nor processor_config.json" in refused(broken, CheckpointError)
    (broken / "tokenizer.json").unlink()
    text = refused(broken, CheckpointError)
    assert "no tokenizer.json" in text
    assert "save_pretrained" in text


@pytest.mark.parametrize("content", ["{", "[]", '{"added_tokens": [{"id": 4}]}'])
def test_damaged_tokenizer(broken: Path, content: str) -> None:
    (broken / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in refused(broken, CheckpointError)


# --------------------------------------------------------------------------------------------- weights


def test_missing_shard(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    text = refused(sharded, WeightsError)
    assert f"lacks 1 of {len(shards)} weight files: {shards[1].name}" in text


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": ["b"]}}']
)
def test_damaged_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json is damaged" in refused(sharded, WeightsError)


def test_index_that_leads_out_of_the_folder(sharded: Path, checkpoint: Path) -> None:
    shutil.copy(checkpoint / "model.safetensors", sharded.parent / "outside.safetensors")
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    assert "model.safetensors.index.json is damaged" in refused(sharded, WeightsError)


@pytest.mark.parametrize("where", ["in the data", "in the header", "in the length", "empty"])
def test_truncated_weights(broken: Path, where: str) -> None:
    path = broken / "model.safetensors"
    size = {"in the data": path.stat().st_size - 1000, "in the header": 100, "in the length": 5, "empty": 0}[where]
    os.truncate(path, size)
    text = refused(broken, WeightsError)
    assert str(path) in text
    assert "truncated" in text


@pytest.mark.parametrize(
    "content", [b"\0" * 5000, b"PK\x03\x04" * 100, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}x"]
)
def test_garbage_weights(broken: Path, content: bytes) -> None:
    (broken / "model.safetensors").write_bytes(content)
    assert "cannot be read as safetensors" in refused(broken, WeightsError)


def test_missing_weight(broken: Path) -> None:
    path = broken / "model.safetensors"
    weights = load_file(path)
    victim = next(name for name in weights if name.endswith("layers.1.mlp.fc1.weight") and "vision" in name)
    del weights[victim]
    save_file(weights, path, {"format": "pt"})
    text = refused(broken, WeightsError)
    assert "vision_tower.encoder.layers.1.mlp.fc1.weight" in text
    assert "vision_encoder" in text


def test_missing_head_is_not_replaced_by_the_embeddings(broken: Path) -> None:
    weights = {family.weight_name(name): entry for name, entry in open_checkpoint(str(broken)).weights.items()}
    del weights["lm_head.weight"]
    rows, width = weights["language_model.embed_tokens.weight"].shape

    def head() -> ir.Model:
        value = ir.Value(name="w", shape=ir.Shape([rows, width]), type=ir.TensorType(ir.DataType.FLOAT))
        value.metadata_props[PARAMETER] = "lm_head.weight"
        return ir.Model(ir.Graph([], [], nodes=[], initializers=[value]), ir_version=11)

    spec, table = PartSpec("decoder", None, {}, {}), "model.language_model.embed_tokens.weight"
    for tied in ({}, {"other.weight": table}):
        with pytest.raises(WeightsError, match=r"no weight 'lm_head\.weight'"):
            export.bind_weights(head(), spec, family, weights, tied=tied)
    export.bind_weights(head(), spec, family, weights, tied={"lm_head.weight": table})
    export.bind_weights(head(), spec, family, weights, tied={table: "lm_head.weight"})


def test_tied_names_stand_for_one_another() -> None:
    shared = export._shared({"head": "table", "encoder": "table", "a": "b"})
    assert {name: set(group) for name, group in shared.items()} == {
        "head": {"table", "head", "encoder"}, "encoder": {"table", "head", "encoder"}, "table": {"table", "head", "encoder"},
        "a": {"a", "b"}, "b": {"a", "b"},
    }  # fmt: skip
    assert shared["head"][0] == "table"
    assert export._shared({}) == {}


def test_wrong_shape(broken: Path) -> None:
    edit_config(broken, lambda c: c["vision_config"].update(intermediate_size=50))
    text = refused(broken, WeightsError)
    assert "mlp.fc1" in text
    assert "48" in text
    assert "config.json asks for" in text
    assert "50" in text


def test_integer_weights(broken: Path) -> None:
    path = broken / "model.safetensors"
    weights = load_file(path)
    victim = next(name for name in weights if name.endswith("layers.0.mlp.fc1.weight"))
    weights[victim] = weights[victim].astype(np.int8)
    save_file(weights, path, {"format": "pt"})
    text = refused(broken, WeightsError)
    assert "layers.0.mlp.fc1.weight" in text
    assert "I8" in text


def test_pickles_are_refused(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    text = refused(broken, WeightsError)
    assert "pytorch_model.bin" in text
    assert f"edgevlm convert --model {broken} --output {broken.name}-safetensors" in text
    (broken / "pytorch_model.bin").unlink()
    assert "holds no weights" in refused(broken, WeightsError)


def test_pickles_beside_safetensors_are_left_alone(broken: Path) -> None:
    (broken / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with safe_open(broken / "model.safetensors", framework="numpy") as file:
        assert open_checkpoint(str(broken)).weights.keys() == set(file.keys())


# ---------------------------------------------------------------------------------------------- output


def test_existing_output_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="--force"):
        export_bundle(str(checkpoint), tmp_path / "out")
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is no bundle"):
        export_bundle(str(checkpoint), tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(OutputError, match="is no bundle"):
        export_bundle(str(checkpoint), tmp_path / "out" / "thesis.txt", force=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_output_that_cannot_be_made(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm.export.trace.trace_part", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("a file")
    for output in (tmp_path / "file" / "bundle", Path("/proc/nowhere/bundle")):
        with pytest.raises(OutputError, match="cannot be written"):
            export_bundle(str(checkpoint), output)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if not os.access(locked, os.W_OK):  # root may write everywhere
        with pytest.raises(OutputError, match="cannot be written"):
            export_bundle(str(checkpoint), locked / "bundle")


@pytest.mark.parametrize(
    ("failure", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "disk is full"),
        (OSError(errno.EIO, "Input/output error"), OutputError, "Input/output error"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
        (KeyboardInterrupt("stopped"), KeyboardInterrupt, "stopped"),
    ],
)
def test_failure_in_the_middle_leaves_nothing(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    failure: BaseException, kind: type[BaseException], said: str,
) -> None:  # fmt: skip
    replaced = Path(shutil.copytree(bundle, tmp_path / "bundle"))

    def half_written(model: Any, path: Path, progress: Any = None) -> None:
        path.write_bytes(b"half a graph")
        raise failure

    monkeypatch.setattr(export, "save_graph", half_written)
    with pytest.raises(kind, match=said):
        export_bundle(str(checkpoint), replaced, force=True)
    assert os.listdir(tmp_path) == ["bundle"]
    Bundle.open(replaced)


def test_forced_export_replaces_the_bundle(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    replaced = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (replaced / MANIFEST).write_text("{}")
    (replaced / "left over").write_text("from before")
    export_bundle(str(checkpoint), replaced, force=True)
    assert os.listdir(tmp_path) == ["bundle"]
    assert {p.name for p in replaced.iterdir()} == {p.name for p in bundle.iterdir()}
    Bundle.open(replaced)


# Imports once, then forks a process for every moment at which an export is killed.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path

import edgevlm.export.passes, edgevlm.export.trace
from edgevlm.bundle import Bundle
from edgevlm.export.export import export_bundle

checkpoint, output = sys.argv[1], Path(sys.argv[2])
sys.path.append(sys.argv[3])
from traces import remembering

edgevlm.export.trace.trace_part = remembering(edgevlm.export.trace.trace_part)
export_bundle(checkpoint, output.parent.parent / "first")  # whose traces the processes forked below have

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def at_stage(words):
    return {"stage": lambda text: die() if text == words else None}

def at_tensor(count):
    seen = []
    return {"progress": lambda *_: die() if seen.append(0) or len(seen) == count else None}

random.seed()
for moment in (at_stage("tracing projector"), at_tensor(1), at_tensor(random.randint(15, 30))):
    child = os.fork()
    if not child:
        export_bundle(checkpoint, output, **moment)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it was to be killed"
    assert not output.exists()
    left = [name for name in os.listdir(output.parent) if name.endswith(".part")]
    assert left == [f".{output.name}.{child}.part"], left

export_bundle(checkpoint, output)
assert os.listdir(output.parent) == [output.name], os.listdir(output.parent)
Bundle.open(output)
"""


def test_killed_exports_leave_no_bundle_and_are_tidied_up(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "place" / "bundle"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(checkpoint), str(output), str(TESTS)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    # Another process, another hash seed: the same bytes.
    for path in (p for p in bundle.rglob("*") if p.is_file()):
        assert (output / path.relative_to(bundle)).read_bytes() == path.read_bytes(), path.name
