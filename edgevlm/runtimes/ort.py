"""ONNX Runtime on the CPU (`cpu`), and what it is on a GPU, too: `ort_cuda`.

The KV cache is bound in place: past and present are one buffer, so a step copies nothing. Products with INT4 and INT8
weights are those of `edgevlm.kernels`, or ONNX Runtime's `MatMulNBits`, into which it fuses them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Part
from ..errors import BundleError, MissingDependencyError
from ..kernels import find_library, unavailable
from ..kernels.graph import graph_with_kernels
from .base import Backend, Memory, Model, PartSession, State, Tensor

__all__ = ["CPU", "OLDEST", "onnxruntime", "open_session", "outdated"]

#: The first ONNX Runtime that runs a decoder, as (major, minor).
OLDEST = (1, 25)
#: The first one that was seen to take a limit for spinning; older ones would spin on.
_BOUNDED_SPINNING = (1, 32)


def onnxruntime() -> Any:
    """The module. Raises MissingDependencyError."""
    try:
        import onnxruntime as found
    except ImportError as exc:
        raise MissingDependencyError(
            "No runtime is installed. `pip install 'edgevlm[cpu]'` brings ONNX Runtime for the CPU, `pip install "
            "'edgevlm[gpu]'` the one for NVIDIA GPUs; install one of the two, not both."
        ) from exc
    return found


class _OrtState(State):
    def __init__(self, session: _OrtSession, pairs: Mapping[str, str], batch: int, capacity: int) -> None:
        self._session, self._pairs = session, dict(pairs)
        self.capacity, self.inputs = capacity, frozenset(pairs)
        infos = {name: session.part.inputs[name] for name in pairs}
        sizes = {"batch_size": batch, "capacity": capacity}
        self._arrays = {
            name: np.zeros([sizes[d] if isinstance(d, str) else d for d in info.shape], info.dtype)
            for name, info in infos.items()
        }
        self._bind()

    def grow(self, capacity: int) -> None:
        # They refer to every old buffer; without them, each is freed as soon as its successor is there.
        del self.binding, self._values
        for name, old in self._arrays.items():
            new = np.zeros((*old.shape[:2], capacity, *old.shape[3:]), old.dtype)
            new[:, :, : self.capacity] = old
            self._arrays[name] = new
        self.capacity = capacity
        self._bind()

    def _bind(self) -> None:
        """One binding for all steps until the buffers change: only the feeds are bound anew."""
        ort = onnxruntime()
        self.binding = self._session.session.io_binding()
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in self._arrays.items()}
        for past, present in self._pairs.items():
            self.binding.bind_ortvalue_input(past, self._values[past])
            self.binding.bind_ortvalue_output(present, self._values[past])
        for name in self._session.part.outputs:
            if name not in self._pairs.values():
                self.binding.bind_output(name)
        self._read: tuple[_OrtMemory, int] | None = None

    def read(self, memory: _OrtMemory) -> None:
        """Binds what the memory holds now, unless it is bound."""
        if self._read != (memory, memory.version):
            for name, value in memory.values.items():
                self.binding.bind_ortvalue_input(name, value)
            self._read = memory, memory.version

    @property
    def state_outputs(self) -> set[str]:
        return set(self._pairs.values())


class _OrtMemory(Memory):
    def __init__(self, session: _OrtSession, names: Sequence[str], batch: int) -> None:
        self.inputs = frozenset(names)
        self.length = self.version = 0
        self._arrays: dict[str, np.ndarray] = {}
        for name in names:
            _, heads, _, head_dim = session.part.inputs[name].shape
            assert isinstance(heads, int)
            assert isinstance(head_dim, int)
            self._arrays[name] = np.zeros((batch, heads, 0, head_dim), session.part.inputs[name].dtype)
        self.values: dict[str, Any] = {}

    def truncate(self, length: int) -> None:
        if length < self.length:
            self._hold({name: np.ascontiguousarray(array[:, :, :length]) for name, array in self._arrays.items()})

    def append(self, *blocks: Mapping[str, Tensor]) -> None:
        self._hold(
            {n: np.concatenate([a, *(np.asarray(block[n], a.dtype) for block in blocks)], 2) for n, a in self._arrays.items()}
        )

    def _hold(self, arrays: dict[str, np.ndarray]) -> None:
        ort = onnxruntime()
        self._arrays, self.length = arrays, next(iter(arrays.values())).shape[2]
        # A tensor without rows has no address that could be bound.
        rows = arrays.items() if self.length else ()
        self.values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in rows}
        self.version += 1


class _OrtSession(PartSession):
    def __init__(self, name: str, part: Part, session: Any) -> None:
        super().__init__(name, part)
        self.session = session
        self._order = [output.name for output in session.get_outputs()]

    def new_state(self, pairs: Mapping[str, str], batch: int, capacity: int) -> State:
        return _OrtState(self, pairs, batch, capacity)

    def new_memory(self, names: Sequence[str], batch: int) -> Memory:
        return _OrtMemory(self, names, batch)

    def _run(self, feeds: dict[str, np.ndarray], state: State | None, memory: Memory | None) -> dict[str, np.ndarray]:
        try:
            if state is None:
                return dict(zip(self._order, self.session.run(self._order, feeds), strict=True))
            assert isinstance(state, _OrtState)
            if memory is not None:
                assert isinstance(memory, _OrtMemory)
                state.read(memory)
            for name, array in feeds.items():
                state.binding.bind_cpu_input(name, array)
            self.session.run_with_iobinding(state.binding)
        except Exception as exc:  # ONNX Runtime's exceptions share no base class
            raise BundleError(f"ONNX Runtime stopped in the part {self.name}: {exc}") from exc
        # Outputs come in the order in which they were bound: the state first.
        values = state.binding.get_outputs()[len(state.state_outputs) :]
        names = [name for name in self.part.outputs if name not in state.state_outputs]
        # The next run writes into the same buffers, so what is handed out is a copy.
        return {name: np.array(value.numpy()) for name, value in zip(names, values, strict=True)}


def _version(ort: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in ort.__version__.split(".")[:2])


def outdated() -> str | None:
    """Why the ONNX Runtime that is installed is too old, or None."""
    ort = onnxruntime()
    if _version(ort) >= OLDEST:
        return None
    wanted = ".".join(map(str, OLDEST))
    return f"onnxruntime {ort.__version__} has no TensorScatter: `pip install -U 'onnxruntime>={wanted}'`"


def open_session(path: Path, name: str, model: Model, provider: Any, *, kernels: bool = False) -> Any:
    """ONNX Runtime's session of a part on a provider: its name, or its name and options. `kernels`: with the products of
    `edgevlm.kernels`, where they can be used. Raises BundleError."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # As many as this process may use; ONNX Runtime itself counts the machine's.
    options.intra_op_num_threads = model.threads or len(os.sched_getaffinity(0))
    # Each part has its own threads. Those that wait by spinning take the cores from the part whose turn it is, and from the
    # robot's own program: for a moment it pays, for long it costs (docs/performance.md).
    spins = _version(ort) >= _BOUNDED_SPINNING
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    if spins:
        options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    # 4: activations are quantized to int8 block by block; the fastest of the levels, at about 0.6 % error of a product.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    source: str | bytes = str(path)
    if kernels and (library := find_library()) and (lowered := graph_with_kernels(path)):
        options.register_custom_ops_library(str(library))
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        source = lowered
    try:
        return ort.InferenceSession(source, options, providers=[provider])
    except Exception as exc:  # ONNX Runtime's exceptions share no base class
        raise BundleError(f"ONNX Runtime cannot load the part {name} ({path}): {exc}") from exc


class CPU(Backend):
    name = "cpu"
    kv_dtypes = ("float32", "float16", "int8")

    def unavailable(self) -> str | None:
        return outdated()

    def details(self) -> str:
        reason = unavailable()
        return f"ONNX Runtime's kernels alone: {reason}" if reason else "with EdgeVLM's kernels for AVX-512 VNNI"

    def open(self, path: Path, name: str, part: Part, model: Model) -> PartSession:
        return _OrtSession(name, part, open_session(path, name, model, "CPUExecutionProvider", kernels=True))
