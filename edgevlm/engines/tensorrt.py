"""The builder of TensorRT, of both flavours: `tensorrt-rtx` (desktop RTX, ahead of time, no GPU needed) and `tensorrt` (Jetson
and servers, on the device itself). Their Python interfaces are one; only what differs is spelled out here.

https://docs.nvidia.com/deeplearning/tensorrt/latest/ and https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/. It knows
files, shapes and layers, nothing of bundles.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import EngineError, MissingDependencyError
from .profiles import Profile

__all__ = ["FLAVOURS", "Layer", "Network", "TensorRT", "open_tensorrt"]

#: What each flavour is imported as, first found first taken.
FLAVOURS = {"tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"), "tensorrt": ("tensorrt",)}
_JETSON = Path("/etc/nv_tegra_release")

#: Called while an engine is built: how much is done, from 0 to 1, and what is being done.
BuildProgress = Callable[[float, str], None]


@dataclass(frozen=True)
class Layer:
    """A layer of a parsed network. An input or output that is not there is an empty name."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass
class Network:
    """A parsed network, before it is built; TensorRT's own objects are in `handles`."""

    inputs: dict[str, str]
    outputs: dict[str, str]
    layers: list[Layer]
    handles: Any = field(repr=False, default=None)


@dataclass
class TensorRT:
    """One flavour, imported. There is one logger for all builders: TensorRT takes a second one for a mistake."""

    flavour: str
    module: Any
    version: str
    log: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        trt: Any = self.module
        said = self.log

        class Logger(trt.ILogger):  # type: ignore[misc]  # not typed
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                name = str(severity).rsplit(".", 1)[-1]
                if name in ("INTERNAL_ERROR", "ERROR"):
                    said.append((name, message))

        self.logger = Logger()

    @property
    def release(self) -> tuple[int, ...]:
        """The version as numbers, to be compared."""
        return tuple(int(n) for n in self.version.split(".")[:3] if n.isdigit())

    def parse(self, path: Path, part: str) -> Network:
        """Reads an ONNX file and its weights. Raises EngineError, naming the part and the node."""
        trt = self.module
        self.log.clear()
        builder = trt.Builder(self.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(path)):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            said = "; ".join(f"{e.node_operator()} {e.node_name()!r}: {_first_line(e.desc())}" for e in errors[:3])
            raise EngineError(f"{self.flavour} {self.version} cannot read the part {part}: {said or self._errors()}.")
        layers = [_layer(network.get_layer(i)) for i in range(network.num_layers)]
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        # The parser owns the weights that the network points to.
        return Network(
            {t.name: _dtype(t) for t in inputs}, {t.name: _dtype(t) for t in outputs}, layers, (builder, network, parser)
        )

    def build(
        self,
        network: Network,
        part: str,
        profiles: Sequence[Profile],
        capabilities: Sequence[str],
        *,
        timing_cache: bytes = b"",
        progress: BuildProgress = lambda *_: None,
    ) -> tuple[Any, bytes | None]:
        """The plan, as a buffer, and the timing cache, where the flavour has one. An interrupt ends the build at its next step.

        Raises EngineError with TensorRT's own words.
        """
        trt = self.module
        builder, definition, _ = network.handles
        config = builder.create_builder_config()
        self._set_capabilities(config, capabilities)
        for profile in profiles:
            made = builder.create_optimization_profile()
            for name, shapes in profile.shapes.items():
                made.set_shape(name, *shapes)
            if config.add_optimization_profile(made) < 0:
                raise EngineError(f"{self.flavour} refuses the profile {profile.name!r} of the part {part}: {self._errors()}.")
        cache = self._set_timing_cache(config, timing_cache)
        stop, raised = threading.Event(), list[BaseException]()
        monitor = _monitor(trt, progress, stop, raised)
        config.progress_monitor = monitor
        plan = _run_interruptible(lambda: builder.build_serialized_network(definition, config), stop)
        if raised:
            raise raised[0]
        if plan is None:
            raise EngineError(f"{self.flavour} {self.version} cannot build the part {part}: {self._errors()}.")
        return plan, bytes(cache.serialize()) if cache is not None else None

    def _set_capabilities(self, config: Any, capabilities: Sequence[str]) -> None:
        if self.flavour != "tensorrt-rtx":
            return  # it builds for the GPU that it runs on
        known = self.module.ComputeCapability.__members__
        config.num_compute_capabilities = len(capabilities)
        for i, name in enumerate(capabilities):
            if name.upper() not in known or not config.set_compute_capability(known[name.upper()], i):
                usable = ", ".join(n.lower() for n in known if n.startswith("SM"))
                raise EngineError(f"{self.flavour} {self.version} builds nothing for {name}; it builds for {usable}.")

    def _set_timing_cache(self, config: Any, content: bytes) -> Any:
        """TensorRT-RTX times nothing ahead of time. A cache of another device or version is begun anew."""
        if self.flavour != "tensorrt":
            return None
        for begun in (content, b""):
            cache = config.create_timing_cache(begun)
            if config.set_timing_cache(cache, ignore_mismatch=False):
                return cache
        return None

    def _errors(self) -> str:
        said = [_first_line(text) for _, text in self.log]
        return "; ".join(list(dict.fromkeys(filter(None, said)))[:3]) or "it gives no reason"


