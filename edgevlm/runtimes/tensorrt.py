"""TensorRT, of both flavours: engines that `edgevlm build` made, on the GPU that they were made for.

The KV cache is allocated once, at the engine's capacity, and updated in place where the engine writes its outputs over its
inputs; one of old TensorRT copies instead, and two caches swap their roles. What one part gives stays on the device until the
next one takes it; per token, logits alone come to the host. The step of one token is a CUDA graph from its second time on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Part
from ..engines.profiles import Profile
from ..engines.record import EngineRecord, find_engine
from ..errors import CapacityError, DeviceError, EngineError
from .base import Backend, BackendUnavailable, Memory, Model, PartSession, State, Tensor
from .cuda_device import CudaDriver
from .device import Device, DeviceTensor, Driver, LoadedEngine, Rows
from .device_session import DeviceMemory, DeviceSession

__all__ = ["TensorRT"]


class TensorRT(Backend):
    name = "tensorrt"
    kv_dtypes = ("float32", "float16")
    kv_note = "TensorRT's cache layer takes floats alone"

    def __init__(self, driver: Driver | None = None) -> None:
        self.driver = driver or CudaDriver()

    def unavailable(self) -> str | None:
        if reason := self.driver.missing():
            return reason
        hosts = self.driver.hosts()
        return hosts if isinstance(hosts, str) else None

    def details(self) -> str:
        hosts = self.driver.hosts()
        assert not isinstance(hosts, str)
        return "; ".join(f"{h.flavour} {h.version} on {h.device} ({h.capability})" for h in hosts.values())

    def open(self, path: Path, name: str, part: Part, model: Model) -> PartSession:
        if model.bundle is None:
            raise BackendUnavailable("a part by itself has no engines; they belong to a bundle")
        hosts = self.driver.hosts()
        assert not isinstance(hosts, str)
        reasons = []
        for flavour, host in hosts.items():
            found = find_engine(
                model.bundle, name, host, capacity=model.capacity, visual_tokens=model.visual_tokens,
                check_files=model.check_files,
            )  # fmt: skip
            if isinstance(found, str):
                reasons.append(found)
                continue
            try:
                device = model.device(self.driver)
                engine = self.driver.load(device, flavour, found.path)
                session = _Session(name, part, found.record, engine, device)
                session.check_room()
                return session
            except (DeviceError, EngineError) as exc:
                reasons.append(f"{found.target}: {str(exc).rstrip('.')}")
        raise BackendUnavailable("; ".join(dict.fromkeys(reasons)))


class _Session(DeviceSession):
    def __init__(self, name: str, part: Part, record: EngineRecord, engine: LoadedEngine, device: Device) -> None:
        super().__init__(name, part, device)
        self.record, self._engine = record, engine
        self.graphs = True
        device.reserve_scratch(engine.scratch)
        self._contexts = [engine.context(i) for i in range(len(record.key.profiles))]
        self._fixed: dict[str, DeviceTensor] = {}  # inputs and outputs of steps, which keep their addresses

    def dtype(self, name: str) -> str:
        """What a tensor has in the plan."""
        info = self.part.inputs.get(name) or self.part.outputs[name]
        return self.record.dtypes.get(name, info.dtype)

    def check_room(self) -> None:
        """Raises DeviceError where the KV cache will not fit: while loading, another backend may still be taken."""
        pasts = [name for name in self.part.inputs if name.startswith("past_key_values.")]
        sizes = {"batch_size": 1, "capacity": self.record.capacity}
        shapes = {n: [sizes[d] if isinstance(d, str) else d for d in self.part.inputs[n].shape] for n in pasts}
        places = 1 if self.record.aliases else 2
        needed = places * sum(DeviceTensor.size_of(shape, self.dtype(name)) for name, shape in shapes.items())
        free, _ = self.device.memory()
        if needed > free:
            self.close()
            raise DeviceError(
                f"the KV cache of {self.record.capacity:,} positions takes {needed / 1e9:,.2f} GB of the GPU's memory, and "
                f"{free / 1e9:,.2f} GB are free: build with a smaller --capacity"
            )

    def new_state(self, pairs: Mapping[str, str], batch: int, capacity: int) -> State:
        if capacity > self.record.capacity:
            raise CapacityError(
                f"The engine of the part {self.name} has {self.record.capacity:,} positions; {capacity:,} were asked for."
            )
        with self.failures():
            return _State(self, pairs, batch)

    def close(self) -> None:
        self._fixed.clear()
        self._contexts.clear()
        self._engine.close()

    def _run(self, feeds: dict[str, Any], state: State | None, memory: Memory | None) -> dict[str, Tensor]:
        with self.failures():
            if state is not None:
                assert isinstance(state, _State)
                return self._step(feeds, state, memory)
            most = self._most_at_once(feeds)
            count = next(iter(feeds.values())).shape[0]
            if count <= most:
                return self._pass(feeds)
            done = [self._pass({n: f[i : i + most] for n, f in feeds.items()}) for i in range(0, count, most)]
            return {name: np.concatenate([one[name] for one in done]) for name in done[0]}  # on the device

    def _pass(self, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
        """One run without state: its outputs are new tensors."""
        context = self._contexts[self._profile({name: feed.shape for name, feed in feeds.items()})]
        placed = {name: self.on_device(name, feed) for name, feed in feeds.items()}
        for name, tensor in placed.items():
            context.set_input(name, tensor.shape, tensor.address)
        outputs = {name: DeviceTensor(self.device, context.shape(name), self.dtype(name)) for name in self.part.outputs}
        for name, tensor in outputs.items():
            context.set_output(name, tensor.address)
        context.enqueue()
        return dict(outputs)

    def _step(self, feeds: Mapping[str, Any], state: _State, memory: Memory | None) -> dict[str, Tensor]:
        """One run around the state: everything lies where it lay before, so the same shapes are the same graph."""
        tensors = {name: self._in_place(name, feed) for name, feed in feeds.items()} | state.read()
        if memory is not None:
            assert isinstance(memory, DeviceMemory)
            tensors |= memory.tensors
        written = state.written()
        number = self._profile({name: tensor.shape for name, tensor in tensors.items()})
        key = (number, *((tensor.shape, tensor.address) for tensor in (*tensors.values(), *written.values())))
        # Only the shapes of single tokens come again and again.
        repeats = number == len(self._contexts) - 1 and self.graphs
        if repeats and state.graphs.get(key) is not None:
            self.device.launch(state.graphs[key])
            outputs = state.outputs
        else:
            context = self._contexts[number]
            for name, tensor in tensors.items():
                context.set_input(name, tensor.shape, tensor.address)
            for name, tensor in written.items():
                context.set_output(name, tensor.address)
            outputs = {
                name: self._place(name, context.shape(name)) for name in self.part.outputs if name not in written
            }  # fmt: skip
            for name, tensor in outputs.items():
                context.set_output(name, tensor.address)
            if repeats and key in state.graphs and self._capture(context, state, key):
                self.device.launch(state.graphs[key])
            else:
                context.enqueue()
                # TensorRT wants one run outside of a capture after every change of shapes.
                if repeats:
                    state.remember(key, outputs)
        state.swap()
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    def _capture(self, context: Any, state: _State, key: Any) -> bool:
        try:
            state.graphs[key] = self.device.capture(context.enqueue)
        except DeviceError as exc:
            if self.device.lost:
                raise
            self.graphs = False
            warnings.warn(f"The part {self.name} runs without a CUDA graph, slower: {exc}", RuntimeWarning, stacklevel=2)
            return False
        return True

    def _profile(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """The tightest profile that takes these shapes. Raises CapacityError."""
        fitting = [
            (sum(math.prod(high) for _, _, high in profile.shapes.values()), number)
            for number, profile in enumerate(self.record.key.profiles)
            if all(_within(shapes[name], profile, name) for name in profile.shapes)
        ]
        if fitting:
            return min(fitting)[1]
        largest = self.record.key.profiles[0].shapes
        name = next(n for n in largest if not _within(shapes[n], self.record.key.profiles[0], n))
        low, _, high = largest[name]
        raise CapacityError(
            f"The engine of the part {self.name} takes {name!r} from {list(low)} to {list(high)}; it was given "
            f"{list(shapes[name])}. `edgevlm build` with a larger --capacity or --max-visual-tokens makes one that takes it; "
            "visual_tokens bounds what a picture may take."
        )

    def _most_at_once(self, feeds: Mapping[str, Any]) -> int:
        """How many pictures or tiles go through side by side."""
        sizes = [
            high[0]
            for profile in self.record.key.profiles
            for name, (_, _, high) in profile.shapes.items()
            if self.part.inputs[name].shape[0] == "batch_size"
        ]
        alike = all(info.shape and info.shape[0] == "batch_size" for info in self.part.inputs.values())
        alike = alike and not any(isinstance(feed, Rows) for feed in feeds.values())
        return min(sizes) if sizes and alike else next(iter(feeds.values())).shape[0]

    def _in_place(self, name: str, feed: Any) -> DeviceTensor:
        tensor = self._place(name, feed.shape)
        if isinstance(feed, Rows):
            return self.joined(tensor, feed)
        tensor.put(feed, 0)
        return tensor

    def _place(self, name: str, shape: Sequence[int]) -> DeviceTensor:
        """Where an input or output of a step lies: always in the same place, unless it outgrows it."""
        needed = DeviceTensor.size_of(shape, self.dtype(name))
        held = self._fixed.get(name)
        if held is None or held.buffer.size < needed:
            profiles = self.record.key.profiles
            most = max((math.prod(p.shapes[name][2]) for p in profiles if name in p.shapes), default=0)
            size = max(needed, DeviceTensor.size_of((most,), self.dtype(name)))
            held = self._fixed[name] = DeviceTensor(self.device, (size,), "uint8")
        return DeviceTensor(self.device, shape, self.dtype(name), held.buffer)


class _State(State):
    def __init__(self, session: _Session, pairs: Mapping[str, str], batch: int) -> None:
        self._session, self._pairs = session, dict(pairs)
        self.capacity, self.inputs = session.record.capacity, frozenset(pairs)
        self.graphs: dict[Any, Any] = {}
        self.outputs: dict[str, DeviceTensor] = {}
        self._past = {name: self._zeros(name, batch) for name in pairs}
        in_place = session.record.aliases
        # What is not written over its input gets a second place; the two swap behind every step.
        self._present = {p: self._past[n] if in_place.get(p) == n else self._zeros(n, batch) for n, p in pairs.items()}

    def _zeros(self, name: str, batch: int) -> DeviceTensor:
        sizes = {"batch_size": batch, "capacity": self.capacity}
        shape = [sizes[d] if isinstance(d, str) else d for d in self._session.part.inputs[name].shape]
        tensor = DeviceTensor(self._session.device, shape, self._session.dtype(name))
        self._session.device.clear(tensor.address, tensor.nbytes)
        return tensor

    def grow(self, capacity: int) -> None:
        raise CapacityError(f"An engine's KV cache has {self.capacity:,} positions; {capacity:,} were asked for.")

    def read(self) -> dict[str, DeviceTensor]:
        return self._past

    def written(self) -> dict[str, DeviceTensor]:
        return self._present

    def swap(self) -> None:
        for past, present in self._pairs.items():
            self._past[past], self._present[present] = self._present[present], self._past[past]

    def remember(self, key: Any, outputs: dict[str, DeviceTensor]) -> None:
        """That a step of this key ran, so that the next one may be captured. Two: caches that swap need one graph each."""
        while len(self.graphs) > 1:
            self._drop(next(iter(self.graphs)))
        self.graphs[key], self.outputs = None, outputs

    def _drop(self, key: Any) -> None:
        if (graph := self.graphs.pop(key)) is not None:
            self._session.device.drop(graph)


def _within(shape: Sequence[int], profile: Profile, name: str) -> bool:
    low, _, high = profile.shapes[name]
    return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
