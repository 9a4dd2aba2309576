"""The ablation: one group of weights changed at a time, every step kept as it ends, then the best recipe within the drop.

    OUTPUT/steps.jsonl      the first line says what was measured and how; then a line a step, in the order in which they ended
    OUTPUT/answers/         what the model and each step answered, question by question
    OUTPUT/float/           the model's float bundle, where a model was given and not a bundle
    OUTPUT/recipe.toml      the result: `edgevlm quantize --recipe` takes it
    OUTPUT/bundle/          the bundle that it makes
    OUTPUT/tune.json, tune.html

1. The float bundle answers the suite. So does a bundle for each group and candidate, in which nothing else is quantized.
2. Every step is compared with the float bundle on the same questions; speed is measured in turns with it, on new pictures.
3. Changes are put in order by what they save for a lost point (`choice`). How many of them are made together is measured: the
   first guess is as many as are within the limit if losses add up.
4. Of all that was measured and is within the limit, the smallest (or fastest) is the result.

A step that ended is never done again, also with another limit or target; one that was interrupted goes on with its answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..bundle import MANIFEST, Bundle
from ..errors import InputError, OutputError, RecipeError
from ..evaluation.records import Outcome
from ..evaluation.run import evaluate
from ..evaluation.statistics import compare_outcomes, group_by_picture
from ..evaluation.subjects import Settings, digest_subject, is_bundle
from ..evaluation.suites import Suite, SuiteSpec, load_suite
from ..quant.quantize import Calibration, quantize_bundle
from ..quant.recipe import Recipe, Rule
from ..speed import measure_speed
from ..vlm import VLM
from .choice import Move, Option, apply_moves, count_within, longest_within, order_moves
from .groups import CANDIDATES, Group, candidates_of, find_groups, list_weights, recipe_from

__all__ = ["TARGETS", "Step", "Tuned", "tune"]

FORMAT = 1
TARGETS = ("size", "latency")
#: Tokens of the answer whose time is the latency: short, as answers to a robot's questions are.
ANSWER = 16
#: New pictures on which a step is timed beside the float bundle.
ROUNDS = 5
_RECORD = "steps.jsonl"


@dataclass(frozen=True)
class Step:
    """One recipe, measured. `drop` in points against the float bundle on the same questions, `interval` of it at 95 %, `lost`
    and `won` questions that it answers worse and better, `p` of the difference; `size` in bytes of weights; `first_token`,
    and `latency`, the time of an answer of some tokens, in milliseconds, beside the float bundle's of the same rounds. A step
    that could not be made has an `error` alone."""

    name: str
    recipe: Mapping[str, Any]
    group: str = ""
    candidate: str = ""
    score: float = math.nan
    drop: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    lost: int = 0
    won: int = 0
    p: float = math.nan
    size: int = 0
    first_token: float = math.nan
    tokens_per_second: float = math.nan
    latency: float = math.nan
    float_latency: float = math.nan
    seconds: float = 0.0
    error: str = ""

    @property
    def faster(self) -> float:
        """Milliseconds."""
        return self.float_latency - self.latency


@dataclass(frozen=True)
class Tuned:
    """The result: `chosen` is one of `combined`, or None where no recipe is within the limit. `moves` in their order."""

    source: str
    suite: str
    metric: str
    questions: int
    target: str
    max_drop: float
    score: float
    size: int
    steps: Sequence[Step]
    moves: Sequence[Move]
    combined: Sequence[Step]
    chosen: Step | None
    recipe: Recipe
    groups: Sequence[Group] = field(default=(), repr=False)


def tune(
    source: str,
    output: str | Path,
    spec: SuiteSpec,
    *,
    max_drop: float = 1.0,
    target: str = "size",
    settings: Settings = Settings(),  # noqa: B008 - frozen
    calibration: Calibration | None = None,
    force: bool = False,
    stage: Callable[[str], None] = lambda _: None,
    step: Callable[[str, int, int], None] = lambda *_: None,
) -> Tuned:
    """Tunes a float bundle, or a model as `export --model` takes it. `calibration` is what candidates that look at samples see
    (drawn scenes without).

    Raises InputError for a limit or target that is none, RecipeError for a bundle that is quantized already, OutputError where
    `output` holds something else, and what exporting and evaluating raise. What was measured until then is kept.
    """
    if not (isinstance(max_drop, int | float) and 0 <= max_drop < math.inf):
        raise InputError(f"The drop allowed is {max_drop}; it is a number of points, 0 or more.")
    if target not in TARGETS:
        raise InputError(f"There is no target {target!r}; there are {', '.join(TARGETS)}.")
    suite, folder = load_suite(spec), Path(output)
    if is_bundle(source):
        _require_float(Path(source).expanduser())
    calibration = calibration or _drawn_calibration()
    identity = {
        "format": FORMAT, "source": digest_subject(source), "suite": suite.name, "questions": suite.digest,
        "settings": dataclasses.asdict(settings), "calibration": dict(calibration.identity()),
    }  # fmt: skip
    with _Record(folder, identity, force=force) as record:
        bundle = _float_bundle(source, folder, stage)
        runner = _Runner(bundle, folder, spec, suite, settings, calibration, record, stage, step, force)
        return _search(runner, source, max_drop, target)


def _search(runner: _Runner, source: str, max_drop: float, target: str) -> Tuned:
    groups = find_groups(list_weights(Bundle.open(runner.bundle, check_files=False)))
    planned = [(group, candidate) for group in groups for candidate in candidates_of(group)]
    runner.begin(len(planned))
    steps = [
        runner.measure(f"{group.name} as {candidate}", groups, {group.name: candidate}, group.name, candidate)
        for group, candidate in planned
    ]
    if steps and all(one.error for one in steps):
        raise RecipeError(f"Nothing of {source} could be quantized. {steps[0].error}")
    moves = order_moves([Option(s.group, s.candidate, _saved(s, runner, target), s.drop) for s in steps if not s.error])
    combined: dict[int, Step] = {}
    recipes: dict[int, Recipe] = {}

    def within(count: int) -> bool:
        chosen = apply_moves(moves[:count])
        named = f"the best {count} together" if count > 1 else "the best one alone"
        combined[count] = runner.measure(named, groups, chosen)
        recipes[count] = recipe_from("tuned", groups, _rules(chosen))
        if _fits(combined[count], max_drop):
            return True
        runner.discard(recipes[count])
        return False

    if moves:
        longest_within(len(moves), count_within(moves, max_drop), within)
    saved = {count: _saved(one, runner, target) for count, one in combined.items() if _fits(one, max_drop)}
    best = max((count for count in saved if saved[count] > 0), key=saved.__getitem__, default=0)
    runner.publish(recipes.get(best))
    metric, score = next(iter(runner.baseline.metrics.items()))
    return Tuned(
        source, runner.suite.name, metric, len(runner.suite.items), target, max_drop, score, runner.baseline.subject.size,
        steps, moves, list(combined.values()), combined.get(best), recipes.get(best, Recipe("tuned", (Rule("float"),))), groups,
    )  # fmt: skip


def _fits(step: Step, max_drop: float) -> bool:
    return not step.error and step.drop <= max_drop + 1e-9  # of a mean of many scores


def _saved(step: Step, runner: _Runner, target: str) -> float:
    return step.faster if target == "latency" else float(runner.baseline.subject.size - step.size)


def _rules(chosen: Mapping[str, str]) -> dict[str, Rule]:
    return {group: CANDIDATES[candidate] for group, candidate in chosen.items()}


def _drawn_calibration() -> Calibration:
    from ..calibration import load_calibration

    return load_calibration()


def _require_float(folder: Path) -> None:
    if recipe := Bundle.open(folder, check_files=False).manifest.recipe:
        raise RecipeError(
            f"{folder} is already quantized with the recipe {recipe.get('name')!r}. Tune the float bundle it came from."
        )


def _float_bundle(source: str, folder: Path, stage: Callable[[str], None]) -> Path:
    if is_bundle(source):
        return Path(source).expanduser()
    if not (folder / "float" / MANIFEST).is_file():
        from ..export.export import export_bundle

        export_bundle(source, folder / "float", stage=stage)
    return folder / "float"


# ---------------------------------------------------------------------------------------------------- steps


class _Runner:
    """Measures recipes, or knows what was measured. `baseline` is the float bundle's outcome."""

    def __init__(
        self, bundle: Path, folder: Path, spec: SuiteSpec, suite: Suite, settings: Settings, calibration: Calibration,
        record: _Record, stage: Callable[[str], None], step: Callable[[str, int, int], None], force: bool,
    ) -> None:  # fmt: skip
        self.bundle, self.folder, self.spec, self.suite, self.settings = bundle, folder, spec, suite, settings
        self.calibration, self.record, self.stage, self.step = calibration, record, stage, step
        self._pictures = group_by_picture(suite.items)
        self._number = self._count = 0
        self.baseline = self._evaluate(bundle, force)

    def begin(self, count: int) -> None:
        """Says how many steps there will be."""
        self._count = count
        if known := len(self.record.steps):
            self.stage(f"{known} steps were measured before")

    def measure(
        self, name: str, groups: Sequence[Group], chosen: Mapping[str, str], group: str = "", candidate: str = ""
    ) -> Step:
        """The step in which these groups become these candidates."""
        recipe, began = recipe_from(_slug(name) if group else "tuned", groups, _rules(chosen)), time.monotonic()
        self._number += 1
        if known := self.record.find(recipe):
            return dataclasses.replace(known, name=name, group=group, candidate=candidate)
        where = f"step {self._number} of {self._count}" if self._number <= self._count else "combining"
        self.stage(f"{where}: {name}")
        made = self._folder_of(recipe)
        try:
            self._quantize(recipe, made)
        except RecipeError as exc:
            found = Step(name, recipe.to_dict(), group, candidate, error=str(exc))
        else:
            outcome = self._evaluate(made)
            compared = compare_outcomes(self.baseline, outcome, self._pictures)
            score, before = (next(iter(one.metrics.values())) for one in (outcome, self.baseline))
            found = Step(
                name, recipe.to_dict(), group, candidate, score, before - score,
                # Of the difference, the other way round: how many points are lost.
                (-compared.interval.high, -compared.interval.low), compared.lost, compared.won, compared.p,
                outcome.subject.size, *self._times(made),
            )  # fmt: skip
        found = dataclasses.replace(found, seconds=time.monotonic() - began)
        self.record.append(recipe, found)
        if group:
            shutil.rmtree(made, ignore_errors=True)
        return found

    def discard(self, recipe: Recipe) -> None:
        """Lets a combination's bundle go."""
        shutil.rmtree(self._folder_of(recipe), ignore_errors=True)

    def publish(self, recipe: Recipe | None) -> None:
        """Makes the result's bundle, in place of an earlier one."""
        made = self.folder / "bundle"
        if recipe is None or not _made_with(made, recipe):
            shutil.rmtree(made, ignore_errors=True)
            if recipe:
                self._quantize(recipe, self._folder_of(recipe))
                self._folder_of(recipe).rename(made)
        shutil.rmtree(self.folder / "steps", ignore_errors=True)

    def _folder_of(self, recipe: Recipe) -> Path:
        return self.folder / "steps" / f"{recipe.name[:60]}-{_digest(recipe)}"

    def _quantize(self, recipe: Recipe, made: Path) -> None:
        if not (made / MANIFEST).is_file():
            calibration = self.calibration if recipe.calibrated else None
            quantize_bundle(self.bundle, made, recipe, calibration=calibration, stage=self.stage)

    def _evaluate(self, bundle: Path, force: bool = False) -> Outcome:
        _, (outcome,) = evaluate(
            [str(bundle)], self.spec, self.folder / "answers", self.settings, force=force, stage=self.stage, step=self.step
        )
        return outcome

    def _times(self, made: Path) -> tuple[float, float, float, float]:
        self.stage("measuring its speed beside the float bundle's")
        settings = self.settings

        def load(folder: Path) -> VLM:
            return VLM.load(
                folder, capacity=settings.capacity, backend=settings.backend, threads=settings.threads,
                visual_tokens=settings.visual_tokens, check_files=False,
            )  # fmt: skip

        speeds = measure_speed({"float": self.bundle, "step": made}, ROUNDS, load=load)
        own = speeds["step"]
        return own["first_token"], own["tokens_per_second"], _latency(own), _latency(speeds["float"])


