"""Tuning a tiny bundle: real steps once, then a model whose losses are known, interrupted and resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from edgevlm.bundle import Bundle
from edgevlm.calibration import load_calibration
from edgevlm.cli import main
from edgevlm.errors import InputError, OutputError, RecipeError
from edgevlm.evaluation.records import Outcome
from edgevlm.evaluation.run import evaluate
from edgevlm.evaluation.suites import SuiteSpec, load_suite
from edgevlm.quant import quantize
from edgevlm.quant.recipe import RECIPES, Recipe, Rule, load_recipe
from edgevlm.tune import groups, run
from edgevlm.tune.report import describe_tuned, recipe_to_toml, write_tuned
from edgevlm.tune.run import Tuned, tune
from edgevlm.vlm import VLM

SPEC = SuiteSpec("scenes", limit=200)
FEW = SuiteSpec("scenes", limit=3)


@pytest.fixture(scope="module")
def float_bundle(tiny: Callable[[str], Any]) -> str:
    return str(tiny("clip-llama").bundle)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates that need no samples."""
    monkeypatch.setattr(groups, "CANDIDATES", {"int8": Rule("int8"), "int4": Rule("int4")})
    monkeypatch.setattr(run, "CANDIDATES", groups.CANDIDATES)


class World:
    """Stands for evaluating and timing. A step loses what its groups lose, and `together` for each two of four-bit groups; a
    megabyte less makes an answer a millisecond faster, but for the vision encoder."""

    def __init__(self) -> None:
        self.lost = {"mlp": 4, "self_attn": 1, "lm_head": 3, "vision": 6, "multi_modal_projector": 0}
        self.together = 0
        self.asked: list[str] = []
        self.stop_after = math.inf

    def evaluate(self, sources: list[str], spec: SuiteSpec, output: Any, settings: Any, **_: Any) -> Any:
        (source,) = sources
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(source)
        suite, manifest = load_suite(spec), Bundle.open(source, check_files=False).manifest
        recipe, wrong = manifest.recipe, 0
        if recipe is not None:
            weights = list(_weights_of(Path(source)))
            four, eight = ([name for name in weights if name.endswith(end)] for end in (".int4", ".int8"))
            modules = [name for name in self.lost if any(name in weight for weight in four)]
            wrong = sum(self.lost[name] for name in modules) + self.together * (len(modules) > 1) * len(modules)
            wrong -= 1 * any("embed_tokens" in name for name in eight)
        scores = {item.id: float(number >= 20 + wrong) for number, item in enumerate(suite.items)}
        size = sum(part.size for part in manifest.parts.values())
        (subject,) = run_subjects([source])
        subject = dataclasses.replace(subject, size=size)
        mean = 100 * sum(scores.values()) / len(scores)
        return suite, [Outcome(subject, suite.name, {}, scores, {"exact match": mean})]

    def measure_speed(self, folders: dict[str, Path], rounds: int, *, load: Any) -> dict[str, dict[str, float]]:
        def speed(folder: Path) -> dict[str, float]:
            parts = Bundle.open(folder, check_files=False).manifest.parts
            size = sum(part.size for name, part in parts.items() if name != "vision_encoder")
            return {"first_token": 50 + size / 1e4, "tokens_per_second": 100.0, "vision": 1.0, "prefill": 1.0}

        return {name: speed(folder) for name, folder in folders.items()}


def run_subjects(sources: list[str]) -> Any:
    from edgevlm.evaluation.subjects import describe_subjects

    return describe_subjects(sources)


def _weights_of(bundle: Path) -> Iterator[str]:
    from edgevlm.graphs import load_graph

    opened = Bundle.open(bundle, check_files=False)
    for part in opened.manifest.parts:
        yield from load_graph(opened.part_path(part)).graph.initializers


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles that were made before."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, plain: None, shelf: Path) -> World:
    def quantize_once(source: str | Path, output: Path, recipe: Recipe, **_: Any) -> None:
        key = hashlib.sha256(f"{source} {recipe}".encode()).hexdigest()
        if not (shelf / key).exists():
            quantize.quantize_bundle(source, shelf / key, recipe)
        shutil.copytree(shelf / key, output)

    made = World()
    monkeypatch.setattr(run, "quantize_bundle", quantize_once)
    monkeypatch.setattr(run, "evaluate", made.evaluate)
    monkeypatch.setattr(run, "measure_speed", made.measure_speed)
    return made


