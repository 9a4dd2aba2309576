"""The engine that spreads an evaluation over the machines of a Ray cluster (`--engine ray`, extra `edgevlm[ray]`).

Each shard is a Ray task that returns its answers whole or not at all:

1. A worker that dies, or its machine, takes its shard's work with it; Ray does the shard again elsewhere, `RETRIES` times.
2. An error that the work itself raises is raised here, as the same class, with the machine's name; it would come again.
3. A worker process does shard after shard, and `answer_shard` keeps what it has loaded, so that a model is read once a process.

A shard is data, not files: bundle, pictures and annotations are read where the work is done, under the same absolute path on
each machine (a shared disk, or copies). A machine that lacks one is named. Answers do not depend on which worker gave them;
times to the first token do, where machines differ.

The module knows shards and Ray; what an answer is, and which shards are left to do, is `run`'s.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import errors
from ..errors import BundleError, ClusterError, EdgeVLMError, InputError, MissingDependencyError
from .records import Answer
from .run import Engine, Shard, answer_shard
from .suites import SUITES

__all__ = ["RETRIES", "make_ray_engine"]

#: How often a shard whose worker died is done again.
RETRIES = 3
#: Ray asks for at least 75 MB; shards and answers are a few kilobytes.
OBJECT_STORE = 100_000_000
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of the shards behind the first that failed
    # Out of memory counts as a worker that died; without, such a shard is done again for ever.
    "RAY_task_oom_retries": str(RETRIES),
    # A task without GPUs of its own sees those of this machine, as it would without Ray.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
#: A cluster of one's own. Whoever reaches it may run code: the first (its name speaks of other systems) makes it listen on the
#: loopback interface alone, and a token, which Ray would otherwise write to the home folder, keeps other users out.
_OWN = _ENVIRONMENT | {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}


@dataclass(frozen=True)
class _Failure:
    """What a shard's work raised: pickling exceptions is left to nobody."""

    kind: str
    text: str
    trace: str
    node: str


def make_ray_engine(
    address: str | None = None, *, workers: int | None = None, answer: Callable[[Shard], list[Answer]] = answer_shard
) -> Engine:
    """An engine on the cluster at `address` (`host:port`, `ray://…` or "auto"), or at `RAY_ADDRESS`, or on one of this
    machine's own that lives as long as the work, with `workers` processes (default: one for every `threads` cores).

    A task takes as many cores as its shard's settings have threads (one without), and one GPU for "cuda" and "tensorrt".

    The engine raises `ClusterError` where no cluster answers, none of its machines is large enough, or a shard was lost too
    often; `BundleError` or `InputError` for files that a machine lacks; what the work raises, as the same class where it is
    EdgeVLM's and `ClusterError` otherwise. `MissingDependencyError` without Ray. Interrupted, it cancels what is under way.
    """

    def run(shards: Sequence[Shard], done: Callable[[Shard, list[Answer]], None]) -> None:
        if not shards:
            return
        cores = max(_cores(shard) for shard in shards)
        with _cluster(address or os.environ.get("RAY_ADDRESS"), workers, cores, len(shards)) as (ray, ours):
            _check_room(ray, shards)
            _run_shards(ray, shards, done, answer, cancel=not ours)

    return run


def _cores(shard: Shard) -> int:
    return shard.settings.threads or 1


def _gpus(shard: Shard) -> int:
    """A backend may be asked for by part."""
    return int(any(gpu in (shard.settings.backend or "") for gpu in ("cuda", "tensorrt")))


# ------------------------------------------------------------------------------------------------- cluster


@contextlib.contextmanager
def _cluster(address: str | None, workers: int | None, cores: int, shards: int) -> Iterator[tuple[Any, bool]]:
    """Ray, connected, and whether that was done here and not by the caller: then it is ended here, and its tasks with it."""
    with _environment(_ENVIRONMENT if address else _OWN):
        ray = _import_ray()
        if ray.is_initialized():
            yield ray, False
            return
        folder = None
        try:
            if address:
                _connect(ray, address)
            else:
                # Short: paths of Unix sockets end at 107 characters.
                folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
                count = workers or max(1, min(len(os.sched_getaffinity(0)) // cores, shards))
                ray.init(
                    address="local", num_cpus=count * cores, object_store_memory=OBJECT_STORE, include_dashboard=False,
                    log_to_driver=False, logging_level="ERROR", _temp_dir=folder, _node_ip_address="127.0.0.1",
                )  # fmt: skip
            yield ray, True
        finally:
            ray.shutdown()
            if folder:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """With what is not set yet, set; Ray reads it when it is imported and when it starts a process."""
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as exc:
        raise MissingDependencyError(
            f"The engine 'ray' needs Ray, which is not installed ({exc}). `pip install 'edgevlm[ray]'` brings it."
        ) from exc
    return ray


def _connect(ray: Any, address: str) -> None:
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, OverflowError, RuntimeError, ValueError) as exc:
        raise ClusterError(
            f"No Ray cluster can be used at {address} ({type(exc).__name__}: {exc}). Start one (`ray start --head`), correct "
            "--ray-address or RAY_ADDRESS, or give neither to work on this machine alone."
        ) from exc


def _check_room(ray: Any, shards: Sequence[Shard]) -> None:
    """A task that fits no machine would wait for ever."""
    cores, gpus = max(map(_cores, shards)), max(map(_gpus, shards))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cores and node.get("GPU", 0) >= gpus for node in nodes):
        have = "; ".join(f"{node.get('CPU', 0):g} cores and {node.get('GPU', 0):g} GPUs" for node in nodes) or "no machine"
        asked = shards[0].settings.backend or "auto"
        raise ClusterError(
            f"A worker takes {cores} cores (--threads) and {gpus} GPUs (--backend {asked}), which no machine of the Ray "
            f"cluster has: {have}."
        )


