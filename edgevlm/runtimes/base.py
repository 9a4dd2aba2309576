"""What a backend is: it opens a part, and runs it. One file a backend, found by its name.

Checks live here, in the public methods; a backend implements the ones with an underscore. Nothing here knows of models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle, Part
from ..errors import BundleError
from .device import Device, DeviceTensor, Driver, Rows

__all__ = ["Backend", "Memory", "Model", "PartSession", "State", "Tensor"]

#: What goes into a part and comes out of it. numpy sees those on a device as copies.
Tensor = np.ndarray | DeviceTensor | Rows


@dataclass
class Model:
    """What the parts of one model have in common: the bundle, what is asked for, and the GPU that they share."""

    bundle: Bundle | None = None
    capacity: int | None = None
    visual_tokens: int | None = None
    """The most places that a picture may take, where its size decides."""
    threads: int | None = None
    check_files: bool = True
    devices: dict[Driver, Device] = field(default_factory=dict)

    def device(self, driver: Driver) -> Device:
        """The GPU, opened by the first part that asks. Raises DeviceError."""
        if driver not in self.devices:
            self.devices[driver] = driver.open()
        return self.devices[driver]

    def close(self) -> None:
        for device in self.devices.values():
            device.close()


class State(ABC):
    """Tensors that a part updates in place from run to run: the KV cache, `[B, heads, capacity, head_dim]` each."""

    capacity: int
    inputs: frozenset[str]
    """The part's inputs that are state, which a run is not fed with."""

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Makes room for more positions; what is stored stays."""


class Memory(ABC):
    """Tensors that a part only reads, kept on its device from run to run: cross-attention keys and values,
    `[B, heads, length, head_dim]` each, longer or shorter as pictures come and go."""

    length: int
    inputs: frozenset[str]

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Keeps the first `length` rows."""

    @abstractmethod
    def append(self, *blocks: Mapping[str, Tensor]) -> None:
        """Adds rows `[B, heads, n, head_dim]` to every tensor, those of one block behind those of the other."""


class PartSession(ABC):
    """One part, opened on one backend."""

    def __init__(self, name: str, part: Part) -> None:
        self.name, self.part = name, part

    def run(self, feeds: Mapping[str, Tensor], state: State | None = None, memory: Memory | None = None) -> dict[str, Any]:
        """Runs the part. Floating-point feeds are cast to what it takes; outputs that are state are not returned.

        Outputs may lie on a device; those of a run with state are on the host.

        Raises BundleError where names or shapes are not the part's: the bundle and the runtime disagree.
        """
        held = (state.inputs if state else frozenset()) | (memory.inputs if memory else frozenset())
        wanted = [name for name in self.part.inputs if name not in held]
        if set(feeds) != set(wanted):
            given = ", ".join(sorted(feeds)) or "none"
            raise BundleError(f"The part {self.name} takes the inputs {', '.join(wanted)}; it was given {given}.")
        ready: dict[str, Any] = {}
        # Of the dimensions that have a name, which is one size in all inputs.
        sizes: dict[str, int] = {}
        for name in memory.inputs if memory else ():
            length = self.part.inputs[name].shape[2]
            assert isinstance(length, str)
            sizes[length] = memory.length  # type: ignore[union-attr]
        for name in wanted:
            array, info = feeds[name], self.part.inputs[name]
            fits = len(array.shape) == len(info.shape) and all(
                have == (sizes.setdefault(want, have) if isinstance(want, str) else want)
                for want, have in zip(info.shape, array.shape, strict=True)
            )
            if not fits:
                raise BundleError(
                    f"The part {self.name} takes {name!r} as {list(info.shape)}; it was given {list(array.shape)}."
                )
            ready[name] = self._ready(name, array)
        return self._run(ready, state, memory)

    def close(self) -> None:  # noqa: B027  # most have nothing
        """Gives back what it holds outside of Python's memory."""

    def _ready(self, name: str, feed: Tensor) -> Any:
        """A feed as `_run` takes it."""
        return np.ascontiguousarray(feed, dtype=self.part.inputs[name].dtype)

    @abstractmethod
    def new_state(self, pairs: Mapping[str, str], batch: int, capacity: int) -> State:
        """Zeroed state tensors for the given input → output names."""

    @abstractmethod
    def new_memory(self, names: Sequence[str], batch: int) -> Memory:
        """Memory without rows for the given inputs."""

    @abstractmethod
    def _run(self, feeds: dict[str, Any], state: State | None, memory: Memory | None) -> dict[str, Any]: ...


class Backend(ABC):
    """A way to run parts, best device first in `edgevlm.runtimes.BACKENDS`."""

    name: str
    kv_dtypes: tuple[str, ...]
    """What a KV cache may be kept in: what was seen to run, not what might."""
    kv_note: str = ""
    """Why others are missing, where there is something to say."""

    def lacks(self, part: Part) -> str | None:
        """Why this backend cannot run a part at all, on any machine, or None."""
        kept = {info.dtype for name, info in part.inputs.items() if name.startswith("past_key_values.")}
        if unknown := sorted(kept - set(self.kv_dtypes)):
            note = f" ({self.kv_note})" if self.kv_note else ""
            return f"it has no KV cache in {', '.join(unknown)}, only in {', '.join(self.kv_dtypes)}{note}"
        return None

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this backend cannot be used on this machine, or None."""

    def details(self) -> str:
        """What a usable backend runs on, for people."""
        return ""

    @abstractmethod
    def open(self, path: Path, name: str, part: Part, model: Model) -> PartSession:
        """Opens a part. Raises BundleError where the file is broken, BackendUnavailable where the device is not usable."""


class BackendUnavailable(Exception):
    """The backend turned out not to be usable; the text is the reason. Never reaches the user as an exception."""
