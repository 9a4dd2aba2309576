"""A recipe applied to a graph, and `edgevlm quantize`: a float bundle becomes a quantized one, without torch.

In the standard form that ONNX Runtime and TensorRT both read:

    MatMul(x, W)     → MatMul(x, DequantizeLinear(Wq, scales))        int8: axis 1; int4: axis 0 with block_size
    Gather(W, ids)   → Mul(Cast(Gather(Wq, ids)), Gather(scales, ids))

Weights are quantized when they are written, one at a time. Quantizing while exporting is the same code on the same
graph, hence the same bytes. It knows nothing of families or backends.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..bundle import Bundle, Part, check_output, publish_bundle, seal
from ..errors import RecipeError
from ..graphs import Progress, load_graph, part_record, save_graph
from ..tensors import StreamedTensor
from . import rtn
from .recipe import Recipe, Rule, load_recipe

__all__ = ["quantize_bundle", "quantize_graph"]


def quantize_bundle(
    source: str | Path,
    output: str | Path,
    recipe: str | Path | Recipe,
    *,
    force: bool = False,
    progress: Progress | None = None,
    stage: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Writes a quantized copy of a float bundle. Raises RecipeError, BundleError, OutputError."""
    chosen = load_recipe(recipe)
    check_output(output, force=force)
    bundle = Bundle.open(source)
    manifest = bundle.manifest
    if manifest.recipe is not None:
        raise RecipeError(
            f"{source} is already quantized with the recipe {manifest.recipe.get('name')!r}. "
            "Quantize the float bundle it came from."
        )
    with publish_bundle(output, force=force) as folder:
        graph_files = {name for part in manifest.parts.values() for name in (part.file, f"{part.file}_data")}
        parts: dict[str, Part] = {}
        for name, part in manifest.parts.items():
            stage(f"quantizing {name}")
            graph = load_graph(bundle.part_path(name))
            quantize_graph(graph, name, chosen)
            (folder / part.file).parent.mkdir(parents=True, exist_ok=True)
            save_graph(graph, folder / part.file, progress)
            parts[name] = part_record(graph, part.file)
        for name in sorted(set(manifest.files) - graph_files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(name), folder / name)
        seal(folder, dataclasses.replace(manifest, parts=parts, recipe=chosen.to_dict()))
    return Bundle.open(output, check_files=False)


def quantize_graph(model: ir.Model, part: str, recipe: Recipe) -> None:
    """Rewrites, in place, every MatMul and Gather whose weight the recipe quantizes."""
    graph = model.graph
    for node in list(graph):
        place = {"MatMul": 1, "Gather": 0}.get(node.op_type)
        weight = node.inputs[place] if place is not None else None
        if weight is None or not _is_weight(weight):
            continue
        assert weight.name is not None
        rule = recipe.rule_for(part, weight.name)
        if rule.method == "float":
            continue
        if node.op_type == "MatMul":
            node.replace_input_with(1, _dequantized(graph, node, weight, rule))
        else:
            _quantize_gather(graph, node, weight)
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[value.name]  # type: ignore[arg-type]


def _is_weight(value: ir.Value) -> bool:
    tensor = value.const_value
    return (
        value.is_initializer()
        and tensor is not None
        and len(tensor.shape) == 2
        and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    )


