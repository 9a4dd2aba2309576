"""A GPU for tests, behind the same seam as the real one: memory is numpy, work waits in a queue until somebody
synchronizes, and an engine runs its part's ONNX graph, in ONNX Runtime, over that memory.

It finds use after free, double free, addresses and shapes that were not set, profiles that do not take a shape, and pinned
memory that changes under a copy; it can be told to run out of memory, and to be lost.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgevlm.bundle import Bundle, sha256_of
from edgevlm.engines.profiles import limits_for, profiles_for
from edgevlm.engines.record import EngineKey, EngineRecord, Host, engine_folder, part_hashes, read_records, write_records
from edgevlm.errors import DeviceError
from edgevlm.runtimes.device import Context, Device, Driver, LoadedEngine

HOST = Host("tensorrt-rtx", "1.7.1.116", "sm89", "Fake GeForce")
FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class FakeDevice(Device):
    def __init__(self, driver: FakeDriver) -> None:
        super().__init__()
        self.driver = driver
        self._grave: list[Any] = []  # so that no address comes twice
        self.live: dict[int, np.ndarray] = {}
        self._freed: set[int] = set()
        self.foreign: dict[int, np.ndarray] = {}
        self.pinned: list[np.ndarray] = []
        self.queue: list[Callable[[], None]] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.downloads: list[int] = []
        self.uploads: list[int] = []
        self.launches = self.captures = self.operations = 0

    def _queued(self, work: Callable[[], None]) -> None:
        self.check()
        self.operations += 1
        if self.driver.lose_at is not None and self.operations >= self.driver.lose_at:
            self.lost = DeviceError("The GPU failed (cudaErrorLaunchFailure). Load it again.", lost=True)
            raise self.lost
        (self.queue if self.capturing is None else self.capturing).append(work)

    def check(self) -> None:
        assert not self.closed, "the device is closed"
        if self.lost is not None:
            raise self.lost

    def bytes(self, address: int, size: int) -> np.ndarray:
        for first, memory in (*self.live.items(), *self.foreign.items()):
            if first <= address and address + size <= first + len(memory):
                return memory[address - first : address - first + size]
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated")

    def lend(self, owner: Any, address: int, size: int) -> None:
        """Memory of somebody else, who is held here: what is queued may still read it."""
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        self.foreign[address] = memory
        self._grave.append(owner)

    @property
    def used(self) -> int:
        return sum(map(len, self.live.values()))

    def allocate(self, size: int) -> int:
        self.check()
        if self.used + size > self.driver.memory_size:
            raise DeviceError("The GPU's memory is full (fake). Load with a smaller capacity.")
        room = np.full(size + 256, 0xA5, np.uint8)
        address = -(-room.ctypes.data // 256) * 256
        self.live[address] = room[address - room.ctypes.data :][:size]
        return address

    def free(self, address: int) -> None:
        assert address in self.live, "never allocated"
        assert address not in self._freed, "freed twice"
        self._freed.add(address)

        def work() -> None:  # behind the work that uses it
            if address in self.live:
                self._grave.append(self.live.pop(address))
            self._freed.discard(address)

        self.queue.append(work)

    def pin(self, size: int) -> np.ndarray:
        self.check()
        self.pinned.append(np.zeros(size, np.uint8))
        return self.pinned[-1]

    def unpin(self, memory: np.ndarray) -> None:
        self.pinned = [one for one in self.pinned if one is not memory]

    def _is_pinned(self, memory: np.ndarray) -> bool:
        return any(np.shares_memory(one, memory) for one in self.pinned)

    def upload(self, to: int, memory: np.ndarray) -> None:
        assert self._is_pinned(memory)
        self.uploads.append(memory.nbytes)

        def work() -> None:
            self.bytes(to, memory.nbytes)[:] = memory

        self._queued(work)

    def download(self, memory: np.ndarray, source: int) -> None:
        assert self._is_pinned(memory)
        self.downloads.append(memory.nbytes)

        def work() -> None:
            memory[:] = self.bytes(source, memory.nbytes)

        self._queued(work)

    def copy(self, to: int, source: int, width: int, rows: int = 1, to_pitch: int = 0, source_pitch: int = 0) -> None:
        def work() -> None:
            for row in range(rows):
                self.bytes(to + row * to_pitch, width)[:] = self.bytes(source + row * source_pitch, width)

        self._queued(work)

    def clear(self, address: int, size: int) -> None:
        self._queued(lambda: self.bytes(address, size).fill(0))

    def wait(self) -> None:
        self.check()
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def capture(self, work: Callable[[], None]) -> Any:
        self.captures += 1
        if self.driver.no_graphs:
            raise DeviceError("This work cannot be captured (fake).")
        self.capturing = []
        try:
            work()
            return list(self.capturing)
        finally:
            self.capturing = None

    def launch(self, graph: Any) -> None:
        self.launches += 1
        for work in graph:
            self._queued(work)

    def drop(self, graph: Any) -> None:
        assert isinstance(graph, list)

    def memory(self) -> tuple[int, int]:
        return self.driver.memory_size - self.used, self.driver.memory_size

    def release(self) -> None:
        self.live.clear()
        self.pinned.clear()
        self.queue.clear()


class FakeEngine(LoadedEngine):
    """Runs the part's own graph; with the capacity, dtypes and profiles of the record."""

    def __init__(self, device: FakeDevice, bundle: Bundle, part: str, record: EngineRecord) -> None:
        self.device, self.part, self.record, self.scratch = device, bundle.manifest.parts[part], record, 4096
        self.weights = device.allocate(record.size)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(bundle.part_path(part)), options, providers=["CPUExecutionProvider"])
        self.shapes = functools.lru_cache(maxsize=None)(self._shapes)

    def dtype(self, name: str) -> str:
        info = self.part.inputs.get(name) or self.part.outputs[name]
        return self.record.dtypes.get(name, info.dtype)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: array.astype(self.part.inputs[name].dtype) for name, array in feeds.items()}
        names = list(self.part.outputs)
        return dict(zip(names, self.session.run(names, given), strict=True))

    def _shapes(self, inputs: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, tuple[int, ...]]:
        zeros = {name: np.zeros(shape, self.part.inputs[name].dtype) for name, shape in inputs}
        return {name: array.shape for name, array in self.run(zeros).items()}

    def context(self, profile: int) -> Context:
        return FakeContext(self, profile)

    def close(self) -> None:
        self.device.live.pop(self.weights, None)