def of(tuned: Tuned) -> dict[str, str]:
    """What became of each group."""
    rule = {weight.name: tuned.recipe.rule_for(weight.part, weight.name).method for g in tuned.groups for weight in g.weights}
    return {group.name: rule[group.weights[0].name] for group in tuned.groups}


# ------------------------------------------------------------------------------------------------- for real


def test_tuning_a_bundle(float_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the candidates as they are, real answers and times, twice."""
    few = ["projector", "decoder attention, last layers", "vision_encoder last layers"]
    monkeypatch.setattr(run, "find_groups", lambda weights: [g for g in groups.find_groups(weights) if g.name in few])
    said: list[str] = []
    options: Any = {"calibration": load_calibration(samples=2), "max_drop": 100.0, "stage": said.append}
    tuned = tune(float_bundle, tmp_path / "out", FEW, **options)
    assert sorted((s.group, s.candidate) for s in tuned.steps) == [
        (few[1], "int4"), (few[1], "int8"), (few[0], "int4"), (few[0], "int8"), (few[2], "int4"), (few[2], "int8"),
        (few[2], "w8a8"),
    ]  # fmt: skip
    assert all(not s.error and s.size < tuned.size and s.latency > 0 and math.isfinite(s.drop) for s in tuned.steps)
    assert tuned.chosen is not None
    assert tuned.chosen.size == min(s.size for s in tuned.combined)
    paths = write_tuned(tuned, tmp_path / "out")
    recipe = load_recipe(paths[0])
    assert recipe == tuned.recipe
    quantize.quantize_bundle(float_bundle, tmp_path / "again", recipe, calibration=load_calibration(samples=2))
    made = Bundle.open(tmp_path / "out" / "bundle")
    assert made.manifest.files == Bundle.open(tmp_path / "again").manifest.files
    assert VLM.load(tmp_path / "out" / "bundle").generate("How many?", max_new_tokens=2).text is not None
    assert not (tmp_path / "out" / "steps").exists()
    found = json.loads(paths[1].read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [step["name"] for step in found["steps"]] == [step.name for step in tuned.steps]
    page = paths[2].read_text()
    assert "<svg" in page
    assert "://" not in page
    # The second time nothing is asked, made or measured.
    record = (tmp_path / "out" / "steps.jsonl").read_bytes()
    said.clear()
    monkeypatch.setattr(run, "quantize_bundle", lambda *_, **__: pytest.fail("made again"))
    again = tune(float_bundle, tmp_path / "out", FEW, **options)
    assert again == tuned
    assert (tmp_path / "out" / "steps.jsonl").read_bytes() == record
    assert not any(text.startswith("asking") for text in said)
    assert any("steps were measured before" in text for text in said)


def test_command_line(
    float_bundle: str, tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["tune", float_bundle, "--limit", "200", "--output", str(out), "--max-drop", "1.2"]
    world.stop_after = 4
    assert main(command) == 130
    assert f"interrupted; the steps so far are in {out}; the same command goes on with them" in capsys.readouterr().err
    world.stop_after = math.inf
    assert main(command) == 0
    said = capsys.readouterr()
    assert "decoder attention, first layers as int4" in said.out
    assert "of float" in said.out
    assert f"{out / 'recipe.toml'} is the recipe" in said.err
    load_recipe(out / "recipe.toml")
    assert (out / "tune.html").is_file()
    assert main(["tune", float_bundle, "--limit", "200", "--output", str(out), "--max-drop", "-1"]) == 2
    assert "The drop allowed is -1.0" in capsys.readouterr().err
    for option, said_of in (("--split", "list of questions"), ("--max-new-tokens", "way of asking")):
        assert main([*command, option, {"--split": "validation"}.get(option, "5")]) == 2
        assert said_of in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- choosing


def test_smallest_within_the_limit(float_bundle: str, tmp_path: Path, world: World) -> None:
    tuned = tune(float_bundle, tmp_path / "out", SPEC, max_drop=1.0)
    assert tuned.chosen is not None
    chosen = of(tuned)
    # Half a point a question: attention costs 0.5, the head 1.5, MLPs 2, the vision encoder 3; the tables bring 0.5 back.
    assert chosen["projector"] == "int4"
    assert chosen["decoder attention, first layers"] == chosen["decoder attention, last layers"] == "int4"
    assert {chosen[name] for name in chosen if "vision" in name or "mlp" in name} == {"int8"}
    assert tuned.chosen.drop <= 1.0
    assert tuned.chosen.size == min(s.size for s in tuned.combined if s.drop <= 1.0)
    made = Bundle.open(tmp_path / "out" / "bundle").manifest
    assert sum(part.size for part in made.parts.values()) == tuned.chosen.size
    assert made.recipe is not None
    assert made.recipe["name"] == "tuned"


def test_backs_off_until_what_is_measured_is_within(float_bundle: str, tmp_path: Path, world: World) -> None:
    alone = tune(float_bundle, tmp_path / "alone", SPEC, max_drop=3.0)
    world.together = 3
    tuned = tune(float_bundle, tmp_path / "out", SPEC, max_drop=3.0)
    assert tuned.steps[0] == dataclasses.replace(alone.steps[0], seconds=tuned.steps[0].seconds)
    assert tuned.combined[0].drop > 3.0, "the first guess adds losses up, which these do not"
    assert len(tuned.combined) > 1
    assert tuned.chosen is not None
    assert tuned.chosen.drop <= 3.0
    assert tuned.chosen.size > alone.chosen.size  # type: ignore[union-attr]


def test_fastest(float_bundle: str, tmp_path: Path, world: World) -> None:
    smallest = tune(float_bundle, tmp_path / "out", SPEC, max_drop=1.0)
    count = len(world.asked)
    fastest = tune(float_bundle, tmp_path / "out", SPEC, max_drop=1.0, target="latency")
    assert len(world.asked) - count <= 1 + len(fastest.combined), "single steps were measured before"
    assert fastest.steps == smallest.steps
    assert {of(fastest)[name] for name in of(fastest) if "vision" in name} == {"float"}, "smaller, and not faster"
    assert fastest.chosen is not None
    assert fastest.chosen.faster == max(s.faster for s in fastest.combined if s.drop <= 1.0) > 0
    assert "ms" in describe_tuned(fastest)


def test_nothing_within_the_limit(float_bundle: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "candidates_of", lambda group: ["int4"] if all(w.linear for w in group.weights) else [])
    world.lost = dict.fromkeys(world.lost, 9)
    tuned = tune(float_bundle, tmp_path / "out", SPEC, max_drop=1.0)
    assert tuned.chosen is None
    assert [step.name for step in tuned.combined] == ["the best one alone"]
    assert not (tmp_path / "out" / "bundle").exists()
    paths = write_tuned(tuned, tmp_path / "out")
    assert load_recipe(paths[0]).rules == (Rule("float"),)
    assert "everything stays float" in paths[2].read_text()
    # A larger drop later is served from the same steps.
    assert tune(float_bundle, tmp_path / "out", SPEC, max_drop=5.0).chosen is not None
    assert (tmp_path / "out" / "bundle").is_dir()


def test_step_that_cannot_be_made(float_bundle: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = quantize.quantize_bundle

    def refuses(source: Any, output: Any, recipe: Any, **options: Any) -> Any:
        if any(rule.parts == "projector" for rule in recipe.rules):
            raise RecipeError("its projector is <too> small")
        return real(source, output, recipe, **options)

    monkeypatch.setattr(run, "quantize_bundle", refuses)
    tuned = tune(float_bundle, tmp_path / "out", SPEC, max_drop=1.0)
    failed = [step for step in tuned.steps if step.error]
    assert {step.group for step in failed} == {"projector"}
    assert of(tuned)["projector"] == "float"
    assert "not possible" in (page := write_tuned(tuned, tmp_path / "out")[2].read_text())
    assert "&lt;too&gt;" in page
    again = tune(float_bundle, tmp_path / "out", SPEC, max_drop=1.0)
    assert again.chosen == tuned.chosen

    def refuses_all(*_: Any, **__: Any) -> Any:
        raise RecipeError("no disk")

    monkeypatch.setattr(run, "quantize_bundle", refuses_all)
    with pytest.raises(RecipeError, match=r"Nothing of .* could be quantized\. no disk"):
        tune(float_bundle, tmp_path / "other", SPEC)


# -------------------------------------------------------------------------------------------------- resuming


def test_interrupted_tuning_goes_on(float_bundle: str, tmp_path: Path, world: World) -> None:
    whole = tune(float_bundle, tmp_path / "whole", SPEC, max_drop=2.0)
    once = list(world.asked)
    for stop in (1, 7, len(once) - 1):
        out = tmp_path / f"stopped-{stop}"
        world.asked, world.stop_after = [], stop
        with pytest.raises(KeyboardInterrupt):
            tune(float_bundle, out, SPEC, max_drop=2.0)
        world.stop_after = math.inf
        resumed = tune(float_bundle, out, SPEC, max_drop=2.0)
        assert {s.name: s.drop for s in resumed.steps} == {s.name: s.drop for s in whole.steps}
        assert resumed.recipe == whole.recipe
        steps = [Path(source).name for source in world.asked if "steps" in source]
        assert len(steps) == len(set(steps)), "no step twice"
        assert len(steps) == len(once) - 1


def test_step_interrupted_between_answers(
    float_bundle: str, tmp_path: Path, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bundle is not made again, and its answers are not asked for again."""
    monkeypatch.setattr(run, "measure_speed", World().measure_speed)
    monkeypatch.setattr(run, "find_groups", lambda weights: [g for g in groups.find_groups(weights) if g.name == "projector"])
    made: list[str] = []
    real, count = quantize.quantize_bundle, 0

    def quantizes(source: Any, output: Any, recipe: Any, **options: Any) -> Any:
        made.append(Path(output).name)
        return real(source, output, recipe, **options)

    def step(name: str, done: int, total: int) -> None:
        nonlocal count
        count += done > 0 and "projector" in name
        if count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "quantize_bundle", quantizes)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        tune(float_bundle, out, FEW, step=step)
    (answers,) = (out / "answers" / "scenes").glob("projector-as-int8*")
    before = answers.read_bytes()
    tune(float_bundle, out, FEW, max_drop=100.0)
    assert answers.read_bytes().startswith(before)
    assert len(before.splitlines()) > 2
    assert len(made) == len(set(made))


