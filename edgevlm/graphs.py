"""ONNX graphs on their way to and from a bundle's files: written with streamed weights, read back lazily, summed up.

`export` and `quantize` share it, so that both write the same bytes for the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir

from .bundle import Part, TensorInfo
from .errors import EdgeVLMError

__all__ = ["Progress", "load_graph", "part_record", "save_graph"]

#: Called before each tensor is written: its name, how many came before, how many there are, its bytes.
Progress = Callable[[str, int, int, int], None]

_THRESHOLD = 256  # bytes; smaller tensors stay in the graph file
_ALIGNMENT = 4096  # a page, so that ONNX Runtime can map large tensors instead of copying them


def save_graph(model: ir.Model, path: Path, progress: Progress | None = None) -> None:
    """Writes `path` and its weights beside it (`.onnx_data`), one tensor at a time."""

    def report(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        if progress:
            progress(tensor.name or "", info.index, info.total, tensor.nbytes)

    model.ir_version = 11
    data = f"{path.stem}.onnx_data"
    try:
        ir.save(
            model, path, external_data=data, size_threshold_bytes=_THRESHOLD, callback=report, max_workers=1,
            alignment=_ALIGNMENT, align_threshold=1 << 16,
        )  # fmt: skip
    except ir.serde.SerdeError as exc:  # around what is raised while a small weight is made
        cause = exc.__cause__
        while isinstance(cause, ir.serde.SerdeError):
            cause = cause.__cause__
        if isinstance(cause, EdgeVLMError):
            raise cause from None
        raise


def load_graph(path: Path) -> ir.Model:
    """The graph with its weights memory-mapped."""
    return ir.load(path)


def part_record(model: ir.Model, file: str) -> Part:
    """What the manifest says of a part."""

    def describe(values: list[ir.Value]) -> dict[str, TensorInfo]:
        return {v.name or "": TensorInfo(_dtype_name(v.dtype), _dims(v)) for v in values}

    weights: dict[str, int] = {}
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        dtype = _dtype_name(value.const_value.dtype)
        weights[dtype] = weights.get(dtype, 0) + value.const_value.nbytes
    return Part(
        file=file,
        nodes=len(model.graph),
        inputs=describe(list(model.graph.inputs)),
        outputs=describe(list(model.graph.outputs)),
        weights=dict(sorted(weights.items())),
        onnxruntime_only=tuple(sorted({reason for node in model.graph for reason in _beyond_tensorrt(node)})),
    )


def _beyond_tensorrt(node: ir.Node) -> Iterator[str]:
    """What of a node TensorRT does not build: measured with TensorRT-RTX 1.7, without a GPU."""
    if node.domain:
        yield f"{node.domain}::{node.op_type}"
    weight = node.inputs[0].const_value if node.op_type == "DequantizeLinear" and node.inputs[0] else None
    if weight is not None:
        if len(node.inputs) > 2:  # written only where they are not zero
            yield "zero points of weights"
        block = node.attributes.get_int("block_size", 0)
        if block and int(weight.shape[node.attributes.get_int("axis", 1)]) % block:  # type: ignore[arg-type]
            yield "blocks that are not all full"


def _dtype_name(dtype: ir.DataType | None) -> str:
    names = {ir.DataType.FLOAT: "float32"}
    return names.get(dtype, dtype.name.lower()) if dtype is not None else "?"


def _dims(value: ir.Value) -> tuple[int | str, ...]:
    return tuple(d if isinstance(d, int) else str(d.value or "?") for d in value.shape or ())