def _made_with(bundle: Path, recipe: Recipe) -> bool:
    if not (bundle / MANIFEST).is_file():
        return False
    before = Bundle.open(bundle, check_files=False).manifest.recipe or {}
    return all(before.get(key) == value for key, value in recipe.to_dict().items())


def _latency(speed: Mapping[str, float]) -> float:
    """Milliseconds of an answer of `ANSWER` tokens; where answers had one token, of that."""
    rate = speed["tokens_per_second"]
    return speed["first_token"] + (1e3 * (ANSWER - 1) / rate if rate else 0.0)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


def _digest(recipe: Recipe) -> str:
    """Stands for what a recipe says, whatever it is called."""
    told = {key: value for key, value in recipe.to_dict().items() if key != "name"}
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()


# --------------------------------------------------------------------------------------------------- record


class _Record:
    """The steps on disk, by what their recipe says. A last line that was cut short is dropped.

    Raises OutputError where the folder holds something else, where somebody else is writing, and where it cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, force: bool) -> None:
        self.path = folder / _RECORD
        self.steps: dict[str, Step] = {}
        try:
            if folder.is_dir() and any(folder.iterdir()) and not self.path.is_file():
                raise OutputError(f"{folder} holds something else than a tuning (it has no {_RECORD}). Give another --output.")
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self.path.open("a+b")
        except OSError as exc:
            raise OutputError(f"{self.path} cannot be written: {exc.strerror}.") from exc
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._resume(json.loads(json.dumps(identity)), force)
        except BlockingIOError as exc:
            self._file.close()
            raise OutputError(f"{self.path} is being written by another run; wait for it, or give another --output.") from exc
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> _Record:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a full disk: what could not be written was told when it was
            self._file.close()

    def find(self, recipe: Recipe) -> Step | None:
        return self.steps.get(_digest(recipe))

    def append(self, recipe: Recipe, step: Step) -> None:
        self.steps[_digest(recipe)] = step
        self._write({"key": _digest(recipe), **dataclasses.asdict(step)})

    def _write(self, entry: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        except OSError as exc:
            raise OutputError(f"{self.path} cannot be written: {exc.strerror}.") from exc

    def _resume(self, identity: Mapping[str, Any], force: bool) -> None:
        if force:
            self._file.truncate(0)
            for folder in ("steps", "answers", "float", "bundle"):
                shutil.rmtree(self.path.parent / folder, ignore_errors=True)
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        lines = [self._parse(number, line) for number, line in enumerate(whole.splitlines(), 1)]
        if not lines or (len(lines) == 1 and self._is_unused(lines[0], identity)):
            self._file.truncate(0)
            self._write(identity)
            return
        first, *rest = lines
        if different := [name for name in {**identity, **first} if identity.get(name) != first.get(name)]:
            raise OutputError(
                f"{self.path} has steps that were measured with another {_listed(different)}. Give another --output, "
                "or --force to begin anew."
            )
        for number, entry in enumerate(rest, 2):
            key = entry.pop("key", None)
            try:
                self.steps[str(key)] = Step(**(entry | {"interval": tuple(entry["interval"])}))
            except (TypeError, KeyError) as exc:
                raise self._damaged(number) from exc

    def _is_unused(self, first: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
        """Whether a record without a step may become another one. Answers say themselves whose they are; a float bundle does
        not."""
        same = first.get("source") == identity["source"] or not (self.path.parent / "float").exists()
        return first.get("format") == FORMAT and same

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError as exc:
            raise self._damaged(number) from exc
        if not isinstance(entry, dict):
            raise self._damaged(number)
        return entry

    def _damaged(self, number: int) -> OutputError:
        return OutputError(f"{self.path} is damaged in line {number}. Give another --output, or --force to begin anew.")


def _listed(names: Sequence[str]) -> str:
    said = {"source": "model", "questions": "list of questions", "settings": "way of asking", "format": "version of EdgeVLM"}
    return " and ".join(said.get(name, name) for name in names)