def test_last_line_cut_short(float_bundle: str, tmp_path: Path, world: World) -> None:
    tune(float_bundle, tmp_path / "out", SPEC)
    record = tmp_path / "out" / "steps.jsonl"
    whole = record.read_bytes()
    lines = whole.splitlines(keepends=True)
    record.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    world.asked.clear()
    tune(float_bundle, tmp_path / "out", SPEC)
    assert len(record.read_bytes().splitlines()) == len(lines)
    assert len(world.asked) == 1 + len(lines) - 5


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"key": "x", "name": "a"}', b'{"key": 1, "other": 2, "interval": [0, 1]}'])
def test_damaged_record(float_bundle: str, tmp_path: Path, world: World, line: bytes) -> None:
    world.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        tune(float_bundle, tmp_path / "out", SPEC)
    record = tmp_path / "out" / "steps.jsonl"
    lines = record.read_bytes().splitlines()
    record.write_bytes(b"\n".join([lines[0], line, *lines[1:]]) + b"\n")
    with pytest.raises(OutputError, match=r"steps\.jsonl is damaged in line 2.*--force to begin anew"):
        tune(float_bundle, tmp_path / "out", SPEC)
    world.stop_after = math.inf
    assert tune(float_bundle, tmp_path / "out", SPEC, force=True).chosen is not None


