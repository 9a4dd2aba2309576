"""The shipped models: small, exportable, and able to see."""

from __future__ import annotations

import functools
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from edgevlm.bundle import Bundle
from edgevlm.demo import ANY_ASPECT, BUNDLES, MODELS, QUESTIONS, SHOTS, run_demo
from edgevlm.errors import InputError, OutputError
from edgevlm.evaluation.scene_scores import score_scenes
from edgevlm.export.checkpoint import ASSETS
from edgevlm.scenes import KINDS, heldout_questions
from edgevlm.verify import Report, verify_bundle
from edgevlm.vlm import VLM

SHIPPED = [name for name in MODELS if (ASSETS / "demo" / name).is_dir()]
every_model = pytest.mark.parametrize("name", SHIPPED)


@pytest.fixture(scope="module")
def parity(shipped: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    """A shipped model's bundle against PyTorch."""

    @functools.cache
    def verified(name: str) -> Report:
        copy = shutil.copytree(shipped(name), tmp_path_factory.mktemp("parity") / name)
        return verify_bundle(copy, f"demo/{name}")

    return verified


@every_model
def test_it_is_small(name: str) -> None:
    assert sum(path.stat().st_size for path in (ASSETS / "demo" / name).rglob("*") if path.is_file()) <= 8_000_000


@every_model
def test_it_exports_and_agrees_with_pytorch(shipped: Callable[[str], Path], parity: Callable[[str], Report], name: str) -> None:
    assert Bundle.open(shipped(name)).manifest.provenance["checkpoint"] == f"demo/{name}"
    report = parity(name)
    assert report.failures == []
    assert all(case.same_tokens == case.tokens for case in report.sequences)


@every_model
def test_it_sees(shipped: Callable[[str], Path], name: str) -> None:
    """On scenes that no training has seen; `validation`, because `test` is for reports only. Without eyes: 32 %."""
    vlm = VLM.load(shipped(name))
    score = score_scenes(vlm, heldout_questions(80, "validation"))
    assert score.asked == dict.fromkeys(KINDS, 10)
    assert score.percent() > (80 if name == "llava" else 60)
    for aspect in ("wide", "tall") if name in ANY_ASPECT else ():
        assert score_scenes(vlm, heldout_questions(40, "validation", aspect)).percent() > 60


@pytest.mark.skipif(not SHIPPED, reason="no shipped model in this checkout (edgevlm/assets/demo)")
@pytest.mark.slow
def test_the_demo_runs(
    tmp_path: Path, shipped: Callable[[str], Path], parity: Callable[[str], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exports and verifications are those of the tests above; all that it does with them is done here."""

    def export(model: str, output: Path) -> None:
        assert (model, output.name) == (f"demo/{Path(model).name}", f"{Path(model).name}-float")
        shutil.copytree(shipped(Path(model).name), output)

    def verify(bundle: Path, against: str) -> Report:
        assert (bundle.is_dir(), bundle.name) == (True, f"{Path(against).name}-float")
        return parity(Path(against).name)

    monkeypatch.setattr("edgevlm.demo.export_bundle", export)
    monkeypatch.setattr("edgevlm.demo.verify_bundle", verify)
    shown = io.StringIO()
    run_demo(tmp_path / "demo", 16, Console(file=shown, width=200), SHIPPED)
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert set(summary) == {"scores", "wide_and_tall", "few_shot", "speed", "parity"}
    assert list(summary["wide_and_tall"]) == [
        "blind",
        *(f"{name} {kind}" for name in SHIPPED if name in ANY_ASPECT for kind in BUNDLES),
    ]
    made = [f"{name} {kind}" for name in SHIPPED for kind in BUNDLES]
    assert list(summary["scores"]) == ["blind", *made]
    assert list(summary["few_shot"]) == ([str(shots) for shots in SHOTS] if "flamingo" in SHIPPED else [])
    for name in made:
        assert set(summary["scores"][name]) == {*KINDS, "all"}
        assert summary["scores"][name]["all"] > summary["scores"]["blind"]["all"]
        assert all(value > 0 for value in summary["speed"][name].values())
        Bundle.open(tmp_path / "demo" / name.replace(" ", "-"))
    assert {name: report["passed"] for name, report in summary["parity"].items()} == dict.fromkeys(SHIPPED, True)
    assert (tmp_path / "demo" / "scene.png").is_file()
    assert QUESTIONS[0] in shown.getvalue()
    assert "exact match" in shown.getvalue()


@pytest.mark.parametrize("models", [["gpt"], ["llava", "gpt"], []])
def test_a_model_that_is_not_shipped(tmp_path: Path, models: list[str]) -> None:
    with pytest.raises(InputError, match=r"shipped models are llava, blip2, .*; (gpt|none) was asked for"):
        run_demo(tmp_path / "demo", 16, Console(file=io.StringIO()), models)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_replaces_nothing_but_bundles(tmp_path: Path) -> None:
    (tmp_path / "llava-int8").mkdir()
    (tmp_path / "llava-int8" / "diary.txt").write_text("mine")
    with pytest.raises(OutputError, match="llava-int8"):
        run_demo(tmp_path, 16, Console(file=io.StringIO()))
    assert (tmp_path / "llava-int8" / "diary.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="file"):
        run_demo(tmp_path / "file", 16, Console(file=io.StringIO()))
