"""`edgevlm plan` as a whole: the numbers hang together, advice fits, and a bad request is answered with a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tinies import Tiny

pytest.importorskip("torch")

from edgevlm.cli import main
from edgevlm.errors import InputError, MissingDependencyError
from edgevlm.plan.advice import Request
from edgevlm.plan.memory import BUILD_COPIES, RUNTIME_CPU, RUNTIME_GPU, TOKENIZER
from edgevlm.plan.outline import Outline, outline_checkpoint
from edgevlm.plan.report import plan_record, plot_memory
from edgevlm.plan.run import outline_model, parse_resolution, plan, plan_targets
from edgevlm.targets import find_target, load_targets, local_target

NANO = find_target("orin-nano-8gb")


@pytest.fixture(scope="module")
def llava7b() -> Outline:
    return outline_model("llava", recipe="int4")


@pytest.fixture(scope="module")
def qwen3() -> Outline:
    return outline_model("qwen3-vl")


# ------------------------------------------------------------------------------------------------ memory


def test_the_rows_add_up(llava7b: Outline) -> None:
    memory = plan(llava7b, NANO, Request(4096, 1)).memory
    assert sum(size for _, size in memory.rows()) == memory.answering == memory.total
    assert memory.weights == {name: part.size for name, part in llava7b.parts.items()}
    assert memory.kv_cache == 4096 * 2 * 32 * 4096 * 2
    assert memory.runtime == RUNTIME_GPU + int(TOKENIZER * llava7b.tokenizer)
    assert memory.building == BUILD_COPIES * llava7b.parts["decoder"].size + RUNTIME_GPU
    assert not memory.fits


def test_memory_follows_the_context_by_the_bytes_of_a_token(qwen3: Outline) -> None:
    thor = find_target("agx-thor")
    small, large = (plan(qwen3, thor, Request(context, 0)).memory for context in (1024, 9216))
    assert large.kv_cache - small.kv_cache == 8192 * qwen3.bytes_per_token == 8192 * 2 * 28 * 8 * 128 * 2
    assert large.weights == small.weights


def test_grouped_heads_are_counted_once(qwen3: Outline) -> None:
    assert qwen3.decoder.heads == 16
    assert qwen3.manifest.kv_cache.heads == 8


def test_on_the_cpu_what_loading_takes_counts(bundle: Path) -> None:
    outline = outline_model(str(bundle))
    memory = plan(outline, local_target(), Request(64, 1)).memory
    assert memory.runtime == RUNTIME_CPU + int(TOKENIZER * outline.tokenizer)
    assert memory.total == max(memory.answering, memory.building)
    assert memory.total > RUNTIME_CPU


def test_cross_attention_grows_by_pictures_not_by_context(tiny: Callable[[str], Tiny]) -> None:
    outline = outline_checkpoint(str(tiny("flamingo-every-second").checkpoint), "float16")
    one, three = (plan(outline, NANO, Request(32, images)).memory for images in (1, 3))
    assert three.cross_attention == 3 * one.cross_attention > 0
    assert plan(outline, NANO, Request(16, 1)).memory.cross_attention == one.cross_attention


def test_behind_an_encoder_the_prompt_is_in_cross_attention(tiny: Callable[[str], Tiny]) -> None:
    outline = outline_checkpoint(str(tiny("blip2-t5-tied").checkpoint), "float16")
    short, long = (plan(outline, NANO, Request(context, 1)).memory for context in (100, 400))
    assert long.cross_attention == 4 * short.cross_attention > 0


def test_pictures_of_any_size_cost_by_their_size(qwen3: Outline) -> None:
    small, large = (plan(qwen3, NANO, Request(4096, 1, size)) for size in ((320, 320), (1280, 960)))
    assert large.sight.places == 40 * 30
    assert large.memory.vision > 5 * small.memory.vision
    bounded = plan(qwen3, NANO, Request(4096, 1, (1280, 960), 100))
    assert bounded.sight.places <= 100


# ------------------------------------------------------------------------------------------------- speed


def test_decoding_reads_weights_and_cache(llava7b: Outline) -> None:
    orin = find_target("agx-orin-64gb")
    speeds = [plan(llava7b, orin, Request(context, 1)).speed for context in (1024, 4096)]
    assert speeds[0].tokens_per_second > speeds[1].tokens_per_second  # type: ignore[operator]
    read = llava7b.parts["decoder"].size + 4096 * llava7b.bytes_per_token
    assert speeds[1].decode == pytest.approx(read / (204.8e9 * 0.84) + 32 * 50e-6)
    assert speeds[1].calibrated


def test_what_is_not_known_is_not_predicted(llava7b: Outline) -> None:
    turing = plan(llava7b, find_target("rtx-2080-ti"), Request(1024, 1)).speed
    assert turing.first_token is None
    assert turing.tokens_per_second is not None
    assert not turing.calibrated
    assert plan(llava7b, local_target(), Request(1024, 1)).speed.decode is None


# ------------------------------------------------------------------------------------------------ advice


def test_advice_fits_and_what_loses_least_comes_first(qwen3: Outline) -> None:
    made = plan(qwen3, NANO, Request(32768, 1, (640, 480)))
    assert not made.memory.fits
    assert made.options
    assert all(option.fits and option.total <= NANO.usable for option in made.options)
    assert [option.loss for option in made.options] == sorted(option.loss for option in made.options)
    changes = [option.change for option in made.options]
    assert len(set(changes)) == len(changes)
    sets = [set(option.changes) for option in made.options]
    assert not any(one < other for one in sets for other in sets)
    assert any("INT8 KV cache" in change for change in changes)


def test_where_nothing_fits_the_nearest_is_shown(llava7b: Outline) -> None:
    made = plan(llava7b, find_target("orin-nano-4gb"), Request(4096, 1))
    assert len(made.options) == 1
    assert not made.options[0].fits
    assert made.options[0].total < made.memory.total


def test_what_fits_needs_no_advice(qwen3: Outline) -> None:
    assert plan(qwen3, find_target("agx-thor"), Request(4096, 1)).options == ()


# --------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize("text", ["", "1280", "1280*960", "axb", "0x10", "-5x10", "1280x", "1280x960x3", "99999x10", "1e3x10"])
def test_a_resolution_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match="is not WIDTHxHEIGHT in pixels"):
        parse_resolution(text)


def test_resolutions() -> None:
    assert parse_resolution("1280x960") == parse_resolution(" 1280 X 960 ") == parse_resolution("1280×960") == (1280, 960)
    assert parse_resolution(None) is None


@pytest.mark.parametrize("context", [-1, 0, 4097, 10**9])
def test_a_context_that_the_model_does_not_have(llava7b: Outline, context: int) -> None:
    with pytest.raises(InputError, match=r"it is 1 to 4,096, the context length of llava-hf/llava-1.5-7b-hf"):
        plan(llava7b, NANO, Request(context, 1))


def test_pictures_that_leave_no_room(llava7b: Outline) -> None:
    with pytest.raises(InputError, match=r"3 pictures take 1,728 places, and the context asked for is 1,024"):
        plan(llava7b, NANO, Request(1024, 3))
    with pytest.raises(InputError, match=r"The number of images is -1; it is 0 or more"):
        plan(llava7b, NANO, Request(1024, -1))


# -------------------------------------------------------------------------------------- the command line


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_newcomer_asks_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "llava", "--target", "orin-nano-8gb", "--recipe", "int4")
    assert code == 1
    assert "llava-hf/llava-1.5-7b-hf on Jetson Orin Nano 8 GB" in out
    assert "does not fit" in out
    assert "first token" in out


def test_what_fits_ends_with_0(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    code, out, _ = run(capsys, str(bundle), "--target", "rtx-4090", "--context", "64", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["fits"] is True
    assert record["target"] == "rtx-4090"
    memory = record["memory"]
    parts = ("kv_cache", "cross_attention", "features", "vision", "prefill", "runtime")
    assert memory["answering"] == sum(memory["weights"].values()) + sum(memory[part] for part in parts)


def test_all_targets(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    code, out, _ = run(capsys, str(bundle), "--all-targets", "--context", "64")
    assert code == 0
    assert all(f"\n{name} " in out for name in load_targets())
    code, out, _ = run(capsys, str(bundle), "--all-targets", "--context", "64", "--json")
    assert [record["target"] for record in json.loads(out)] == list(load_targets())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--target", "toaster"), "The target 'toaster' is not known"),
        (("--context", "-3"), "The context asked for is -3"),
        (("--resolution", "wide"), "The resolution 'wide' is not WIDTHxHEIGHT"),
        (("--images", "-1"), "The number of images is -1; it is 0 or more"),
        (("--recipe", "int4"), "is a bundle, whose weights are what they are"),
        (("--all-targets", "--target", "gb10"), "give no --target or --plot with it"),
        (("--visual-tokens", "8"), "gives every picture"),
        (("--plot", "memory.txt"), "ends in .txt; it is one of .png, .svg, .pdf"),
    ],
)
def test_a_bad_request_ends_with_2(
    capsys: pytest.CaptureFixture[str], bundle: Path, arguments: tuple[str, ...], text: str
) -> None:
    code, out, err = run(capsys, str(bundle), "--context", "64", *arguments)
    assert code == 2
    assert text in err
    assert not out


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_a_plot_of_memory_against_context(bundle: Path, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    made = plan(outline_model(str(bundle)), NANO, Request(64, 1))
    path = plot_memory(made, tmp_path / f"memory{ending}")
    assert path.stat().st_size > 4000


def test_without_matplotlib_the_extra_is_named(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = plan(outline_model(str(bundle)), NANO, Request(64, 1))
    with pytest.raises(MissingDependencyError, match=r"pip install 'edgevlm\[eval\]'"):
        plot_memory(made, tmp_path / "memory.png")


def test_a_record_names_its_sources(bundle: Path) -> None:
    record = plan_record(plan_targets(outline_model(str(bundle)), [NANO], Request(64, 1))[0])
    assert record["sources"]
    assert all(source["url"].startswith("https://") for source in record["sources"])