def test_steps_of_something_else(float_bundle: str, tmp_path: Path, world: World, tiny: Callable[[str], Any]) -> None:
    world.stop_after = 2  # after the float bundle and a step
    with pytest.raises(KeyboardInterrupt):
        tune(float_bundle, tmp_path / "out", SPEC)
    world.stop_after = 0
    other = str(tiny("clip-llama-gqa-bias").bundle)
    for source, spec, options, said in (
        (float_bundle, SuiteSpec("scenes", limit=7), {}, "another list of questions"),
        (float_bundle, SuiteSpec("pope-scenes", limit=7), {}, "another suite and list of questions"),
        (float_bundle, SPEC, {"calibration": load_calibration(samples=1)}, "another calibration"),
        (float_bundle, SPEC, {"settings": run.Settings(max_new_tokens=3)}, "another way of asking"),
        (other, SPEC, {}, "another model"),
    ):
        with pytest.raises(OutputError, match=f"measured with {said}.*--force to begin anew"):
            tune(source, tmp_path / "out", spec, **options)  # type: ignore[arg-type]


def test_what_failed_before_any_step_can_be_put_right(
    float_bundle: str, tmp_path: Path, world: World, tiny: Callable[[str], Any]
) -> None:
    world.stop_after = 0
    for settings in (run.Settings(max_new_tokens=3), run.Settings(max_new_tokens=4)):
        with pytest.raises(KeyboardInterrupt):
            tune(float_bundle, tmp_path / "out", SPEC, settings=settings)
    (tmp_path / "out" / "float").mkdir()  # of a model, which the next one might take for its own
    with pytest.raises(KeyboardInterrupt):
        tune(float_bundle, tmp_path / "out", SPEC)
    with pytest.raises(OutputError, match="another model"):
        tune(str(tiny("clip-llama-gqa-bias").bundle), tmp_path / "out", SPEC)


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("drop", [-0.1, math.nan, math.inf, "much"])
def test_drop_that_is_none(float_bundle: str, tmp_path: Path, drop: Any) -> None:
    with pytest.raises(InputError, match=r"The drop allowed is .*; it is a number of points, 0 or more"):
        tune(float_bundle, tmp_path / "out", SPEC, max_drop=drop)
    assert not (tmp_path / "out").exists()