class FakeContext(Context):
    def __init__(self, engine: FakeEngine, profile: int) -> None:
        self.engine, self.profile = engine, engine.record.key.profiles[profile]
        self.inputs: dict[str, tuple[tuple[int, ...], int]] = {}
        self.outputs: dict[str, int] = {}

    def set_input(self, name: str, shape: Sequence[int], address: int) -> None:
        if name in self.profile.shapes:
            low, _, high = self.profile.shapes[name]
            assert all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)), (name, shape, low, high)
        assert address % 2 == 0
        self.inputs[name] = tuple(shape), address

    def set_output(self, name: str, address: int) -> None:
        self.outputs[name] = address

    def shape(self, name: str) -> tuple[int, ...]:
        assert set(self.inputs) == set(self.engine.part.inputs)
        return self.engine.shapes(tuple((n, shape) for n, (shape, _) in self.inputs.items()))[name]

    def enqueue(self) -> None:
        engine, device = self.engine, self.engine.device
        assert device.scratch is not None
        assert device.scratch.size >= engine.scratch
        assert set(self.inputs) == set(engine.part.inputs)
        assert set(self.outputs) == set(engine.part.outputs)
        inputs, outputs = dict(self.inputs), dict(self.outputs)

        def work() -> None:
            feeds = {}
            for name, (shape, address) in inputs.items():
                dtype = np.dtype(engine.dtype(name))
                feeds[name] = device.bytes(address, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape).copy()
            for name, array in engine.run(feeds).items():
                content = np.ascontiguousarray(array, dtype=engine.dtype(name)).reshape(-1).view(np.uint8)
                device.bytes(outputs[name], content.nbytes)[:] = content

        device._queued(work)


class FakeDriver(Driver):
    """What is installed here, as a test wants it."""

    def __init__(self, *, memory_size: int = 1 << 32, no_graphs: bool = False) -> None:
        self.memory_size, self.no_graphs = memory_size, no_graphs
        self.lose_at: int | None = None
        self.reason: str | None = None
        self.found: Mapping[str, Host] | str = {HOST.flavour: HOST}
        self.devices: list[FakeDevice] = []

    def missing(self) -> str | None:
        return self.reason

    def hosts(self) -> Mapping[str, Host] | str:
        return self.found

    def open(self) -> Device:
        self.devices.append(FakeDevice(self))
        return self.devices[-1]

    def load(self, device: Device, flavour: str, plan: Path) -> LoadedEngine:
        assert isinstance(device, FakeDevice)
        folder = plan.parent.parent.parent
        return FakeEngine(device, Bundle.open(folder, check_files=False), plan.stem, read_records(plan.parent)[plan.stem])


def plan_bytes(version: bytes = bytes((1, 7, 1, 116)), sms: bytes = b"sm86 sm89 ") -> bytes:
    """A plan's beginning, and the text in it that names its cards."""
    body = b"accelerators={*}...accelerators={" + sms + b"}" + bytes(100)
    return struct.pack("<4s12xQ", b"vtrt", 28 + len(body)) + version + body


def add_engines(
    bundle: Path, *, target: str = "rtx-4090", precision: str = "fp32",
    capacity: int | None = None, visual_tokens: int | None = None, parts: Sequence[str] | None = None, in_place: bool = True,
) -> None:  # fmt: skip
    """Engines for `HOST`, as `edgevlm build` records them; `in_place=False`: as old TensorRT has them."""
    opened = Bundle.open(bundle, check_files=False)
    manifest, kind = opened.manifest, FLOATS[precision]
    limits = limits_for(manifest, capacity=capacity, visual_tokens=visual_tokens)
    folder = engine_folder(opened, target)
    folder.mkdir(parents=True)
    records = {}
    for name in parts or manifest.parts:
        part, path = manifest.parts[name], folder / f"{name}.plan"
        path.write_bytes(plan_bytes())
        graph, weights = part_hashes(opened, name)
        key = EngineKey(
            graph, weights, HOST.flavour, HOST.version, (HOST.capability,), "", precision,
            profiles_for(name, part, manifest, limits),
        )  # fmt: skip
        tensors = part.inputs | part.outputs
        dtypes = {n: kind for n, info in tensors.items() if info.dtype in ("float32", "float16") and info.dtype != kind}
        pasts = [n for n in part.inputs if n.startswith("past_key_values.")]
        aliases = {n.replace("past_key_values", "present"): n for n in pasts} if in_place else {}
        records[name] = EngineRecord(
            key, sha256_of(path), path.stat().st_size, limits.capacity, limits.visual_tokens, dtypes, aliases, {}, 0.1
        )
    write_records(folder, records)


def changed_host(**facts: str) -> dict[str, Host]:
    host = replace(HOST, **facts)
    return {host.flavour: host}