@functools.cache
def open_tensorrt(flavour: str) -> TensorRT:
    """Imports a flavour. Raises MissingDependencyError, saying how to get it."""
    for name in FLAVOURS[flavour]:
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(name)
            return TensorRT(flavour, module, module.__version__)
    raise MissingDependencyError(_missing(flavour))


def _missing(flavour: str) -> str:
    if flavour == "tensorrt-rtx":
        return "TensorRT-RTX is not installed. `pip install 'edgevlm[tensorrt-rtx]'` brings it (95 MB, no GPU needed)."
    if _JETSON.is_file():
        return (
            "TensorRT's Python module is not there. On a Jetson it is a system package of JetPack: `sudo apt install "
            "python3-libnvinfer`, and an environment made with `--system-site-packages` sees it."
        )
    return (
        "TensorRT's Python module is not there. NVIDIA's own wheels have it (`pip install tensorrt`); engines for a Jetson are "
        "built on the Jetson itself, where JetPack brings it. Engines for RTX cards need neither: `edgevlm[tensorrt-rtx]`."
    )


def _layer(layer: Any) -> Layer:
    def names(count: int, get: Callable[[int], Any]) -> tuple[str, ...]:
        return tuple("" if (tensor := get(i)) is None else tensor.name for i in range(count))

    kind = str(layer.type).rsplit(".", 1)[-1]
    return Layer(layer.name, kind, names(layer.num_inputs, layer.get_input), names(layer.num_outputs, layer.get_output))


def _dtype(tensor: Any) -> str:
    kind = str(tensor.dtype).rsplit(".", 1)[-1].lower()
    return {"half": "float16", "float": "float32", "bf16": "bfloat16"}.get(kind, kind)


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if "CUDA driver" not in line]
    return " ".join(lines[:2]).rstrip(".")


def _monitor(trt: Any, progress: BuildProgress, stop: threading.Event, raised: list[BaseException]) -> Any:
    """TensorRT reports phases within phases, each with its steps; this makes one share of it. Refusing a step ends the build;
    an exception must not reach TensorRT, and is kept in `raised`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # not typed
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list[Any]] = {}  # name → steps done, steps there are, parent

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = [0, max(1, steps), parent]

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.phases:
                self.phases[name][0] = step + 1
                try:
                    progress(self.share(name), name)
                except BaseException as exc:
                    raised.append(exc)
                    stop.set()
            return not stop.is_set()

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

        def share(self, name: str) -> float:
            done, steps, parent = self.phases[name]
            part = min(1.0, done / steps)
            while parent in self.phases:
                done, steps, parent = self.phases[parent]
                part = min(1.0, (done + part) / steps)
            return part

    return Monitor()


def _run_interruptible(work: Callable[[], Any], stop: threading.Event) -> Any:
    """Runs `work` in a thread: Python hears an interrupt in the main thread alone, and not inside of TensorRT."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = work()
        except BaseException as exc:  # handed on below
            outcome["error"] = exc

    thread = threading.Thread(target=run, name="tensorrt-build", daemon=True)
    thread.start()
    with _stopping(stop, thread):
        while thread.is_alive():
            thread.join(0.1)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


@contextlib.contextmanager
def _stopping(stop: threading.Event, thread: threading.Thread) -> Iterator[None]:
    try:
        yield
    except BaseException:
        stop.set()
        thread.join()
        raise