def test_unknown_target(float_bundle: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no target 'beauty'; there are size, latency"):
        tune(float_bundle, tmp_path / "out", SPEC, target="beauty")


def test_quantized_bundle(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"already quantized with the recipe 'int8'\. Tune the float bundle"):
        tune(str(tiny("clip-llama").export(recipe="int8")), tmp_path / "out", SPEC)
    assert not (tmp_path / "out").exists()


def test_folder_of_something_else(float_bundle: str, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"holds something else than a tuning \(it has no steps\.jsonl\)"):
        tune(float_bundle, tmp_path, SPEC, force=True)
    assert (tmp_path / "letter.txt").read_text() == "dear"
    with pytest.raises(OutputError, match="cannot be written"):
        tune(float_bundle, tmp_path / "letter.txt", SPEC)


def test_two_at_once(float_bundle: str, tmp_path: Path, world: World) -> None:
    def begins_another(text: str) -> None:
        if text.startswith("step 1 "):
            with pytest.raises(OutputError, match="being written by another run"):
                tune(float_bundle, tmp_path / "out", SPEC)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(float_bundle, tmp_path / "out", SPEC, stage=begins_another)


@pytest.mark.usefixtures("traced_once")
def test_a_model_is_exported_once(
    tiny: Callable[[str], Any], tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = str(tiny("clip-llama").checkpoint)
    world.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        tune(checkpoint, tmp_path / "out", SPEC)
    assert Bundle.open(tmp_path / "out" / "float").manifest.recipe is None
    monkeypatch.setattr("edgevlm.export.export.export_bundle", lambda *_, **__: pytest.fail("exported again"))
    world.stop_after = math.inf
    assert tune(checkpoint, tmp_path / "out", SPEC).chosen is not None


def test_recipe_files(tmp_path: Path) -> None:
    odd = Recipe('a "b" \\ ü\n\x7f', (Rule("int8", 'x["]*', "w\t*"), Rule("w8a8", smooth=0.25, optional=True)), "int8")
    for recipe in (*RECIPES.values(), odd):
        path = tmp_path / "recipe.toml"
        path.write_text(recipe_to_toml(recipe, "first line\n\nthird, with [[rules]]"), encoding="utf-8")
        assert load_recipe(path) == recipe


def test_fake_and_real_agree(float_bundle: str, tmp_path: Path) -> None:
    """What the tests above stand in for has this form."""
    suite, outcomes = evaluate([float_bundle], FEW, tmp_path)
    assert (suite.name, next(iter(outcomes[0].metrics)), len(outcomes[0].scores)) == ("scenes", "exact match", 3)
