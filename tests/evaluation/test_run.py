"""Running an evaluation: every question once, whatever happens in between."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asking import picture
from tinies import Tiny
from tiny import LLAVAS

from edgevlm.errors import CapacityError, InputError, OutputError
from edgevlm.evaluation import run
from edgevlm.evaluation.records import Answer, Item
from edgevlm.evaluation.run import Settings, Shard, answer_shard, evaluate
from edgevlm.evaluation.suites import SuiteSpec, load_suite

LLAVA = LLAVAS[0].name
SCENES = SuiteSpec("scenes", limit=16)
SETTINGS = Settings(max_new_tokens=4, threads=1, side=32)


class Parrot:
    """Answers with the question's first word; `after` so many answers it is interrupted."""

    asked: list[tuple[str, str]]
    alive: weakref.WeakSet[Parrot]

    def __init__(self, source: str, after: int, raises: BaseException) -> None:
        self.source, self.after, self.raises = source, after, raises
        Parrot.alive.add(self)

    def ask(self, item: Item) -> Answer:
        if len(Parrot.asked) == self.after:
            raise self.raises
        Parrot.asked.append((self.source, item.id))
        return Answer(item.id, item.prompt.split()[0], 1.0, 0.01, 2)


@pytest.fixture
def parrots(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[tuple[str, str]]]]:
    """Subjects that need no model; returns the list of who was asked what."""

    def arrange(after: int = -1, raises: BaseException | None = None) -> list[tuple[str, str]]:
        def opened(source: str, settings: Settings) -> Parrot:
            assert not Parrot.alive, "the one before is still in memory"
            return Parrot(source, after, raises or KeyboardInterrupt())

        monkeypatch.setattr(run, "open_subject", opened)
        Parrot.asked, Parrot.alive = [], weakref.WeakSet()
        return Parrot.asked

    yield arrange
    run._MODEL.drop()


@pytest.fixture
def two(bundle: Path, tmp_path: Path) -> list[str]:
    for name in ("float", "int8"):
        shutil.copytree(bundle, tmp_path / name)
    return [str(tmp_path / name) for name in ("float", "int8")]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------- the whole way


def test_every_subject_gets_every_question(two: list[str], tmp_path: Path, parrots: Any) -> None:
    asked, told, stages = parrots(), [], []
    suite, outcomes = evaluate(
        two, SCENES, tmp_path / "out", SETTINGS, step=lambda *count: told.append(count), stage=stages.append
    )
    ids = [item.id for item in suite.items]
    assert asked == [(source, name) for source in two for name in ids]
    assert [o.subject.name for o in outcomes] == ["float", "int8"]
    for outcome in outcomes:
        assert outcome.suite == "scenes"
        assert list(outcome.answers) == list(outcome.scores) == ids
        assert set(outcome.by_kind) == {item.kind for item in suite.items}
        right = sum(item.prompt.split()[0] == item.references[0] for item in suite.items)
        assert outcome.metrics == {"exact match": 100 * right / 16}
    assert told[0] == ("float", 0, 16)
    assert [count for count in told if count[1] == 16] == [("float", 16, 16), ("int8", 16, 16)]
    assert [s for s in stages if s.startswith("asking")] == ["asking float", "asking int8"]
    assert sorted(p.name for p in (tmp_path / "out" / "scenes").iterdir()) == ["float.jsonl", "int8.jsonl"]
    assert not Parrot.alive


def test_the_second_time_nothing_is_asked(two: list[str], tmp_path: Path, parrots: Any) -> None:
    parrots()
    _, first = evaluate(two, SCENES, tmp_path, SETTINGS)
    before = (tmp_path / "scenes" / "float.jsonl").read_bytes()
    asked = parrots()
    _, second = evaluate(two, SCENES, tmp_path, SETTINGS)
    assert asked == []
    assert first == second
    assert (tmp_path / "scenes" / "float.jsonl").read_bytes() == before


