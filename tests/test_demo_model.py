"""The shipped model: small, exportable, and able to see."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from edgevlm.bundle import Bundle
from edgevlm.demo import QUESTIONS, run_demo
from edgevlm.errors import OutputError
from edgevlm.evaluate import score_scenes
from edgevlm.export.checkpoint import ASSETS
from edgevlm.export.export import export_bundle
from edgevlm.scenes import KINDS, heldout_questions
from edgevlm.verify import verify_bundle
from edgevlm.vlm import VLM

FOLDER = ASSETS / "demo" / "llava"
shipped = pytest.mark.skipif(not FOLDER.is_dir(), reason="no shipped model in this checkout (edgevlm/assets/demo/llava)")


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "bundle"
    export_bundle("demo/llava", output)
    return output


@shipped
def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 8_000_000


@shipped
def test_it_exports_and_agrees_with_pytorch(demo_bundle: Path) -> None:
    assert Bundle.open(demo_bundle).manifest.provenance["checkpoint"] == "demo/llava"
    report = verify_bundle(demo_bundle, "demo/llava")
    assert report.failures == []
    assert all(case.same_tokens == case.tokens for case in report.sequences)


@shipped
def test_it_sees(demo_bundle: Path) -> None:
    """On scenes that no training has seen; `validation`, because `test` is for reports only."""
    score = score_scenes(VLM.load(demo_bundle), heldout_questions(80, "validation"))
    assert score.asked == dict.fromkeys(KINDS, 10)
    assert score.percent() > 80


@shipped
@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path) -> None:
    shown = io.StringIO()
    run_demo(tmp_path / "demo", 16, Console(file=shown, width=140))
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert set(summary) == {"scores", "speed", "parity"}
    assert set(summary["scores"]) == {"blind", "float", "int8", "int4"}
    for name in ("float", "int8", "int4"):
        assert set(summary["scores"][name]) == {*KINDS, "all"}
        assert summary["scores"][name]["all"] > summary["scores"]["blind"]["all"]
        assert all(value > 0 for value in summary["speed"][name].values())
        Bundle.open(tmp_path / "demo" / f"llava-{name}")
    assert summary["parity"]["passed"] is True
    assert (tmp_path / "demo" / "scene.png").is_file()
    assert QUESTIONS[0] in shown.getvalue()
    assert "exact match" in shown.getvalue()


def test_the_demo_replaces_nothing_but_bundles(tmp_path: Path) -> None:
    (tmp_path / "llava-int8").mkdir()
    (tmp_path / "llava-int8" / "diary.txt").write_text("mine")
    with pytest.raises(OutputError, match="llava-int8"):
        run_demo(tmp_path, 16, Console(file=io.StringIO()))
    assert (tmp_path / "llava-int8" / "diary.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="file"):
        run_demo(tmp_path / "file", 16, Console(file=io.StringIO()))
