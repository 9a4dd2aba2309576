"""Exact rescaling of what goes into linear layers, so that the graph gains no operator.

A layer's input `x` divided by factors, and the rows of its weights multiplied by them, is the same function. The division goes
into what makes `x`: the scale of a norm, the columns and bias of a linear layer, through what commutes with it (a product with
something else, ReLU, reshapes that keep the last dimension, attention, whose output is linear in the values). AWQ and
SmoothQuant choose the factors. It knows nothing of methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .rtn import stored_matrix

__all__ = ["Fold", "consumers_of", "find_fold", "scale_rows", "weight_of"]

_KEEPS_LAST = ("Unsqueeze", "Squeeze", "Reshape")


@dataclass
class Fold:
    """A place that takes a division of `width` numbers. `divide` does it; numbers that share a place in `groups` of the same
    number (`[width]`, or None) must share a factor. `cached` names the values that are divided on their way into the KV
    cache."""

    width: int
    divide: Callable[[np.ndarray], None]
    groups: np.ndarray | None = None
    cached: str | None = None

    def tie(self, factors: np.ndarray) -> np.ndarray:
        """The factors `[width]`, equal (geometric mean) where they must be."""
        if self.groups is None:
            return factors
        sums = np.bincount(self.groups, np.log(factors))
        return np.exp(sums / np.bincount(self.groups))[self.groups].astype(factors.dtype)

    def shared(self, factors: np.ndarray) -> np.ndarray:
        """One factor a group, in the order of the groups."""
        if self.groups is None:
            return factors
        own = np.empty(self.groups.max() + 1, factors.dtype)
        own[self.groups] = factors
        return own


def weight_of(node: ir.Node) -> ir.Value | None:
    """The weight `[K, N]` of a linear layer."""
    value = node.inputs[1] if node.op_type == "MatMul" and not node.domain else None
    if value is None or not value.is_initializer() or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    return value if value.const_value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16) else None


def consumers_of(value: ir.Value) -> list[ir.Node] | None:
    """The linear layers that read a value, directly or reshaped; None where something else reads it too."""
    found: list[ir.Node] = []
    if value.is_graph_output():
        return None
    for use in value.uses():
        node = use.node
        if weight_of(node) is not None and use.idx == 0:
            found.append(node)
        elif node.op_type in _KEEPS_LAST and use.idx == 0 and _keeps_last(node):
            more = consumers_of(node.outputs[0])
            if more is None:
                return None
            found += more
        else:
            return None
    return found


def origin_of(value: ir.Value) -> ir.Value:
    """What a value is before reshapes that keep its last dimension, as long as nothing else reads them."""
    node = value.producer()
    while node is not None and node.op_type in _KEEPS_LAST and _keeps_last(node) and node.inputs[0] is not None:
        if len(list(node.inputs[0].uses())) > 1 or node.inputs[0].is_graph_output():
            break
        value = node.inputs[0]
        node = value.producer()
    return value


def find_fold(value: ir.Value, graph: ir.Graph) -> Fold | None:
    """Where a division of `value`, along its last dimension, can go; None where nothing takes it."""
    node = value.producer()
    if node is None or node.domain or value.is_graph_output():
        return None
    if node.op_type in ("RMSNormalization", "LayerNormalization"):
        own = [v for v in node.inputs[1:3] if v is not None]
        if not all(_only_here(v) for v in own):
            return None
        return Fold(_width(own[0]), lambda factors: _divide_all(own, factors))
    if node.op_type == "MatMul":
        weight = weight_of(node)
        if weight is None or not _only_here(weight):
            return None
        return Fold(_width(weight), lambda factors: _divide(weight, factors))
    if node.op_type == "Add":
        bias = next((v for v in node.inputs if v is not None and v.is_initializer()), None)
        rest = next((v for v in node.inputs if v is not None and v is not bias), None)
        if bias is None or rest is None or not _only_here(bias) or not _read_once(rest):
            return None
        inner = find_fold(rest, graph)
        if inner is None or inner.width != _width(bias):
            return None

        def divide(factors: np.ndarray) -> None:
            inner.divide(factors)
            _divide(bias, factors)

        return Fold(inner.width, divide, inner.groups)
    if node.op_type == "Mul":
        for factor in node.inputs[::-1]:
            if factor is not None and not factor.is_initializer() and _read_once(factor):
                found = find_fold(factor, graph)
                if found is not None and found.groups is None and found.width == _last(value):
                    return found
        return None
    if node.op_type == "Relu" or (node.op_type in _KEEPS_LAST and _keeps_last(node)):
        source = node.inputs[0]
        return find_fold(source, graph) if source is not None and _read_once(source) else None
    if node.op_type == "Reshape":
        return _through_attention(node, graph)
    return None


def _through_attention(reshape: ir.Node, graph: ir.Graph) -> Fold | None:
    """`x = Reshape(Transpose(Attention(q, k, v)))`: into the linear layer that makes the values."""
    transpose = _made_by(reshape.inputs[0], "Transpose")
    attention = _made_by(transpose.inputs[0], "Attention") if transpose is not None else None
    if transpose is None or attention is None or _permutation(transpose) != [0, 2, 1, 3]:
        return None
    values = attention.inputs[2]
    if values is None or len(list(values.uses())) != 1:
        return None
    scatter = values.producer()
    if scatter is not None and scatter.op_type == "TensorScatter":  # into the cache, whose content is divided then
        values = scatter.inputs[1]
    if values is None or (values.is_graph_output() and scatter is None):
        return None
    back = _made_by(values, "Transpose")
    heads = _made_by(back.inputs[0], "Reshape") if back is not None else None
    if back is None or heads is None or heads.inputs[0] is None or _permutation(back) != [0, 2, 1, 3]:
        return None
    shape, out = heads.outputs[0].shape, attention.outputs[0].shape
    if shape is None or out is None or not all(isinstance(d, int) for d in (shape[2], shape[3], out[1], out[3])):
        return None
    kv_heads, width, query_heads = int(shape[2]), int(shape[3]), int(out[1])  # type: ignore[arg-type]
    if out[3] != width or query_heads % kv_heads or not _read_once(heads.inputs[0]):
        return None
    inner = find_fold(heads.inputs[0], graph)
    if inner is None or inner.width != kv_heads * width or inner.groups is not None:
        return None
    # Which number of the values each number of the output comes from.
    source = np.arange(kv_heads * width).reshape(kv_heads, 1, width).repeat(query_heads // kv_heads, 1).reshape(-1)

    fold = Fold(query_heads * width, lambda factors: inner.divide(fold.shared(factors)), source)
    fold.cached = values.name if scatter is not None and scatter.op_type == "TensorScatter" else None
    return fold


def scale_rows(weight: ir.Value, factors: np.ndarray) -> None:
    """Multiplies the rows of a weight `[K, N]` by factors `[K]`."""
    _replace(weight, stored_matrix(weight.const_value) * factors[:, None].astype(np.float32))


def _divide(value: ir.Value, factors: np.ndarray) -> None:
    assert value.const_value is not None
    array = stored_matrix(value.const_value)
    _replace(value, array / factors.astype(np.float32))


def _divide_all(values: list[ir.Value], factors: np.ndarray) -> None:
    for value in values:
        _divide(value, factors)


def _replace(value: ir.Value, array: np.ndarray) -> None:
    assert value.const_value is not None
    value.const_value = ir.Tensor(array.astype(value.const_value.dtype.numpy()), name=value.name)


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The operator that makes a value which nothing else reads."""
    node = value.producer() if value is not None and _read_once(value) else None
    return node if node is not None and node.op_type == op_type else None


def _read_once(value: ir.Value) -> bool:
    return len(list(value.uses())) == 1 and not value.is_graph_output()


def _only_here(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and len(list(value.uses())) == 1


def _width(value: ir.Value) -> int:
    assert value.const_value is not None
    return int(value.const_value.shape[-1]) if len(value.const_value.shape) else 1  # type: ignore[arg-type]


def _last(value: ir.Value) -> object:
    return value.shape[-1] if value.shape is not None and len(value.shape) else None


def _permutation(node: ir.Node) -> list[int]:
    attribute = node.attributes.get("perm")
    return list(attribute.as_ints()) if attribute is not None else []


def _keeps_last(node: ir.Node) -> bool:
    """Whether a reshape leaves the last dimension as it is."""
    source = node.inputs[0]
    before, after = (_last(source) if source is not None else None), _last(node.outputs[0])
    return isinstance(before, int) and before == after