@pytest.mark.parametrize("after", [0, 1, 15, 16, 17, 31])
def test_an_interrupted_run_goes_on(two: list[str], tmp_path: Path, parrots: Any, after: int) -> None:
    before = parrots(after)
    with pytest.raises(KeyboardInterrupt):
        evaluate(two, SCENES, tmp_path, SETTINGS)
    assert len(before) == after
    rest = parrots()
    suite, outcomes = evaluate(two, SCENES, tmp_path, SETTINGS)
    assert sorted(before + rest) == sorted((source, item.id) for source in two for item in suite.items)
    for outcome in outcomes:
        assert list(outcome.answers) == [item.id for item in suite.items]
        assert len(lines(tmp_path / "scenes" / f"{outcome.subject.name}.jsonl")) == 17


def test_more_questions_of_the_same_suite_and_fewer(two: list[str], tmp_path: Path, parrots: Any) -> None:
    parrots()
    evaluate(two[:1], SCENES, tmp_path, SETTINGS)
    asked = parrots()
    suite, (outcome,) = evaluate(two[:1], replace(SCENES, limit=40), tmp_path, SETTINGS)
    assert len(asked) == 24
    assert len(outcome.scores) == 40
    asked = parrots()
    suite, (outcome,) = evaluate(two[:1], SCENES, tmp_path, SETTINGS)
    assert asked == []
    assert list(outcome.scores) == list(outcome.answers) == [item.id for item in suite.items]


def test_a_subject_more(two: list[str], tmp_path: Path, parrots: Any) -> None:
    parrots()
    evaluate(two[:1], SCENES, tmp_path, SETTINGS)
    asked = parrots()
    evaluate(two, SCENES, tmp_path, SETTINGS)
    assert {source for source, _ in asked} == {two[1]}


def test_a_real_bundle(bundle: Path, tmp_path: Path) -> None:
    suite, (outcome,) = evaluate([str(bundle)], SCENES, tmp_path, SETTINGS)
    assert all(0 < answer.tokens <= 4 or not answer.text for answer in outcome.answers.values())
    assert any(answer.reused for answer in outcome.answers.values())
    first = outcome.answers[suite.items[0].id]
    assert not first.reused
    assert 0 < first.first_token <= 1e3 * first.seconds
    stored = lines(tmp_path / "scenes" / f"{bundle.name}.jsonl")
    assert stored[0]["settings"] == {
        "max_new_tokens": 4, "capacity": None, "backend": None, "threads": 1, "visual_tokens": None, "side": 32,
    }  # fmt: skip
    assert {entry["text"] for entry in stored[1:]} == {answer.text for answer in outcome.answers.values()}


def test_answers_are_as_long_as_the_suite_says(bundle: Path, tmp_path: Path, parrots: Any) -> None:
    parrots()
    evaluate([str(bundle)], SCENES, tmp_path)
    assert lines(tmp_path / "scenes" / f"{bundle.name}.jsonl")[0]["settings"]["max_new_tokens"] == 48
    for number in (-1, 0):
        with pytest.raises(InputError, match=f"max_new_tokens is {number}"):
            evaluate([str(bundle)], SCENES, tmp_path, Settings(number))


# -------------------------------------------------------------------------------------------- what is left


def test_a_half_written_line_is_dropped(two: list[str], tmp_path: Path, parrots: Any) -> None:
    parrots()
    suite, _ = evaluate(two[:1], SCENES, tmp_path, SETTINGS)
    path = tmp_path / "scenes" / "float.jsonl"
    content = path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (last + 1, len(content) - 1, last):
        path.write_bytes(content[:cut])
        asked = parrots()
        _, (outcome,) = evaluate(two[:1], SCENES, tmp_path, SETTINGS)
        assert asked == [(two[0], suite.items[-1].id)]
        assert len(outcome.scores) == 16
        assert path.read_bytes() == content
    path.write_bytes(content[:20])  # even the first
    assert len(parrots()) == 0
    evaluate(two[:1], SCENES, tmp_path, SETTINGS)
    assert len(Parrot.asked) == 16
    assert path.read_bytes() == content


