"""The Ray engine, on a real cluster of two workers that the engine's own code starts."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from edgevlm.errors import BundleError, CapacityError, ClusterError, InputError, MissingDependencyError
from edgevlm.evaluation import ray_engine
from edgevlm.evaluation.ray_engine import RETRIES, make_ray_engine
from edgevlm.evaluation.records import Answer
from edgevlm.evaluation.run import Settings, Shard, evaluate
from edgevlm.evaluation.suites import SuiteSpec

SCENES = SuiteSpec("scenes", limit=80)
SETTINGS = Settings(max_new_tokens=4, threads=1, side=32)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def shard(folder: Path, *ids: str, settings: Settings = SETTINGS) -> Shard:
    return Shard(str(folder), SuiteSpec("scenes"), ids, settings)


def answer_by_name(work: Shard) -> list[Answer]:
    """Runs in a worker, in the folder that the shard names: does what the first id says, and notes who began what."""
    folder, order = Path(work.subject), work.ids[0].partition("-")[0]
    with (folder / "began.txt").open("a") as notes:
        notes.write(f"{work.ids[0]} {os.getpid()} {os.environ.get('RAY_USAGE_STATS_ENABLED')}\n")
    if order == "die" or (order == "stumble" and not (folder / "stumbled").exists()):
        (folder / "stumbled").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "typed":
        raise CapacityError("a prompt of 900 tokens is too long, schön")
    if order == "bug":
        raise ZeroDivisionError("a bug in the work")
    if order == "remove":
        shutil.rmtree(folder)
    if order == "sleep":
        time.sleep(300)
    return [Answer(name, f"answer to {name}", 1.0, 1.0, 1) for name in work.ids]


def began(folder: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in (folder / "began.txt").read_text().splitlines())


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


class Heard(list[tuple[tuple[str, ...], list[str]]]):
    """What the engine calls back with."""

    def __call__(self, work: Shard, answers: list[Answer]) -> None:
        assert [answer.text for answer in answers] == [f"answer to {name}" for name in work.ids]
        self.append((work.ids, [answer.id for answer in answers]))


@pytest.fixture(scope="class")
def cluster() -> Iterator[Any]:
    """Two workers; afterwards no process and no file of them is left."""
    folders = set(Path("/tmp").glob("ray-*"))
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # the work is defined here
        ray, ours = stack.enter_context(ray_engine._cluster(None, 2, 1, 2))
        assert ours
        yield ray
        started, used = children(), set(Path("/tmp").glob("ray-*")) - folders
    assert len(started) >= 4
    _, alive = psutil.wait_procs(started, timeout=30)
    assert alive == []
    assert len(used) == 1
    assert not any(folder.exists() for folder in used)
    assert "RAY_AUTH_TOKEN" not in os.environ


@needs_ray
@pytest.mark.slow
class TestOnTwoWorkers:
    def test_the_cluster_keeps_to_itself(self, cluster: Any) -> None:
        listening = [
            connection.laddr.ip.removeprefix("::ffff:")
            for process in children()
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(listening) > 3
        assert set(listening) == {"127.0.0.1"}
        assert cluster.cluster_resources()["CPU"] == 2

    def test_results_are_those_of_a_local_run(self, cluster: Any, bundle: Path, tmp_path: Path) -> None:
        _, local = evaluate([str(bundle)], SCENES, tmp_path / "local", SETTINGS)
        steps: list[int] = []
        _, spread = evaluate(
            [str(bundle)],
            SCENES,
            tmp_path / "ray",
            SETTINGS,
            engine=make_ray_engine(),
            step=lambda _, done, __: steps.append(done),
        )
        for one, other in zip(local, spread, strict=True):
            assert {name: answer.text for name, answer in one.answers.items()} == {n: a.text for n, a in other.answers.items()}
            assert list(one.answers) == list(other.answers)
            assert (one.scores, one.metrics, one.by_kind, one.subject) == (
                other.scores,
                other.metrics,
                other.by_kind,
                other.subject,
            )
        assert len(steps) >= 3
        assert steps == sorted(steps)
        assert steps[-1] == 80

    def test_an_interrupted_run_goes_on(self, cluster: Any, bundle: Path, tmp_path: Path) -> None:
        def interrupt(_: str, done: int, __: int) -> None:
            if done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate([str(bundle)], SCENES, tmp_path, SETTINGS, engine=make_ray_engine(), step=interrupt)
        file = next(tmp_path.rglob("*.jsonl"))
        known = file.read_text().splitlines()
        assert 1 < len(known) < 81
        evaluate([str(bundle)], SCENES, tmp_path, SETTINGS, engine=make_ray_engine())
        lines = file.read_text().splitlines()
        assert lines[: len(known)] == known
        assert len(lines) == 81
        assert len({line.split('"id": ')[1].split(",")[0] for line in lines[1:]}) == 80

    def test_a_model_is_kept_from_shard_to_shard(self, cluster: Any, tmp_path: Path) -> None:
        """`answer_shard` keeps it in its process, and there are no more processes than workers."""
        heard = Heard()
        make_ray_engine(answer=answer_by_name)([shard(tmp_path, f"q{i}") for i in range(24)], heard)
        notes = [line.split() for line in (tmp_path / "began.txt").read_text().splitlines()]
        assert len(heard) == len(notes) == 24
        assert len({pid for _, pid, _ in notes}) <= 2
        assert {telemetry for *_, telemetry in notes} == {"0"}

    def test_a_lost_workers_shard_is_done_again(self, cluster: Any, tmp_path: Path) -> None:
        heard = Heard()
        work = [
            shard(tmp_path, "a", "b"),
            shard(tmp_path, "stumble", "c", "d"),
            shard(tmp_path, "e"),
            shard(tmp_path, "f", "g"),
        ]
        make_ray_engine(answer=answer_by_name)(work, heard)
        assert sorted(heard) == sorted((one.ids, list(one.ids)) for one in work), "each shard once"
        assert began(tmp_path) == {"a": 1, "stumble": 2, "e": 1, "f": 1}

    def test_a_shard_that_kills_every_worker_is_given_up(self, cluster: Any, tmp_path: Path) -> None:
        with pytest.raises(ClusterError, match=rf"to put die and 1 more to .* died {RETRIES + 1} times\. Too little memory"):
            make_ray_engine(answer=answer_by_name)([shard(tmp_path, "die", "b")], Heard())
        assert began(tmp_path)["die"] == RETRIES + 1

    def test_what_the_work_raises_is_raised_here(self, cluster: Any, tmp_path: Path) -> None:
        with pytest.raises(
            CapacityError, match=r"^On .+ \(127\.0\.0\.1\): a prompt of 900 tokens is too long, schön$"
        ) as raised:
            make_ray_engine(answer=answer_by_name)([shard(tmp_path, "typed")], Heard())
        assert "answer_by_name" in str(raised.value.__cause__), "the worker's own traceback"
        assert began(tmp_path) == {"typed": 1}, "it would come again: it is not done again"

    def test_a_bug_in_the_work_is_told_with_its_text(self, cluster: Any, tmp_path: Path) -> None:
        with pytest.raises(ClusterError, match=r"putting bug to .+ raised ZeroDivisionError: a bug in the work"):
            make_ray_engine(answer=answer_by_name)([shard(tmp_path, "bug")], Heard())
        assert began(tmp_path) == {"bug": 1}

    def test_a_machine_that_lacks_the_bundle_is_named(self, cluster: Any, tmp_path: Path) -> None:
        (tmp_path / "bundle").mkdir()
        every = replace(SETTINGS, threads=2)  # one after the other
        work = [shard(tmp_path / "bundle", "remove", settings=every), shard(tmp_path / "bundle", "b", settings=every)]
        with pytest.raises(
            BundleError,
            match=r"^On .+ \(127\.0\.0\.1\): /.+/bundle \(subject\) is missing\. Every machine of the cluster reads it",
        ):
            make_ray_engine(answer=answer_by_name)(work, Heard())

    def test_interrupted_it_leaves_nothing_running(self, cluster: Any, tmp_path: Path) -> None:
        def interrupt(work: Shard, answers: list[Answer]) -> None:
            raise KeyboardInterrupt

        work = [shard(tmp_path, "quick"), *(shard(tmp_path, f"sleep-{i}") for i in range(4))]
        with pytest.raises(KeyboardInterrupt):
            make_ray_engine(answer=answer_by_name)(work, interrupt)
        late = time.monotonic() + 30
        while cluster.available_resources().get("CPU", 0) < 2:
            assert time.monotonic() < late, "a task is still running"
            time.sleep(0.1)
        before = began(tmp_path)
        time.sleep(1)
        assert began(tmp_path) == before, "what waited was cancelled too"

    def test_work_that_fits_no_machine_is_refused(self, cluster: Any, tmp_path: Path) -> None:
        with pytest.raises(ClusterError, match=r"takes 64 cores \(--threads\) and 0 GPUs .* has: 2 cores and 0 GPUs\."):
            make_ray_engine(answer=answer_by_name)([shard(tmp_path, "a", settings=replace(SETTINGS, threads=64))], Heard())
        with pytest.raises(ClusterError, match=r"takes 1 cores \(--threads\) and 1 GPUs \(--backend cuda\)"):
            make_ray_engine(answer=answer_by_name)([shard(tmp_path, "a", settings=replace(SETTINGS, backend="cuda"))], Heard())

    def test_a_cluster_of_the_callers_stays(self, cluster: Any, tmp_path: Path) -> None:
        make_ray_engine(answer=answer_by_name)([shard(tmp_path, "a")], Heard())
        assert cluster.is_initialized()


# ------------------------------------------------------------------------------------------ without a cluster


def test_nothing_to_do_starts_nothing() -> None:
    make_ray_engine("10.255.255.1:6379")([], Heard())
    assert not any("raylet" in process.name() for process in children()) or "ray" in sys.modules


def test_paths_are_made_absolute_where_they_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bundle", "images", "scenes"):
        Path(name).mkdir()
    for name in ("q.json", "own.jsonl", "a:b.jsonl", "~x.jsonl"):
        Path(name).touch()

    def made(subject: str, suite: str, **more: str | None) -> tuple[str, str, str | None, str | None]:
        work, _ = ray_engine._made_absolute(Shard(subject, SuiteSpec(suite, **more), ("a",), SETTINGS))  # type: ignore[arg-type]
        return work.subject, work.suite.suite, work.suite.images, work.suite.annotations

    here = str(tmp_path)
    assert made("bundle", "scenes") == (f"{here}/bundle", "scenes", None, None)
    assert made("demo/llava", "pope-scenes") == ("demo/llava", "pope-scenes", None, None)
    assert made("bundle", "vqa:q.json", images="images", annotations="q.json") == (
        f"{here}/bundle", f"vqa:{here}/q.json", f"{here}/images", f"{here}/q.json",
    )  # fmt: skip
    assert made("bundle", "own.jsonl")[1] == f"{here}/own.jsonl"
    assert made("bundle", "a:b.jsonl")[1] == f"{here}/a:b.jsonl"
    assert made("bundle", "gone.jsonl")[1] == "gone.jsonl"
    assert made("bundle", "pope:gone.json")[1] == "pope:gone.json"
    work, paths = ray_engine._made_absolute(Shard("bundle", SuiteSpec("vqa:q.json"), ("a",), Settings()))
    assert paths == {f"{here}/bundle": "subject", f"{here}/q.json": "suite"}
    assert work.settings.threads == 1, "what a task reserves"


def test_a_worker_says_which_file_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ray:
        class util:
            get_node_ip_address = staticmethod(lambda: "10.0.0.7")

    monkeypatch.setattr(ray_engine, "_import_ray", lambda: Ray)
    found = ray_engine._answer_there(shard(tmp_path, "a"), {"/nowhere/images": "images"}, answer_by_name)
    assert isinstance(found, ray_engine._Failure)
    assert found.kind == InputError.__name__
    assert "/nowhere/images (images) is missing" in found.text
    assert "10.0.0.7" in found.node


def test_ray_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"needs Ray, which is not installed .*edgevlm\[ray\]"):
        make_ray_engine()([shard(tmp_path, "a")], Heard())


@needs_ray
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_a_cluster_that_is_not_there(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unused_port: int) -> None:
    address = f"127.0.0.1:{unused_port}"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if by == "variable":
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=rf"No Ray cluster can be used at {address} .*refused.*--ray-address or RAY_ADDRESS"):
        make_ray_engine(address if by == "argument" else None)([shard(tmp_path, "a")], Heard())


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
