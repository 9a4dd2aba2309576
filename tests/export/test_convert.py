"""Pickled checkpoints: every tensor arrives unchanged, in as many files, and no code is let in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_qwen_vl import TinyQwenVL, make_qwen_vl

from edgevlm.cli import main
from edgevlm.errors import CheckpointError, OutputError, UnsupportedModelError, WeightsError

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from edgevlm.export.checkpoint import open_checkpoint  # noqa: E402
from edgevlm.export.convert import convert_checkpoint  # noqa: E402

SHARDED = TinyQwenVL("sharded", shards=3, pickled=True, dtype="bfloat16")
WHOLE = TinyQwenVL("whole", pickled=True, dtype="float16")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyQwenVL], Path]:
    folder = tmp_path_factory.mktemp("pickled")
    return lambda tiny: folder / tiny.name if (folder / tiny.name).exists() else make_qwen_vl(folder / tiny.name, tiny)


@pytest.fixture
def sharded(made: Callable[[TinyQwenVL], Path], tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made(SHARDED), tmp_path / "in"))


def tensors(folder: Path, suffix: str) -> dict[str, Any]:
    read = load_file if suffix == "safetensors" else lambda path: torch.load(path, weights_only=True)
    return {name: tensor for path in folder.glob(f"*.{suffix}") for name, tensor in read(path).items()}


def refused(folder: Path, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        convert_checkpoint(str(folder), folder.parent / "out")
    assert sorted(path.name for path in folder.parent.iterdir() if path.name.startswith((".", "out"))) == []
    return str(caught.value)


@pytest.mark.parametrize("tiny", [SHARDED, WHOLE], ids=lambda tiny: tiny.name)
def test_every_tensor_arrives(made: Callable[[TinyQwenVL], Path], tiny: TinyQwenVL, tmp_path: Path) -> None:
    told: list[str] = []
    steps: list[tuple[Any, ...]] = []
    out = convert_checkpoint(str(made(tiny)), tmp_path / "out", stage=told.append, progress=lambda *step: steps.append(step))
    before, after = tensors(made(tiny), "bin"), tensors(out, "safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items())
    assert [step[1] for step in steps] == list(range(len(before)))
    assert {step[2] for step in steps} == {len(before)}
    assert sum("only tensors are let in" in text for text in told) == tiny.shards
    assert len(list(out.glob("*.safetensors"))) == tiny.shards
    assert open_checkpoint(str(out)).weights.keys() == before.keys()
    copied = {"config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken"}
    index = {"model.safetensors.index.json"} if tiny.shards > 1 else set()
    assert {path.name for path in out.iterdir()} - {path.name for path in out.glob("*.safetensors")} == copied | index
    assert all((out / name).read_bytes() == (made(tiny) / name).read_bytes() for name in copied)


def test_the_whole_way(made: Callable[[TinyQwenVL], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command that the error of a direct export names, then export, then an answer."""
    assert main(["export", "--model", str(made(WHOLE)), "--output", str(tmp_path / "bundle")]) == 2
    error = capsys.readouterr().err
    command = error.strip().splitlines()[-1].split()
    assert command[:2] == ["edgevlm", "convert"]
    assert "can run any code" in error
    command[-1] = str(tmp_path / command[-1])
    assert main(command[1:]) == 0
    assert "is ready: edgevlm export --model" in capsys.readouterr().out
    assert main(["export", "--model", command[-1], "--output", str(tmp_path / "bundle"), "--dtype", "fp16"]) == 0
    from edgevlm import VLM

    assert VLM.load(tmp_path / "bundle").generate("How many cubes?", max_new_tokens=3).tokens


def test_other_families_and_other_files(tmp_path: Path, sharded: Path) -> None:
    """Integers, tensors that are views of others, licences, folders beside; hidden ones stay behind."""
    path = sharded / "pytorch_model-00002-of-00003.bin"
    state = torch.load(path, weights_only=True)
    base = torch.arange(24.0).reshape(4, 6)
    more = {"position_ids": torch.arange(5), "mask": torch.tensor([True, False]), "view": base.T[1:, ::2], "scalar": base[0, 3]}
    torch.save(state | more, path)
    for name in ("LICENSE", "special/tokenizer.json", ".cache/x.json", "notes.py", "README.md"):
        (sharded / name).parent.mkdir(exist_ok=True)
        (sharded / name).write_text("{}")
    out = convert_checkpoint(str(sharded), tmp_path / "out")
    found = tensors(out, "safetensors")
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in more.items())
    assert (out / "special" / "tokenizer.json").is_file()
    assert (out / "LICENSE").is_file()
    assert not (out / ".cache").exists()
    assert not list(out.glob("*.py"))


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