def test_a_question_that_stands_there_twice_counts_once(two: list[str], tmp_path: Path, parrots: Any) -> None:
    parrots()
    _, (before,) = evaluate(two[:1], SCENES, tmp_path, SETTINGS)
    path = tmp_path / "scenes" / "float.jsonl"
    content = lines(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content[3] | {"text": "something else"}) + "\n")
    asked = parrots()
    _, (after,) = evaluate(two[:1], SCENES, tmp_path, SETTINGS)
    assert asked == []
    assert after == before


def mixed(subjects: Sequence[str], output: Path, spec: SuiteSpec = SCENES, settings: Settings = SETTINGS) -> str:
    with pytest.raises(OutputError) as caught:
        evaluate(subjects, spec, output, settings)
    assert str(caught.value).endswith("Give another --output, or --force to begin anew.")
    return str(caught.value)


def test_answers_of_another_bundle_are_not_mixed(two: list[str], tmp_path: Path, parrots: Any) -> None:
    parrots(8)
    with pytest.raises(KeyboardInterrupt):
        evaluate(two[:1], SCENES, tmp_path, SETTINGS)
    manifest = Path(two[0]) / "edgevlm.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["provenance"]["checkpoint"] = "another"
    manifest.write_text(json.dumps(content), encoding="utf-8")
    asked = parrots()
    assert "holds answers of another float than the one that is there now" in mixed(two[:1], tmp_path)
    assert asked == []
    _, (outcome,) = evaluate(two[:1], SCENES, tmp_path, SETTINGS, force=True)
    assert len(asked) == 16
    assert len(lines(tmp_path / "scenes" / "float.jsonl")) == 17
    assert len(outcome.scores) == 16


def test_other_settings_are_not_mixed(two: list[str], tmp_path: Path, parrots: Any) -> None:
    parrots()
    evaluate(two[:1], SCENES, tmp_path, SETTINGS)
    said = mixed(two[:1], tmp_path, settings=replace(SETTINGS, max_new_tokens=9, capacity=64))
    assert "(capacity None, now 64, max_new_tokens 4, now 9)" in said


def test_settings_that_failed_can_be_put_right(two: list[str], tmp_path: Path, parrots: Any) -> None:
    """Where no question was answered yet there is nothing to mix."""
    parrots(0, InputError("no such backend"))
    with pytest.raises(InputError, match="no such backend"):
        evaluate(two[:1], SCENES, tmp_path, replace(SETTINGS, backend="tpu"))
    asked = parrots()
    evaluate(two[:1], SCENES, tmp_path, SETTINGS)
    assert len(asked) == 16
    assert lines(tmp_path / "scenes" / "float.jsonl")[0]["settings"]["backend"] is None


