"""What sessions on a GPU have in common: feeds that go to the device, or are there, and memory for cross-attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..bundle import Part
from ..errors import DeviceError
from .base import Memory, PartSession, Tensor
from .device import Device, DeviceTensor, Rows

__all__ = ["DeviceMemory", "DeviceSession"]


class DeviceSession(PartSession):
    """A part on a GPU. Feeds may lie there already; what comes out stays there."""

    def __init__(self, name: str, part: Part, device: Device) -> None:
        super().__init__(name, part)
        self.device = device

    def dtype(self, name: str) -> str:
        """What an input or output has on the device."""
        return (self.part.inputs.get(name) or self.part.outputs[name]).dtype

    def new_memory(self, names: Sequence[str], batch: int) -> Memory:
        return DeviceMemory(self, names, batch)

    def _ready(self, name: str, feed: Tensor) -> Any:
        """Tensors on the device stay as they are, and rows apart."""
        if isinstance(feed, Rows) or (isinstance(feed, DeviceTensor) and feed.device is self.device):
            return feed
        return np.asarray(feed)

    def on_device(self, name: str, feed: Any) -> DeviceTensor:
        dtype = self.dtype(name)
        if isinstance(feed, DeviceTensor) and feed.dtype == dtype:
            return feed
        if isinstance(feed, Rows):
            return self.joined(DeviceTensor(self.device, feed.shape, dtype), feed)
        return DeviceTensor.of(self.device, np.asarray(feed), dtype)

    @staticmethod
    def joined(tensor: DeviceTensor, rows: Rows) -> DeviceTensor:
        flat, row = tensor.reshape(-1, tensor.shape[-1]), 0
        for block in rows.blocks:
            flat.put(block, row)
            row += len(block)
        return tensor

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Says in which part the device failed."""
        try:
            yield
        except DeviceError as exc:
            raise exc.within(self.name) from exc


class DeviceMemory(Memory):
    def __init__(self, session: DeviceSession, names: Sequence[str], batch: int) -> None:
        self._session, self.inputs, self.length = session, frozenset(names), 0
        self._batch = batch
        self.tensors: dict[str, DeviceTensor] = {}

    def truncate(self, length: int) -> None:
        if length < self.length:
            self._hold([], length)

    def append(self, *blocks: Mapping[str, Tensor]) -> None:
        with self._session.failures():
            self._hold(blocks, self.length)

    def _hold(self, blocks: Sequence[Mapping[str, Tensor]], kept: int) -> None:
        """The first `kept` rows and those of the blocks: new tensors, of which each head has its rows side by side."""
        length = kept + sum(next(iter(block.values())).shape[2] for block in blocks)
        held = {name: self._joined(name, [block[name] for block in blocks], kept, length) for name in self.inputs}
        self.tensors, self.length = held, length

    def _joined(self, name: str, blocks: Sequence[Tensor], kept: int, length: int) -> DeviceTensor:
        session = self._session
        _, heads, _, width = session.part.inputs[name].shape
        assert isinstance(heads, int)
        assert isinstance(width, int)
        made = DeviceTensor(session.device, (self._batch, heads, length, width), session.dtype(name))
        pieces = [(self.tensors[name], kept)] if kept else []
        for block in blocks:
            on_device = session.on_device(name, block)
            pieces.append((on_device, on_device.shape[2]))
        row = width * made.itemsize
        at = 0
        for tensor, rows in pieces:
            session.device.copy(
                made.address + at * row, tensor.address, rows * row, self._batch * heads, length * row, tensor.shape[2] * row
            )
            at += rows
        return made