@pytest.mark.parametrize("new_form", [True, False])
def test_code_is_not_run(tmp_path: Path, sharded: Path, new_form: bool) -> None:
    path, trace = sharded / "pytorch_model-00003-of-00003.bin", tmp_path / "it-ran"
    torch.save({"x": Bomb(trace)}, path, _use_new_zipfile_serialization=new_form)
    text = refused(sharded, WeightsError)
    assert "pytorch_model-00003-of-00003.bin is refused" in text
    assert "could run any code" in text
    assert not trace.exists()


def test_what_cannot_be_converted(tmp_path: Path, sharded: Path) -> None:
    index = sharded / "pytorch_model.bin.index.json"
    good = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "nowhere": "pytorch_model-00001-of-00003.bin"}}))
    assert "lacks nowhere, which pytorch_model.bin.index.json names" in refused(sharded, WeightsError)
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    assert "does not say which files" in refused(sharded, WeightsError)
    index.write_text("{")
    assert "is not JSON" in refused(sharded, CheckpointError)
    index.write_text(json.dumps(good))

    shutil.copy(sharded / "pytorch_model-00001-of-00003.bin", tmp_path / "kept.bin")
    (sharded / "pytorch_model-00001-of-00003.bin").unlink()
    assert "lacks 1 weight files: pytorch_model-00001-of-00003.bin" in refused(sharded, WeightsError)
    (sharded / "pytorch_model-00001-of-00003.bin").write_bytes((tmp_path / "kept.bin").read_bytes()[:-500])
    assert "may be truncated" in refused(sharded, WeightsError)
    shutil.copy(tmp_path / "kept.bin", sharded / "pytorch_model-00001-of-00003.bin")
    torch.save({"x": torch.zeros(2, dtype=torch.complex64)}, sharded / "pytorch_model-00002-of-00003.bin")
    assert "x in the dtype complex64" in refused(sharded, WeightsError)
    shutil.copy(tmp_path / "kept.bin", sharded / "pytorch_model-00002-of-00003.bin")
    assert "as another of the files does" in refused(sharded, WeightsError)


def test_folders_that_need_no_conversion_or_have_no_family(tmp_path: Path, sharded: Path) -> None:
    (sharded / "model.safetensors").write_bytes(b"")
    assert "has safetensors already" in refused(sharded, CheckpointError)
    (sharded / "model.safetensors").unlink()
    for path in sharded.glob("*.bin"):
        path.unlink()
    (sharded / "pytorch_model.bin.index.json").unlink()
    assert "holds no pytorch_model*.bin" in refused(sharded, WeightsError)
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert "BertModel; supported are" in refused(sharded, UnsupportedModelError)
    del config["visual"]
    (sharded / "config.json").write_text(json.dumps(config))
    assert "This Qwen has no eyes" in refused(sharded, UnsupportedModelError)
    (sharded / "config.json").unlink()
    assert "no config.json" in refused(sharded, CheckpointError)


def test_an_output_that_exists_stays(made: Callable[[TinyQwenVL], Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        convert_checkpoint(str(made(WHOLE)), tmp_path / "out")


def test_nothing_half_written_stays(sharded: Path, tmp_path: Path) -> None:
    def stop(_: str, done: int, *__: int) -> None:
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(str(sharded), tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_weights_that_are_named_but_not_there(made: Callable[[TinyQwenVL], Path], tmp_path: Path) -> None:
    """What a download without pickles leaves: their index."""
    shutil.copy(made(SHARDED) / "config.json", tmp_path)
    shutil.copy(made(SHARDED) / "pytorch_model.bin.index.json", tmp_path)
    with pytest.raises(WeightsError, match="edgevlm convert --model"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("arguments", [[], ["--weights", "x"], ["--model", "x", "--weights", "y", "--vision", "z",
                                       "--language", "w"], ["--vision", "x", "--language", "y"]])  # fmt: skip
def test_the_command_wants_one_of_two_forms(arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["convert", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert "either --model, or --weights, --vision and --language" in capsys.readouterr().err