def own(folder: Path, **changes: Any) -> SuiteSpec:
    entries = [{"id": n, "image": "a.png", "question": f"How many {n}?", "answer": "two"} for n in range(4)]
    entries[2] |= changes
    (folder / "q.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    return SuiteSpec(str(folder / "q.jsonl"))


@pytest.mark.parametrize("changes", [{"question": "Which 2?"}, {"answer": "three"}, {"image": "b.png"}])
def test_a_changed_suite_is_not_mixed(two: list[str], tmp_path: Path, parrots: Any, changes: dict[str, str]) -> None:
    for name in ("a", "b"):
        picture(ord(name)).save(tmp_path / f"{name}.png")
    parrots()
    evaluate(two[:1], own(tmp_path), tmp_path / "out", SETTINGS)
    said = mixed(two[:1], tmp_path / "out", own(tmp_path, **changes))
    assert "answers to 1 questions that have changed since (2)" in said
    asked = parrots()
    evaluate(two[:1], own(tmp_path), tmp_path / "out", SETTINGS)
    assert asked == []


def test_a_changed_picture_is_not_mixed(two: list[str], tmp_path: Path, parrots: Any) -> None:
    path = tmp_path / "a.png"
    picture(1).save(path)
    parrots()
    evaluate(two[:1], own(tmp_path), tmp_path / "out", SETTINGS)
    path.touch()
    evaluate(two[:1], own(tmp_path), tmp_path / "out", SETTINGS)
    picture(2).save(path)
    os.utime(path, (1, 1))
    assert "4 questions that have changed" in mixed(two[:1], tmp_path / "out", own(tmp_path))


@pytest.mark.parametrize("content", ["hello\n", '{"format": 0}\n', "[]\n", '{"id": 1}\n{"id": 2}\n'])
def test_a_file_of_something_else_is_left_alone(two: list[str], tmp_path: Path, parrots: Any, content: str) -> None:
    path = tmp_path / "scenes" / "float.jsonl"
    path.parent.mkdir()
    path.write_text(content)
    parrots()
    assert "no file of answers" in mixed(two[:1], tmp_path)
    assert path.read_text() == content


def test_a_damaged_line_is_named(two: list[str], tmp_path: Path, parrots: Any) -> None:
    parrots()
    evaluate(two[:1], SCENES, tmp_path, SETTINGS)
    path = tmp_path / "scenes" / "float.jsonl"
    content = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*content[:4], content[4][:9] + "\n", *content[5:]]), encoding="utf-8")
    assert "line 5" in mixed(two[:1], tmp_path)


def test_two_evaluations_do_not_write_one_file(two: list[str], tmp_path: Path, parrots: Any) -> None:
    parrots()
    nested: list[str] = []

    def interfere(*_: object) -> None:
        if not nested:
            nested.append("")
            with pytest.raises(OutputError) as caught:
                evaluate(two[:1], SCENES, tmp_path, SETTINGS)
            nested[0] = str(caught.value)

    evaluate(two[:1], SCENES, tmp_path, SETTINGS, step=interfere)
    assert "is being written by another evaluation" in nested[0]


