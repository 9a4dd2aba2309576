"""The command line: what it prints, what it returns, and how it fails."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tinies import Tiny
from tiny import LLAVAS, make_llava

from edgevlm.bundle import MANIFEST, SCHEMA_VERSION, Bundle
from edgevlm.cli import main

COMMANDS = ("export", "quantize", "verify", "run", "eval", "inspect", "doctor", "demo")
PARTS = ("vision_encoder", "projector", "embed_tokens", "decoder")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)).save(path)
    return path


def call(*arguments: object) -> int:
    """The exit code of a command line, of the parser's kind too."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as exc:
        return int(exc.code or 0)


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgevlm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The error, which is one line without a traceback; nothing may be on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("edgevlm ")
    assert err.count("\n") == 1
    return err


# ----------------------------------------------------------------------------------------- the whole path


@pytest.mark.usefixtures("traced_once")
def test_the_whole_path(checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, small = tmp_path / "new" / "bundle", tmp_path / "int4"
    assert call("export", "--model", checkpoint, "--output", bundle) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in PARTS)

    assert call("inspect", bundle) == 0
    shown = capsys.readouterr().out
    assert "LlavaForConditionalGeneration" in shown
    assert "none (float)" in shown
    assert call("inspect", bundle, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((bundle / MANIFEST).read_text())

    assert call("quantize", bundle, "--recipe", "int4", "--output", small) == 0
    assert "int4" in capsys.readouterr().out
    assert Bundle.open(small).manifest.recipe["name"] == "int4"  # type: ignore[index]

    assert call("verify", bundle, "--against", checkpoint) == 0
    assert "All within the limits" in capsys.readouterr().out
    assert call("verify", bundle, "--against", checkpoint, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((bundle / "reports" / "parity.json").read_text())
    assert (report["passed"], report["failures"]) == (True, [])

    assert call("run", bundle, "--image", photo, "--prompt", "How many?", "--max-new-tokens", 5, "--threads", 1) == 0
    out, err = capsys.readouterr()
    assert call("run", bundle, "--image", photo, "--prompt", "How many?", "--max-new-tokens", 5, "--threads", 1, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert out == answer["text"] + "\n"
    assert "first token after" in err
    assert "cut at --max-new-tokens" in err
    assert len(answer["tokens"]) == 5
    assert answer["finish_reason"] == "length"
    assert answer["tokens_per_second"] > 0
    assert answer["timings"]["prompt_tokens"] > 16
    assert {"vision", "prefill", "decode", "first_token", "reused_tokens", "reused_images"} <= set(answer["timings"])
    assert {part: choice["chosen"] for part, choice in answer["backends"].items()} == dict.fromkeys(PARTS, "cpu")


@pytest.mark.usefixtures("traced_once")
def test_export_can_quantize_on_the_way(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "b"
    assert call("export", "--model", checkpoint, "--output", output, "--dtype", "fp16", "--quantize", "int8") == 0
    assert "int8" in capsys.readouterr().out
    manifest = Bundle.open(output).manifest
    assert manifest.recipe is not None
    assert (manifest.recipe["name"], manifest.dtype) == ("int8", "float16")
    # An output that exists is replaced with --force only.
    assert call("export", "--model", checkpoint, "--output", output) == 2
    assert "--force" in said(capsys)
    assert call("export", "--model", checkpoint, "--output", output, "--force") == 0
    assert Bundle.open(output).manifest.recipe is None
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_run_takes_several_pictures_and_samples(bundle: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*more: object) -> dict[str, Any]:
        common = ("--prompt", "What changed?", "--max-new-tokens", 12, "--threads", 1, "--json")
        assert call("run", bundle, *common, *more) == 0
        return json.loads(capsys.readouterr().out)

    one, two = answer("--image", photo), answer("--image", photo, "--image", photo)
    assert two["timings"]["prompt_tokens"] >= one["timings"]["prompt_tokens"] + 16
    assert answer("--image", photo, "--temperature", 0)["tokens"] == one["tokens"]
    first, again, other = (
        answer("--image", photo, "--temperature", 3, "--top-p", 0.95, "--seed", seed)["tokens"] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor") == 0
    assert "onnxruntime" in capsys.readouterr().out
    assert call("doctor", "--json") == 0
    findings = json.loads(capsys.readouterr().out)
    assert all(set(finding) == {"what", "found", "ok", "remedy"} for finding in findings)
    assert next(f for f in findings if f["what"] == "backend cpu")["ok"] is True


def test_the_module_runs_as_a_program(bundle: Path, photo: Path) -> None:
    done = process("run", bundle, "--image", photo, "--prompt", "How many?", "--max-new-tokens", "4", "--threads", "1")
    assert done.returncode == 0
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr
    version = process("--version")
    assert (version.returncode, version.stdout.split()[0]) == (0, "edgevlm")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    shown = capsys.readouterr().out
    assert f"edgevlm {command}" in shown
    assert "--debug" in shown


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["run"], "--prompt"),
        (["run", "b", "--prompt", "a", "--max-new-tokens", "many"], "many"),
        (["run", "b", "--prompt", "a", "--max", "5"], "--max"),  # no guessing of what was meant
        (["export", "--model", "m", "--output", "o", "--dtype", "bf16"], "bf16"),
        (["export", "--output", "o"], "--model"),
        (["quantize", "b", "--output", "o"], "--recipe"),
    ],
    ids=str,
)
def test_a_command_line_that_is_none(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err.splitlines()[-1]
    assert "usage" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--max-new-tokens", "-3"], "max_new_tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "1", "--top-p", "0"], "top_p"),
        (["--top-p", "0"], "top_p"),
        (["--top-p", "0.5"], "temperature"),
        (["--temperature", "1", "--seed", "-1"], "seed"),
        (["--backend", "cuda"], "cuda"),
        (["--backend", "abacus"], "cpu"),
        (["--threads", "0"], "threads"),
        (["--capacity", "1"], "2048"),
        (["--capacity", "5000"], "2048"),
        (["--capacity", "8"], "capacity of 8"),
        (["--image", "missing.png"], "missing.png"),
        (["--image", "."], "folder"),
        (["--prompt", ""], "empty"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_served(
    bundle: Path, options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if options == ["--backend", "cuda"]:
        onnxruntime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this machine may have a GPU that works")
    assert call("run", bundle, "--prompt", "How many cubes are there?", *options) == 2
    assert named in said(capsys)


@pytest.mark.parametrize(
    ("name", "pictures", "prompt", "named"),
    [
        ("blip2-opt-350m", 0, "How many?", "one picture, which comes before the text; 0 were given"),
        ("blip2-opt-350m", 2, "How many?", "2 were given"),
        ("blip2-t5-tied", 1, "What is <image>?", "leave the token out"),
        ("instructblip-llama", 1, "cubes " * 70, "the Q-Former, which reads 64"),
        ("flamingo-every-second", 1, "<image> How many?", "2 places for pictures"),
        ("flamingo-every-second", 0, "https://example.org/a.png", "nothing is downloaded"),
    ],
)
def test_a_request_that_is_not_for_this_family(
    tiny: Callable[[str], Tiny],
    name: str,
    pictures: int,
    prompt: str,
    named: str,
    photo: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = ["--image", photo] * pictures
    assert call("run", tiny(name).bundle, "--prompt", prompt, *images) == 2
    assert named in said(capsys)


@pytest.mark.parametrize(
    ("name", "pictures", "shown"),
    [("blip2-t5-tied", 1, "one row a token of the prompt"), ("flamingo-every-second", 2, "5 rows a picture")],
)
def test_other_families_run_and_are_inspected(
    tiny: Callable[[str], Tiny], name: str, pictures: int, shown: str, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, images = tiny(name).bundle, ["--image", photo] * pictures
    assert call("run", bundle, "--prompt", "How many?", *images, "--max-new-tokens", 3, "--threads", 1, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer["backends"]) == set(Bundle.open(bundle).manifest.parts)
    assert call("inspect", bundle) == 0
    assert shown in " ".join(capsys.readouterr().out.split())


def test_a_file_that_is_no_picture(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "note.png").write_text("not a picture")
    assert call("run", bundle, "--prompt", "How many?", "--image", tmp_path / "note.png") == 2
    assert "note.png" in said(capsys)


@pytest.mark.parametrize("command", ["run", "inspect", "quantize", "verify"])
def test_a_bundle_that_is_missing_or_damaged(
    command: str, bundle: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {
        "run": ["--prompt", "a"], "inspect": [], "quantize": ["--recipe", "int8", "--output", tmp_path / "out"],
        "verify": ["--against", checkpoint],
    }[command]  # fmt: skip
    assert call(command, tmp_path / "nothing", *more) == 2
    assert "does not exist" in said(capsys)

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    good = (copy / MANIFEST).read_text()
    newer = good.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99')
    unknown = good.replace("kv_cache", "cache")
    for damaged in ("{", "[]", "{}", newer, unknown):
        assert damaged != good
        (copy / MANIFEST).write_text(damaged)
        assert call(command, copy, *more) == 2
        assert MANIFEST in said(capsys)
    (copy / MANIFEST).write_text(good)

    weights = next(p for p in sorted((copy / "onnx").iterdir()) if p.suffix != ".onnx")
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 0x10
    weights.write_bytes(data)
    if command != "inspect":  # which reads the manifest only
        assert call(command, copy, *more) == 2
        assert weights.name in said(capsys)
    weights.unlink()
    assert call(command, copy, *more) == 2
    assert weights.name in said(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "architectures"),
        ({"text_config": {"model_type": "gpt2"}}, "gpt2"),
        ({"vision_config": {"model_type": "vit"}}, "vit"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
    ids=str,
)
def test_a_model_that_is_not_supported(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    assert call("export", "--model", copy, "--output", tmp_path / "out") == 2
    assert named in said(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_what_export_and_quantize_refuse(
    checkpoint: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, taken = tmp_path / "out", tmp_path / "taken"
    taken.mkdir()
    (taken / "diary.txt").write_text("mine")
    for arguments, named in (
        (("export", "--model", "no-such-model", "--output", out), "no-such-model"),
        (("export", "--model", tmp_path / "nothing", "--output", out), "nothing"),
        (("export", "--model", taken, "--output", out), "config.json"),
        (("export", "--model", checkpoint, "--output", taken), "exists"),
        (("export", "--model", checkpoint, "--output", taken, "--force"), "no bundle"),
        (("export", "--model", checkpoint, "--output", out, "--quantize", "int3"), "int3"),
        (("quantize", bundle, "--recipe", "int3", "--output", out), "int8, int4"),
        (("quantize", bundle, "--recipe", "int8", "--output", taken), "exists"),
        (("quantize", bundle, "--recipe", "int8", "--output", bundle), "exists"),
        (("verify", bundle, "--against", tmp_path / "nothing"), "nothing"),
    ):
        assert call(*arguments) == 2, arguments
        assert named in said(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]
    assert (taken / "diary.txt").read_text() == "mine"


def test_what_calibration_refuses(bundle: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every one before it leaves anything."""
    shutil.copy(photo, tmp_path / "photo.png")
    (tmp_path / "empty").mkdir()
    out, lists = tmp_path / "made" / "out", {
        "broken": '{"image": "photo.png"}\n{"image": }',
        "gone": '{"image": "gone.png"}',
        "blind": '{"prompt": "Hello"}',
        "long": json.dumps({"image": "photo.png", "prompt": "much too long " * 2000}),
    }  # fmt: skip
    for name, content in lists.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    before = sorted(path.name for path in tmp_path.iterdir())
    for more, named in (
        (("--recipe", "int4", "--calibration", tmp_path / "nowhere"), "There is no calibration set"),
        (("--recipe", "int4", "--calibration", tmp_path / "empty"), "has neither pictures"),
        (("--recipe", "int4", "--calibration", tmp_path), "has several .jsonl files"),
        (("--recipe", "w8a8", "--calibration", tmp_path / "broken.jsonl"), "has 1 broken lines. line 2: "),
        (("--recipe", "int4-gptq", "--calibration", tmp_path / "gone.jsonl"), "line 1: "),
        (("--recipe", "int4", "--calibration", tmp_path / "blind.jsonl"), "calibrated on text alone loses its sight"),
        (("--recipe", "int4", "--samples", 0), "needs 1 or more"),
        (("--recipe", "int8", "--calibration", "scenes"), "looks at no samples; --calibration says nothing to it"),
        (("--recipe", "int8", "--samples", 5), "--samples says nothing to it"),
        (("--recipe", "int8", "--seed", 0), "--seed says nothing to it"),
    ):
        assert call("quantize", bundle, "--output", out, *more) == 2, more
        assert named in said(capsys)
        assert not out.exists()
        assert not out.parent.exists() or not list(out.parent.iterdir())
    assert call("quantize", bundle, "--output", out, "--recipe", "int4", "--calibration", tmp_path / "long.jsonl") == 2
    *_, last = capsys.readouterr().err.splitlines()  # it had begun, and said so
    assert last.startswith("edgevlm quantize: error: line 1 of the calibration set long.jsonl cannot be used: The prompt has")
    assert not list(out.parent.iterdir())
    assert call("export", "--model", bundle, "--output", out, "--samples", 5) == 2
    assert "--samples is about quantization; give --quantize RECIPE with it" in said(capsys)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "made") == before


@pytest.mark.usefixtures("traced_once")
def test_calibrated_on_export_or_later(
    checkpoint: Path, bundle: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"image": str(photo), "prompt": "What?", "answer": "a thing"}) + "\n")
    asked = ("--calibration", tmp_path / "mine.jsonl", "--seed", 3, "--kv-cache", "int8")
    assert call("export", "--model", checkpoint, "--output", tmp_path / "a", "--quantize", "int4", *asked) == 0
    assert call("quantize", bundle, "--output", tmp_path / "b", "--recipe", "int4", *asked) == 0
    files = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in "ab"
    ]
    assert files[0] == files[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "mine.jsonl"]
    capsys.readouterr()
    assert call("inspect", tmp_path / "b") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "heads of 16, int8)" in shown
    recipe = json.loads((tmp_path / "b" / MANIFEST).read_text())["recipe"]
    assert (recipe["name"], recipe["kv_cache"]) == ("int4", "int8")
    assert {**recipe["calibration"], "sha256": ""} == {"source": "mine.jsonl", "samples": 1, "seed": 3, "sha256": ""}
    assert call("run", tmp_path / "b", "--image", photo, "--prompt", "How many?", "--max-new-tokens", 3, "--threads", 1) == 0


def test_debug_shows_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", tmp_path / "nothing", "--debug") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "BundleError" in err
    assert err.splitlines()[-1].startswith("edgevlm inspect: error:")


def test_a_bug_is_called_one(monkeypatch: pytest.MonkeyPatch, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(Bundle, "open", broken)
    assert call("inspect", bundle) == 3
    assert "ZeroDivisionError" in said(capsys)


# ------------------------------------------------------------------------------------------- verification


def test_verify_notices_other_weights(
    llava: Callable[[str], Tiny], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same architecture from another seed: a bundle whose weights are not those of its checkpoint."""
    other = make_llava(tmp_path / "other", LLAVAS[0], seed=1)
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    capsys.readouterr()
    assert call("verify", copy, "--against", other) == 1
    shown = capsys.readouterr().out
    assert "MISSED" in shown
    missed = shown[shown.index("missed:") :]
    assert all(f"part {part}" in " ".join(missed.split()) for part in PARTS)


# ------------------------------------------------------------------------------ signals, pipes and packages


def test_eval(bundle: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scores"
    asked = ("eval", bundle, checkpoint, "--suite", "scenes", "--limit", 16, "--max-new-tokens", 3, "--threads", 1)
    assert call(*asked, "--output", output) == 0
    shown, told = capsys.readouterr()
    for name in ("scenes: 16 questions", bundle.name, checkpoint.name, "exact match", "caption", "against"):
        assert name in shown
    assert f"asking {checkpoint.name}" in told
    assert f"{bundle.name}: 16 of 16 answered" in told
    output_of = output / "scenes"
    assert f"{output_of / 'results.json'} and {output_of / 'report.html'} have more" in told
    kept = {path.name: path.read_bytes() for path in output_of.glob("*.jsonl")}
    assert set(kept) == {f"{bundle.name}.jsonl", f"{checkpoint.name}.jsonl"}
    assert "<html" in (output_of / "report.html").read_text(encoding="utf-8")

    assert call(*asked, "--output", output, "--json") == 0  # nothing is asked again
    shown, told = capsys.readouterr()
    assert json.loads(shown) == json.loads((output_of / "results.json").read_text(encoding="utf-8"))
    assert "asking" not in told
    assert {path.name: path.read_bytes() for path in output_of.glob("*.jsonl")} == kept

    assert call(*asked[:-4], "--max-new-tokens", 2, "--output", output) == 2
    assert "Give another --output, or --force to begin anew." in capsys.readouterr().err
    assert call(*asked[:-4], "--max-new-tokens", 2, "--output", output, "--force") == 0


def test_what_eval_refuses(bundle: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"question_id": n, "image": f"{n}.png", "text": "Is it?", "label": "no"} for n in range(3)]
    file = tmp_path / "coco_pope_random.json"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    output = ("--output", tmp_path / "out")

    def error(*arguments: object) -> str:
        assert call("eval", *arguments, *output) == 2
        return said(capsys)

    missing = error(bundle, "--suite", f"pope:{file}", "--images", photo.parent)
    assert "3 of the 3 pictures of pope-coco_pope_random are missing: " in missing
    assert str(photo.parent / "0.png") in missing
    file.write_text("{\n", encoding="utf-8")
    assert "1 broken line: line 1 (not JSON" in error(bundle, "--suite", f"pope:{file}")
    assert "no suite 'coco'" in error(bundle, "--suite", "coco")
    assert "neither a folder here" in error(bundle, tmp_path / "nothing", "--suite", "scenes").split("…")[-1]
    assert "asked twice" in error(bundle, bundle, "--suite", "scenes")
    assert "max_new_tokens is 0" in error(bundle, "--suite", "scenes", "--max-new-tokens", 0)
    assert "are for --engine ray" in error(bundle, "--suite", "scenes", "--workers", 2)
    assert not (tmp_path / "out").exists()
    assert call("eval", bundle) == 2
    assert "--suite" in capsys.readouterr().err


def test_interrupting_an_evaluation_keeps_its_answers(bundle: Path, tmp_path: Path) -> None:
    common = ["--suite", "scenes", "--max-new-tokens", "8", "--threads", "1", "--output", str(tmp_path)]
    started = subprocess.Popen(
        [sys.executable, "-m", "edgevlm", "eval", str(bundle), *common],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    path, deadline = tmp_path / "scenes" / f"{bundle.name}.jsonl", time.monotonic() + 90
    while not path.is_file() or path.read_bytes().count(b"\n") < 5:
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert f"interrupted; the answers so far are in {tmp_path}" in err
    assert "Traceback" not in err
    kept = path.read_bytes().splitlines()[1:]
    assert 4 <= len(kept) < 1000
    assert not list(tmp_path.rglob("results.json"))


def test_interrupting_an_export_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "bundle"
    command = [sys.executable, "-m", "edgevlm", "export", "--model", str(checkpoint), "--output", str(output)]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 90
    while not list(output.parent.glob(".bundle.*")):  # until it has begun to write
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert "interrupted; nothing was left behind" in err
    assert "Traceback" not in err
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("lost", [None, RuntimeError("wrapped")], ids=["swallowed", "wrapped"])
def test_an_interrupt_that_a_library_loses_still_counts(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    lost: Exception | None,
) -> None:
    """Inside a finaliser or a weak reference's callback, an exception goes nowhere."""
    from edgevlm.export import trace

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    traced = trace.trace_part

    def loses(*given: Any) -> Any:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        if lost:
            raise lost
        return traced(*given)

    monkeypatch.setattr(trace, "trace_part", loses)
    assert call("export", "--model", checkpoint, "--output", tmp_path / "out" / "bundle") == 130
    assert "interrupted; nothing was left behind" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("command", ["run", "run --json", "inspect", "inspect --json", "doctor"])
def test_a_reader_that_leaves_early_is_no_error(command: str, bundle: Path, photo: Path) -> None:
    name, *options = command.split()
    arguments = [name, *([str(bundle)] if name != "doctor" else []), *options]
    if name == "run":
        arguments += ["--prompt", "How many?", "--max-new-tokens", "200", "--threads", "1", "--image", str(photo)]
    reader, writer = os.pipe()
    os.close(reader)  # nobody reads at all: the first write fails
    started = subprocess.Popen([sys.executable, "-m", "edgevlm", *arguments], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    _, err = started.communicate(timeout=60)
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert started.returncode == 0


def test_head_sees_its_bytes(bundle: Path, photo: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-m", "edgevlm", "inspect", str(bundle), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    second = subprocess.run(["head", "-c", "5"], stdin=first.stdout, capture_output=True, timeout=60)
    assert first.stdout is not None
    first.stdout.close()
    assert second.stdout == b'{\n  "'
    assert first.stderr is not None
    assert first.stderr.read() == b""
    assert first.wait(60) == 0


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("torch", "export", "edgevlm[export]"),
        ("transformers", "export", "edgevlm[export]"),
        ("safetensors", "export", "edgevlm[export]"),
        ("onnxscript", "export", "edgevlm[export]"),
        ("onnx_ir", "export", "edgevlm[export]"),
        ("onnx_ir", "quantize", "edgevlm[quantize]"),
        ("ml_dtypes", "quantize", "edgevlm[quantize]"),
        ("torch", "verify", "edgevlm[export]"),
        ("onnxruntime", "run", "edgevlm[cpu]"),
    ],
)
def test_a_package_that_is_not_installed(
    package: str, command: str, extra: str, checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    arguments = {
        "export": ["--model", checkpoint, "--output", tmp_path / "out"],
        "quantize": [bundle, "--recipe", "int4", "--output", tmp_path / "out"],
        "verify": [bundle, "--against", checkpoint],
        "run": [bundle, "--prompt", "How many?"],
    }[command]
    code = "import sys; sys.modules[sys.argv[1]] = None; from edgevlm.cli import main; sys.exit(main(sys.argv[2:]))"
    command_line = [sys.executable, "-c", code, package, command, *map(str, arguments)]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert extra in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
