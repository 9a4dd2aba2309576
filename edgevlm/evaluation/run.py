"""Asks every subject every question of a suite, and keeps each answer as it comes: an interrupted run goes on where it was.

    OUTPUT/SUITE/SUBJECT.jsonl      the first line says whose answers these are, and how they were asked for; then one each

`folder_of` is OUTPUT/SUITE, where a report about a suite has its place as well.

1. An answer is kept with a digest of its question: wording, right answers, and what is in the pictures. On a restart, a
   question with an answer is not asked again. More questions of the same suite (a larger `--limit`) go on in the same file.
2. A last line that was cut short is dropped. No question counts twice, whatever is in the file.
3. Answers of another bundle, other settings or a question that reads differently are never mixed with new ones: that is an
   error, unless it is said that everything begins anew.

The work is cut into shards, plain data that an engine does wherever it likes. Here they are done one after the other, with one
subject in memory at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Generic, TypeVar

from ..errors import EdgeVLMError, InputError, OutputError
from ..generate import Sampling
from ..images import image_digest
from ..scenes import Scene
from .metrics import METRICS, mean_by_kind
from .records import Answer, Item, Outcome, Picture, Subject
from .subjects import Model, Settings, describe_subjects, digest_subject, file_name, open_subject
from .suites import Suite, SuiteSpec, load_suite

__all__ = ["Engine", "Settings", "Shard", "answer_shard", "answers_of", "evaluate", "folder_of", "run_locally", "score_subject"]

#: Of the lines in a file of answers.
FORMAT = 1
#: Questions of a shard, or a few more where they share a picture.
SHARD = 32


@dataclass(frozen=True)
class Shard:
    """A piece of work that can be sent anywhere: plain data. `subject` as on the command line; the digests are those of what
    the sender saw, and another one where the work is done is refused ("" is not compared)."""

    subject: str
    suite: SuiteSpec
    ids: tuple[str, ...]
    settings: Settings
    subject_digest: str = ""
    suite_digest: str = ""


#: Does all shards, and calls back with a shard and answers to its items as they come: a shard's in one call or in several.
Engine = Callable[[Sequence[Shard], Callable[[Shard, list[Answer]], None]], None]


def evaluate(
    subjects: Sequence[str],
    spec: SuiteSpec,
    output: str | Path,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    *,
    engine: Engine | None = None,
    force: bool = False,
    stage: Callable[[str], None] = lambda _: None,
    step: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[Suite, list[Outcome]]:
    """Asks subjects (bundles, and models as `export --model` takes them) what has no answer yet in `output`, and scores them.

    `stage` is told what begins, `step` a subject's name, how many of its questions have an answer, and how many there are. With
    `force`, answers that are there are thrown away.

    Raises InputError for a suite that cannot be asked, OutputError for answers in `output` that are of something else, and what
    opening and asking the subjects raises. What was answered until then is kept.
    """
    suite = load_suite(spec)
    if settings.max_new_tokens is None:
        settings = replace(settings, max_new_tokens=suite.longest)
    Sampling(max_new_tokens=settings.max_new_tokens or 0)  # raises where it is no number of tokens
    described = describe_subjects(subjects)
    stage(f"{suite.name}: {len(suite.items):,} question{'s' * (len(suite.items) > 1)}, {len(described)} to answer")
    digests = {item.id: _digest_item(item) for item in suite.items}
    journals: dict[str, Journal] = {}
    try:
        for subject in described:
            identity = {
                "format": FORMAT, "suite": suite.name, "subject": subject.name, "kind": subject.kind,
                "digest": digest_subject(subject.source), "settings": dataclasses.asdict(settings),
            }  # fmt: skip
            path = folder_of(output, suite) / f"{file_name(subject.name)}.jsonl"
            journals[subject.source] = Journal(path, identity, digests, force=force)
        _ask(suite, spec, described, journals, settings, engine or run_locally, stage, step)
    finally:
        for journal in journals.values():
            journal.close()
    stage("scoring")
    return suite, [score_subject(suite, subject, journals[subject.source].answers) for subject in described]


def folder_of(output: str | Path, suite: Suite) -> Path:
    """Where what belongs to a suite is kept."""
    return Path(output) / file_name(suite.name)


def _ask(
    suite: Suite,
    spec: SuiteSpec,
    subjects: Sequence[Subject],
    journals: Mapping[str, Journal],
    settings: Settings,
    engine: Engine,
    stage: Callable[[str], None],
    step: Callable[[str, int, int], None],
) -> None:
    names, total, digest = {s.source: s.name for s in subjects}, len(suite.items), suite.digest
    shards = [
        Shard(source, spec, ids, settings, journal.identity["digest"], digest)
        for source, journal in journals.items()
        for ids in _cut([item for item in suite.items if item.id not in journal.answers])
    ]
    told: set[str] = set()

    def begin(source: str) -> None:
        if source not in told:
            told.add(source)
            known = len(journals[source].answers)
            stage(f"asking {names[source]}" + (f", {known:,} of {total:,} are answered" if known else ""))
            step(names[source], known, total)

    def done(shard: Shard, answers: list[Answer]) -> None:
        begin(shard.subject)
        journals[shard.subject].append(answers)
        step(names[shard.subject], len(journals[shard.subject].answers), total)
        following = waiting[waiting.index(shard.subject) + 1 :]
        if following and len(journals[shard.subject].answers) == total:
            begin(following[0])

    if not shards:
        return
    waiting = list(dict.fromkeys(shard.subject for shard in shards))
    begin(waiting[0])
    _SUITE.keep((spec, digest), suite)
    try:
        engine(shards, done)
    finally:
        _SUITE.drop()
        _MODEL.drop()
    if left := [names[source] for source, journal in journals.items() if any(i.id not in journal.answers for i in suite.items)]:
        raise RuntimeError(f"the engine left questions to {', '.join(left)} without an answer")


def score_subject(suite: Suite, subject: Subject, answers: Mapping[str, Answer]) -> Outcome:
    """What a subject's answers to all questions of a suite come to. Raises MissingDependencyError where the metric's package is
    not there."""
    metric, items = METRICS[suite.metric], suite.items
    texts = {item.id: answers[item.id].text for item in items}
    scores = metric.score(items, texts)
    return Outcome(
        subject, suite.name, {item.id: answers[item.id] for item in items}, scores, metric.summarize(items, texts, scores),
        mean_by_kind(items, scores),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- work

T = TypeVar("T")


class _Last(Generic[T]):
    """The last thing that was loaded in this process. The one before is let go first, so that there is never more than one."""

    def __init__(self) -> None:
        self._key: Any = None
        self._value: T | None = None

    def get(self, key: Any, load: Callable[[], T]) -> T:
        if self._key != key or self._value is None:
            self.drop()
            self.keep(key, load())
        assert self._value is not None
        return self._value

    def keep(self, key: Any, value: T) -> None:
        self._key, self._value = key, value

    def drop(self) -> None:
        self._key = self._value = None


_SUITE: _Last[Suite] = _Last()
_MODEL: _Last[Model] = _Last()


def run_locally(shards: Sequence[Shard], done: Callable[[Shard, list[Answer]], None]) -> None:
    """The engine without any other machine: in this process, each answer handed over as it comes."""
    for shard in shards:
        for answer in answers_of(shard):
            done(shard, [answer])


def answer_shard(work: Shard) -> list[Answer]:
    """The answers to a shard's items, in their order. See `answers_of`."""
    return list(answers_of(work))