def _dequantized(graph: ir.Graph, node: ir.Node, weight: ir.Value, rule: Rule) -> ir.Value:
    quantized, scales = (f"{weight.name}.{rule.method}", f"{weight.name}.scales")
    if quantized in graph.initializers:  # two readers of one weight
        return next(iter(graph.initializers[quantized].uses())).node.outputs[0]
    tensor = weight.const_value
    assert tensor is not None
    inner, outer = (int(d) for d in tensor.shape)  # type: ignore[arg-type]
    scale_dtype = tensor.dtype.numpy()
    if rule.method == "int4":
        lazy = _Quantized(lambda: rtn.quantize_int4(tensor, rule.block_size, scale_dtype))
        shape: tuple[int, ...] = (-(-inner // rule.block_size), outer)
        dtype = ir.DataType.INT4
        attributes = [ir.AttrInt64("axis", 0), ir.AttrInt64("block_size", rule.block_size)]
    else:
        lazy = _Quantized(lambda: rtn.quantize_int8(tensor, scale_dtype))
        shape, dtype = (outer,), ir.DataType.INT8
        attributes = [ir.AttrInt64("axis", 1)]
    inputs = [
        _initializer(graph, quantized, dtype, (inner, outer), lazy.weight),
        _initializer(graph, scales, tensor.dtype, shape, lazy.scales),
    ]
    dequantize = ir.Node("", "DequantizeLinear", inputs, attributes, name=f"{node.name}_dequantize")
    output = dequantize.outputs[0]
    output.name, output.shape, output.dtype = f"{weight.name}.dequantized", ir.Shape([inner, outer]), tensor.dtype
    graph.insert_before(node, dequantize)
    return output


def _quantize_gather(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    # DequantizeLinear has no scale for each row of what a Gather picks, so the two factors are gathered and multiplied.
    # Four bits would save little here (one table of the model) and Gather takes no INT4.
    tensor = weight.const_value
    assert tensor is not None
    lazy = _Quantized(lambda: rtn.quantize_int8_rows(tensor, tensor.dtype.numpy()))
    rows, width = (int(d) for d in tensor.shape)  # type: ignore[arg-type]
    table = _initializer(graph, f"{weight.name}.int8", ir.DataType.INT8, (rows, width), lazy.weight)
    scales = _initializer(graph, f"{weight.name}.scales", tensor.dtype, (rows, 1), lazy.scales)
    ids, old = node.inputs[1], node.outputs[0]
    picked = ir.Node("", "Gather", [table, ids], name=f"{node.name}_rows")
    cast = ir.Node("", "Cast", [picked.outputs[0]], [ir.AttrInt64("to", int(tensor.dtype))], name=f"{node.name}_cast")
    scale = ir.Node("", "Gather", [scales, ids], name=f"{node.name}_scales")
    product = ir.Node("", "Mul", [cast.outputs[0], scale.outputs[0]], name=f"{node.name}_dequantize")
    product.outputs[0].shape, product.outputs[0].type = old.shape, old.type
    for step in (picked, cast, scale):
        step.outputs[0].name = step.name
    graph.insert_before(node, [picked, cast, scale, product])
    name = old.name
    ir.convenience.replace_all_uses_with(old, product.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    product.outputs[0].name = name


class _Quantized:
    """A weight and its scales, computed together when the first of them is written, and kept until both were."""

    def __init__(self, compute: Callable[[], tuple[Any, np.ndarray]]) -> None:
        self._compute = compute
        self._pair: dict[str, Any] = {}

    def _take(self, which: str) -> Any:
        if which not in self._pair:
            self._pair = dict(zip(("weight", "scales"), self._compute(), strict=True))
        return self._pair.pop(which)

    def weight(self) -> Any:
        """An array, or what makes its rows in blocks."""
        return self._take("weight")

    def scales(self) -> np.ndarray:
        array: np.ndarray = self._take("scales")
        return array


def _initializer(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Callable[[], Any]
) -> ir.Value:
    def tensor() -> ir.TensorProtocol:
        array = compute()
        if dtype == ir.DataType.INT4:
            return ir.PackedTensor(array, dtype, shape=ir.Shape(shape), name=name)
        return ir.Tensor(array, dtype=dtype, name=name)

    lazy: ir.TensorProtocol
    if dtype == ir.DataType.INT8:
        lazy = StreamedTensor(lambda: compute()(), dtype, shape, name)
    else:
        lazy = ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=lazy)
    graph.register_initializer(value)
    return value