# -------------------------------------------------------------------------------------------------- shards


def _run_shards(
    ray: Any,
    shards: Sequence[Shard],
    done: Callable[[Shard, list[Answer]], None],
    answer: Callable[[Shard], list[Answer]],
    *,
    cancel: bool,
) -> None:
    task = ray.remote(max_retries=RETRIES, retry_exceptions=False)(_answer_there)
    waiting: dict[Any, Shard] = {}
    try:
        for shard in shards:
            made, paths = _made_absolute(shard)
            reference = task.options(num_cpus=_cores(shard), num_gpus=_gpus(shard)).remote(made, paths, answer)
            waiting[reference] = shard
        while waiting:
            for reference in ray.wait(list(waiting), num_returns=1)[0]:
                shard = waiting.pop(reference)
                done(shard, _received(ray, reference, shard))
    finally:
        if cancel:
            _cancel(ray, list(waiting))


def _cancel(ray: Any, references: Sequence[Any]) -> None:
    """Ends tasks. One that is just being sent to a worker does not notice, and is told again.

    Cancelling a task in the moment in which it ends aborts the process (Ray 2.60: "Tried to complete task that was not
    pending"), so none is that has ended, and none at all where disconnecting does it.
    """
    for wait in (0, *[1] * 20):
        references = ray.wait(references, num_returns=len(references), timeout=wait)[1] if references else []
        for reference in references:
            ray.cancel(reference, force=True)


def _made_absolute(shard: Shard) -> tuple[Shard, dict[str, str]]:
    """The shard with every path that exists here made absolute, and what each is: a worker may run in another folder. One
    thread a task, unless it is said, as that is what the task reserves."""
    paths: dict[str, str] = {}

    def absolute(text: str, what: str) -> str:
        path = Path(text).expanduser()
        if not path.exists():
            return text
        paths[str(path.absolute())] = what
        return str(path.absolute())

    spec = shard.suite
    suite = replace(
        spec,
        suite=_suite_with(spec.suite, lambda file: absolute(file, "suite")),
        images=spec.images and absolute(spec.images, "images"),
        annotations=spec.annotations and absolute(spec.annotations, "annotations"),
    )
    settings = replace(shard.settings, threads=_cores(shard))
    return replace(shard, subject=absolute(shard.subject, "subject"), suite=suite, settings=settings), paths


def _suite_with(suite: str, change: Callable[[str], str]) -> str:
    """A suite's name with its file changed: `vqa:FILE`, or a file alone."""
    if suite in SUITES:
        return suite
    if Path(suite).expanduser().is_file():
        return change(suite)
    kind, colon, file = suite.partition(":")
    return f"{kind}{colon}{change(file)}" if file else suite


def _answer_there(shard: Shard, paths: dict[str, str], answer: Callable[[Shard], list[Answer]]) -> list[Answer] | _Failure:
    """Runs in a worker process."""
    node = f"{socket.gethostname()} ({_import_ray().util.get_node_ip_address()})"
    try:
        for path, what in paths.items():
            if not Path(path).exists():
                error = BundleError if what == "subject" else InputError
                raise error(
                    f"{path} ({what}) is missing. Every machine of the cluster reads it under this path: put it on a disk that "
                    "all share, or copy it there."
                )
        return answer(shard)
    except Exception as exc:  # whatever it is, it goes back as text
        kind = next((c.__name__ for c in type(exc).__mro__ if getattr(errors, c.__name__, None) is c), type(exc).__name__)
        return _Failure(kind, str(exc), traceback.format_exc(), node)


def _received(ray: Any, reference: Any, shard: Shard) -> list[Answer]:
    more = f" and {len(shard.ids) - 1} more" if len(shard.ids) > 1 else ""
    about = f"{', '.join(shard.ids[:1])}{more} to {shard.subject}"
    try:
        result = ray.get(reference)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as exc:
        raise ClusterError(
            f"The workers that were to put {about} died {RETRIES + 1} times. Too little memory is the usual reason: fewer "
            "workers leave more for each."
        ) from exc
    except ray.exceptions.RayError as exc:
        raise ClusterError(
            f"A worker could not put {about}: {_last_line(exc)}. Every machine needs the same Python, Ray and EdgeVLM."
        ) from exc
    if not isinstance(result, _Failure):
        return list(result)
    kind = getattr(errors, result.kind, None)
    cause = RuntimeError(f"on {result.node}:\n{result.trace}")
    if isinstance(kind, type) and issubclass(kind, EdgeVLMError):
        raise kind(f"On {result.node}: {result.text}") from cause
    raise ClusterError(f"On {result.node}, putting {about} raised {result.kind}: {result.text}") from cause


def _last_line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[-1] if lines else type(exc).__name__