def answers_of(work: Shard) -> Iterator[Answer]:
    """Answers one by one. What was loaded for the last shard of this process is used again, where it is the same.

    Raises InputError where suite or subject is not the sender's, what loading them raises, and for a request that the subject
    cannot serve what the runtime raises, naming the question.
    """
    suite = _SUITE.get((work.suite, work.suite_digest), lambda: load_suite(work.suite))
    if work.suite_digest and suite.digest != work.suite_digest:
        _SUITE.drop()
        raise InputError(
            f"The suite {suite.name} has other questions here than where the evaluation was started. Use the same files and "
            "the same version of EdgeVLM on all machines."
        )
    if unknown := [name for name in work.ids if name not in suite.by_id]:
        raise InputError(f"The suite {suite.name} has no question {', '.join(unknown[:5])}.")

    def load() -> Model:
        if work.subject_digest and digest_subject(work.subject) != work.subject_digest:
            raise InputError(
                f"{work.subject} is another one here than where the evaluation was started. Copy it to all machines."
            )
        return open_subject(work.subject, work.settings)

    model = _MODEL.get((work.subject, work.subject_digest, work.settings), load)
    for name in work.ids:
        try:
            answer = model.ask(suite.by_id[name])
        except EdgeVLMError as exc:
            raise type(exc)(f"{work.subject} cannot be asked question {name} of {suite.name}: {exc}") from exc
        yield answer