def test_where_nothing_can_be_written(two: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        evaluate(two[:1], SCENES, tmp_path / "file", SETTINGS)


def test_a_full_disk(two: list[str], tmp_path: Path, parrots: Any) -> None:
    """What was written whole is kept, and the same command goes on with it."""
    parrots()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
        with pytest.raises(OutputError, match=r"float\.jsonl cannot be written: File too large"):
            evaluate(two[:1], SCENES, tmp_path, SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    path = tmp_path / "scenes" / "float.jsonl"
    kept = path.read_bytes().rpartition(b"\n")[0].splitlines()[1:]
    assert 1 < len(kept) < 16
    asked = parrots()
    _, (outcome,) = evaluate(two[:1], SCENES, tmp_path, SETTINGS)
    assert len(asked) == 16 - len(kept)
    assert len(outcome.scores) == len(lines(path)) - 1 == 16


def test_bad_input_is_told_before_any_model_is_loaded(two: list[str], tmp_path: Path, parrots: Any) -> None:
    asked = parrots(0, AssertionError("a model was asked"))
    with pytest.raises(InputError, match=r"1 of the 1 pictures of q are missing: .*a\.png"):
        evaluate(two, own(tmp_path), tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()
    assert asked == []


# ------------------------------------------------------------------------------------------------- shards


def test_shards_are_plain_data_and_keep_pictures_together(two: list[str], tmp_path: Path, parrots: Any) -> None:
    parrots()
    shards: list[Shard] = []

    def engine(work: Sequence[Shard], done: Callable[[Shard, list[Answer]], None]) -> None:
        shards.extend(work)
        for shard in reversed(work):
            done(shard, answer_shard(pickle.loads(pickle.dumps(shard))))

    spec = replace(SCENES, limit=200)
    suite, outcomes = evaluate(two, spec, tmp_path, SETTINGS, engine=engine)
    assert [name for s in shards if s.subject == two[0] for name in s.ids] == [item.id for item in suite.items]
    by_id = {item.id: item for item in suite.items}
    seen = [{by_id[name].pictures for name in s.ids} for s in shards if s.subject == two[0]]
    assert len(seen) > 3
    assert all(not a & b for a, b in itertools.pairwise(seen))
    assert all(len(outcome.scores) == 200 for outcome in outcomes)


def test_an_answer_that_comes_twice_counts_once(two: list[str], tmp_path: Path, parrots: Any) -> None:
    parrots()

    def engine(work: Sequence[Shard], done: Callable[[Shard, list[Answer]], None]) -> None:
        for shard in work:
            done(shard, answer_shard(shard)[:2])
            done(shard, answer_shard(shard))

    _, (outcome,) = evaluate(two[:1], SCENES, tmp_path, SETTINGS, engine=engine)
    assert len(lines(tmp_path / "scenes" / "float.jsonl")) == 17
    assert len(outcome.answers) == 16


def test_an_engine_that_forgets_is_found_out(two: list[str], tmp_path: Path, parrots: Any) -> None:
    parrots()
    with pytest.raises(RuntimeError, match="left questions to float"):
        evaluate(two[:1], SCENES, tmp_path, SETTINGS, engine=lambda work, done: None)


def test_a_worker_with_other_files_refuses(two: list[str], parrots: Any) -> None:
    parrots()
    suite = load_suite(SCENES)
    work = Shard(two[0], SCENES, (suite.items[0].id,), SETTINGS)
    assert [answer.id for answer in answer_shard(work)] == [suite.items[0].id]
    with pytest.raises(InputError, match="other questions here"):
        answer_shard(replace(work, suite_digest="0"))
    with pytest.raises(InputError, match="another one here"):
        answer_shard(replace(work, subject_digest="0"))
    with pytest.raises(InputError, match="no question 7-count"):
        answer_shard(replace(work, ids=("7-count",)))


def test_the_question_that_cannot_be_asked_is_named(two: list[str], tmp_path: Path, parrots: Any) -> None:
    parrots(5, CapacityError("too long"))
    suite = load_suite(SCENES)
    with pytest.raises(CapacityError, match=f"float cannot be asked question {suite.items[5].id} of scenes: too long"):
        evaluate(two, SCENES, tmp_path, SETTINGS)
    assert len(lines(tmp_path / "scenes" / "float.jsonl")) == 6


# ------------------------------------------------------------------------------------------------ killed

RUN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs this in the background
import sys
from edgevlm.evaluation.run import Settings, evaluate
from edgevlm.evaluation.suites import SuiteSpec
evaluate([sys.argv[1]], SuiteSpec("scenes", limit=400), sys.argv[2], Settings(max_new_tokens=8, threads=1, side=64))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_killed_goes_on(tiny: Callable[[str], Tiny], tmp_path: Path, number: signal.Signals) -> None:
    bundle, path = tiny(LLAVA).bundle, tmp_path / "scenes" / f"{tiny(LLAVA).bundle.name}.jsonl"
    running = subprocess.Popen([sys.executable, "-c", RUN, str(bundle), str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not path.is_file() or path.read_bytes().count(b"\n") < 20:
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(number)
        running.wait(timeout=60)
    finally:
        running.kill()
    kept = [json.loads(line)["id"] for line in path.read_bytes().splitlines(keepends=True)[1:] if line.endswith(b"\n")]
    assert 19 <= len(kept) < 400
    settings = Settings(max_new_tokens=8, threads=1, side=64)
    suite, (outcome,) = evaluate([str(bundle)], SuiteSpec("scenes", limit=400), tmp_path, settings)
    stored = [entry["id"] for entry in lines(path)[1:]]
    assert stored[: len(kept)] == kept
    assert sorted(stored) == sorted(item.id for item in suite.items)
    assert len(outcome.scores) == 400
