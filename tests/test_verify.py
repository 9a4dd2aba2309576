"""Verification: passes what is right, reports the drift of what is lossy, refuses or fails what does not belong together."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tinies import Tiny
from tiny import LLAVAS, make_llava

from edgevlm.bundle import Bundle
from edgevlm.errors import BundleError, CheckpointError, IntegrityError
from edgevlm.verify import LIMITS, TOKENS, Report, verify_bundle

PARTS = ["vision_encoder", "projector", "embed_tokens", "decoder"]
CASES = [
    "one picture", "wide picture", "two pictures", "no picture", "tiny picture", "interleaved", "short prompt",
    "long prompt, 12 times", "batch of 2: wide picture", "batch of 2: no picture",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def verify(llava: Callable[[str], Tiny], tmp_path: Path) -> Callable[..., tuple[Report, Path]]:
    """Verifies a copy of a tiny export, since it writes a report into it."""

    def run(name: str, against: Path | None = None) -> tuple[Report, Path]:
        copy = tmp_path / "bundle"
        shutil.copytree(llava(name).bundle, copy)
        return verify_bundle(copy, str(against or llava(name).checkpoint)), copy

    return run


def check_written(report: Report, bundle: Path) -> dict[str, Any]:
    """The report is in the bundle, is what was returned, and leaves the bundle whole."""
    written = json.loads((bundle / "reports" / "parity.json").read_text(encoding="utf-8"))
    assert written == report.to_dict()
    assert [check["part"] for check in written["parts"]] == PARTS
    assert [check["case"] for check in written["sequences"]] == CASES
    assert Bundle.open(bundle, check_files=True).manifest.files
    return written


@pytest.mark.parametrize("name", ["clip-llama", "clip-mistral-window", "siglip-qwen2"])
def test_a_float_bundle_agrees_with_pytorch(verify: Callable[..., tuple[Report, Path]], name: str) -> None:
    report, bundle = verify(name)
    assert report.failures == []
    assert report.kind == "float32"
    assert report.notes == []
    written = check_written(report, bundle)
    assert (written["passed"], written["preprocessing"]) == (True, [])
    assert all(check.max_abs < 1e-3 * max(1, check.peak) for check in report.parts)
    for case in report.sequences:
        assert (case.same_tokens, case.tokens, case.top1) == (TOKENS, TOKENS, 1.0), case
        assert case.max_abs < 1e-3, case
        assert case.cosine > 0.99999, case
    lengths = {case.case: case.prompt_tokens for case in report.sequences}
    assert lengths["long prompt, 12 times"] > 5 * lengths["no picture"]
    assert lengths["interleaved"] > lengths["two pictures"] > lengths["one picture"]


LOSSY = {"float16": ("fp16", None), "int8": ("fp32", "int8"), "int4": ("fp32", "int4")}


@pytest.fixture(scope="module")
def lossy(llava: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Report, Path]]:
    """The report on a lossy bundle, made once for each kind."""

    @functools.cache
    def run(kind: str) -> tuple[Report, Path]:
        tiny, copy = llava(LLAVAS[0].name), tmp_path_factory.mktemp("lossy") / kind
        shutil.copytree(tiny.export(*LOSSY[kind]), copy)
        return verify_bundle(copy, str(tiny.checkpoint)), copy

    return run


@pytest.mark.parametrize("kind", LOSSY)
def test_a_lossy_bundle_has_a_drift(lossy: Callable[[str], tuple[Report, Path]], kind: str) -> None:
    recipe = LOSSY[kind][1]
    report, bundle = lossy(kind)
    check_written(report, bundle)
    assert report.kind == kind
    kinds = {check.part: check.kind for check in report.parts}
    assert kinds["decoder"] == kind
    assert kinds["vision_encoder"] == ("int8" if recipe else kind)  # int4 keeps the vision side at eight bits
    assert set(report.limits) == set(kinds.values())
    assert report.limits[kind]["cosine"] == LIMITS[kind].cosine
    decoder = next(check for check in report.parts if check.part == "decoder")
    assert decoder.max_abs > 1e-4  # it is lossy, and that is said
    assert decoder.cosine > LIMITS[kind].cosine
    assert all(0 <= case.top1 <= 1 and 0 <= case.same_tokens <= TOKENS for case in report.sequences)
    assert report.preprocessing == []


def test_four_bits_drift_further_than_eight(lossy: Callable[[str], tuple[Report, Path]]) -> None:
    cosine = {kind: next(c.cosine for c in lossy(kind)[0].parts if c.part == "decoder") for kind in ("int8", "int4")}
    assert cosine["int4"] < cosine["int8"] < 1


def test_other_weights_fail_by_name(verify: Callable[..., tuple[Report, Path]], tmp_path: Path) -> None:
    other = make_llava(tmp_path / "other", LLAVAS[0], seed=1)
    report, bundle = verify(LLAVAS[0].name, against=other)
    assert {f"part {part}" for part in PARTS} <= set(report.failures)
    assert {f"case {case}" for case in CASES} <= set(report.failures)
    assert check_written(report, bundle)["passed"] is False


def test_one_wrong_part_is_named_alone(verify: Callable[..., tuple[Report, Path]], checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    changed = tmp_path / "changed"
    shutil.copytree(checkpoint, changed)
    weights = load_file(changed / "model.safetensors")
    name = next(n for n in weights if "multi_modal_projector.linear_1.weight" in n)
    weights[name] = weights[name] * 1.1
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    report, _ = verify(LLAVAS[0].name, against=changed)
    assert [failure for failure in report.failures if failure.startswith("part ")] == ["part projector"]
    assert "case no picture" not in report.failures


def test_other_preprocessing_is_named(verify: Callable[..., tuple[Report, Path]], checkpoint: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(checkpoint, changed)
    config = json.loads((changed / "processor_config.json").read_text())
    config["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    (changed / "processor_config.json").write_text(json.dumps(config))
    report, _ = verify(LLAVAS[0].name, against=changed)
    assert "pixel values of 'one picture'" in report.failures
    assert not any(failure.startswith("part ") for failure in report.failures)


@pytest.mark.parametrize("name", ["odd-widths", "clip-llama-gqa-bias", "siglip-llama-default"])
def test_a_checkpoint_of_other_dimensions_is_refused(
    verify: Callable[..., tuple[Report, Path]], llava: Callable[[str], Tiny], name: str
) -> None:
    with pytest.raises(CheckpointError, match="dimensions"):
        verify(LLAVAS[0].name, against=llava(name).checkpoint)


def test_what_cannot_be_compared_is_refused(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    with pytest.raises(CheckpointError, match="nothing"):
        verify_bundle(copy, str(tmp_path / "nothing"))
    with pytest.raises(BundleError, match="nothing"):
        verify_bundle(tmp_path / "nothing", str(checkpoint))
    manifest = (copy / "edgevlm.json").read_text()
    (copy / "edgevlm.json").write_text(manifest.replace('"family": "llava"', '"family": "other"'))
    with pytest.raises(CheckpointError, match="family other"):
        verify_bundle(copy, str(checkpoint))
    (copy / "edgevlm.json").write_text(manifest)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        verify_bundle(copy, str(checkpoint))
    assert not (copy / "reports").exists()