def _cut(items: Sequence[Item]) -> list[tuple[str, ...]]:
    """Ids of shards: questions about one picture stay together."""
    shards: list[list[str]] = []
    before: Item | None = None
    for item in items:
        if before is None or (len(shards[-1]) >= SHARD and list(item.pictures) != list(before.pictures)):
            shards.append([])
        shards[-1].append(item.id)
        before = item
    return [tuple(ids) for ids in shards]


# ------------------------------------------------------------------------------------------------- journal


def _digest_item(item: Item) -> str:
    told = [item.id, item.prompt, list(item.references), [_digest_picture(picture) for picture in item.pictures]]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=12).hexdigest()


def _digest_picture(picture: Picture) -> str:
    if isinstance(picture, Scene):
        return repr(picture)
    if isinstance(picture, Path):
        stat = picture.stat()
        return _digest_file(picture, stat.st_size, stat.st_mtime_ns)
    return image_digest(picture)


@functools.cache
def _digest_file(path: Path, size: int, changed: int) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


class Journal:
    """The answers of one subject on disk: `answers` by item id, those of the suite alone.

    `identity` says whose answers these are and how they were asked for, `digests` what each item is. Raises OutputError where
    the file holds something else, where somebody else is writing it, and where it cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], digests: Mapping[str, str], *, force: bool = False) -> None:
        self.path, self.identity, self._digests = path, dict(identity), digests
        self.answers: dict[str, Answer] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("a+b")
        except OSError as exc:
            raise OutputError(f"{path} cannot be written: {exc.strerror}.") from exc
        try:
            self._lock()
            self._resume(force)
        except BaseException:
            self._file.close()
            raise

    def append(self, answers: Sequence[Answer]) -> None:
        """Keeps answers; one that is there already stays as it is."""
        new = [answer for answer in answers if answer.id not in self.answers]
        self._write([dataclasses.asdict(answer) | {"item": self._digests[answer.id]} for answer in new])
        self.answers.update((answer.id, answer) for answer in new)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a full disk: what could not be written was told when it was
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise OutputError(
                f"{self.path} is being written by another evaluation; wait for it, or give another --output."
            ) from exc
        except OSError:  # a file system without locks
            return

    def _resume(self, force: bool) -> None:
        if force:
            self._file.truncate(0)
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))  # what was cut short while it was written
        lines = [self._parse(number, line) for number, line in enumerate(whole.splitlines(), 1)]
        if not lines or (len(lines) == 1 and lines[0].get("format") == FORMAT):  # no answer yet: nothing to mix
            self._file.truncate(0)
            self._write([self.identity])
            return
        self._compare(lines[0])
        changed = []
        for number, entry in enumerate(lines[1:], 2):
            digest = entry.pop("item", None)
            try:
                answer = Answer(**entry)
            except TypeError as exc:
                raise OutputError(f"{self.path} is no file of answers: line {number} has {', '.join(entry)}.") from exc
            if answer.id not in self._digests:
                continue  # of a larger limit
            if digest != self._digests[answer.id]:
                changed.append(answer.id)
            self.answers.setdefault(answer.id, answer)
        if changed:
            raise self._mixed(f"answers to {len(changed):,} questions that have changed since ({', '.join(changed[:5])})")

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise OutputError(f"{self.path} is damaged, or no file of answers: line {number}. {_REMEDY}")
        return entry

    def _compare(self, found: Mapping[str, Any]) -> None:
        if found.get("format") != FORMAT:
            raise OutputError(f"{self.path} is no file of answers of this version of EdgeVLM. {_REMEDY}")
        if found.get("digest") != self.identity["digest"]:
            raise self._mixed(f"answers of another {found.get('subject')} than the one that is there now")
        before, now = found.get("settings", {}), self.identity["settings"]
        if differ := [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]:
            said = ", ".join(f"{name} {before.get(name)}, now {now.get(name)}" for name in differ)
            raise self._mixed(f"answers under other settings ({said})")

    def _mixed(self, what: str) -> OutputError:
        return OutputError(f"{self.path} holds {what}. They are not mixed with new ones. {_REMEDY}")

    def _write(self, entries: Sequence[Mapping[str, Any]]) -> None:
        try:
            self._file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode())
            self._file.flush()
        except OSError as exc:
            raise OutputError(f"{self.path} cannot be written: {exc.strerror}.") from exc


_REMEDY = "Give another --output, or --force to begin anew."
