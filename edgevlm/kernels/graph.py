"""Puts the operators of this folder into a graph: `DequantizeLinear` of a constant before `MatMul` becomes one operator, and
in graphs that have such products, `Attention` becomes ours.

The graph is read and written with protobuf, which ONNX Runtime brings along; the robot needs no package for graphs. Only the
fields that matter here are described, by their numbers in
https://github.com/onnx/onnx/blob/v1.19.0/onnx/onnx.proto; protobuf keeps the others as they are. Weights stay in their file.
"""

from __future__ import annotations

import functools
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["graph_with_kernels"]

_DOMAIN = "edgevlm"
#: TensorProto.DataType
_FLOAT, _UINT8, _INT8, _INT64, _BOOL, _INT4 = 1, 2, 3, 7, 9, 22
_INT_ATTRIBUTE = 2
#: Operators that make truth values, and those that hand on the type of their first input.
_TRUTH = ("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Xor")
_SAME_TYPE = ("Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze")
_EXTERNAL = 1

#: Message → field → number, type; a trailing * marks a repeated one.
_FIELDS = {
    "Model": {"graph": (7, "Graph"), "opset_import": (8, "Opset*")},
    "Opset": {"domain": (1, "string"), "version": (2, "int64")},
    "Graph": {
        "node": (1, "Node*"), "initializer": (5, "Tensor*"), "input": (11, "Value*"), "output": (12, "Value*"),
        "value_info": (13, "Value*"),
    },
    "Value": {"name": (1, "string"), "type": (2, "Type")},
    "Type": {"tensor_type": (1, "TensorType")},
    "TensorType": {"elem_type": (1, "int32"), "shape": (2, "Shape")},
    "Shape": {"dim": (1, "Dim*")},
    "Dim": {"dim_value": (1, "int64")},
    "Node": {
        "input": (1, "string*"), "output": (2, "string*"), "name": (3, "string"), "op_type": (4, "string"),
        "attribute": (5, "Attribute*"), "domain": (7, "string"),
    },
    "Attribute": {"name": (1, "string"), "i": (3, "int64"), "type": (20, "int32")},
    "Tensor": {"dims": (1, "int64*"), "data_type": (2, "int32"), "name": (8, "string"), "raw_data": (9, "bytes"),
               "data_location": (14, "int32")},
}  # fmt: skip


@functools.cache
def _model_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="edgevlm_onnx.proto", package="edgevlm_onnx", syntax="proto2")
    kinds = {"string": 9, "int64": 3, "int32": 5, "bytes": 12}
    for message, fields in _FIELDS.items():
        described = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            field = described.field.add(name=name, number=number, label=3 if kind.endswith("*") else 1)
            kind = kind.rstrip("*")
            if kind in kinds:
                field.type = kinds[kind]
            else:
                field.type, field.type_name = 11, f".edgevlm_onnx.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("edgevlm_onnx.Model"))


def graph_with_kernels(path: Path) -> bytes | None:
    """The graph of `path`, its products with quantized weights replaced; None where it has none that can be."""
    try:
        model = _model_class().FromString(path.read_bytes())
    except Exception:  # not a graph: ONNX Runtime says what is wrong with it
        return None
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    makers = {name: node for node in graph.node for name in node.output}
    added = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    gone: list[Any] = []
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        dequantize, left = makers.get(node.input[1]), makers.get(node.input[0])
        # Activations that are quantized already are multiplied as integers by ONNX Runtime.
        if dequantize is None or (left is not None and left.op_type == "DequantizeLinear"):
            continue
        if readers[node.input[1]] != 1 or (found := _operator(dequantize, weights, readers)) is None:
            continue
        product = node.output[0]
        node.op_type, node.domain = found[0], _DOMAIN
        node.input[1:] = dequantize.input
        node.attribute.extend(found[1])
        gone.append(dequantize)
        plus = added.get(product)
        if plus is not None and readers[product] == 1:
            bias = weights.get(plus.input[1 - list(plus.input).index(product)])
            if bias is not None and bias.data_type == _FLOAT and list(bias.dims) == [found[2]]:
                node.input.append(bias.name)
                node.output[0] = plus.output[0]
                gone.append(plus)
    if not gone:
        return None
    given = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    for node in graph.node:
        if node.op_type == "Attention" and _replaceable(node, makers, given):
            node.domain = _DOMAIN
            kept = [attribute for attribute in node.attribute if attribute.name == "scale"]
            del node.attribute[:]
            node.attribute.extend(kept)
    gone += _merge_attention(graph.node, weights, readers)
    removed = {id(node) for node in gone}
    kept = [node for node in graph.node if id(node) not in removed]
    packed = [weights[node.input[1]] for node in kept if node.domain == _DOMAIN and node.op_type != "Attention"]
    for tensor in packed:
        if tensor.data_type == _INT4:
            tensor.data_type, tensor.dims[1] = _UINT8, tensor.dims[1] // 2
    nodes = [node.SerializeToString() for node in kept]
    del graph.node[:], graph.value_info[:]
    for node in nodes:
        graph.node.add().ParseFromString(node)
    model.opset_import.add(domain=_DOMAIN, version=1)
    return model.SerializeToString()


def _operator(dequantize: Any, weights: dict[str, Any], readers: Counter[str]) -> tuple[str, list[Any], int] | None:
    """Operator, attributes and columns of what replaces a product with a constant, or None where that cannot be."""
    if dequantize.op_type != "DequantizeLinear" or len(dequantize.input) != 2 or readers[dequantize.input[0]] != 1:
        return None
    weight, scales = (weights.get(name) for name in dequantize.input)
    if weight is None or scales is None or scales.data_type != _FLOAT or len(weight.dims) != 2:
        return None
    # What is small lies within the graph, in a form that depends on the type.
    if weight.data_location != _EXTERNAL:
        return None
    numbers = {attribute.name: attribute.i for attribute in dequantize.attribute}
    (depth, columns), block, axis = weight.dims, numbers.get("block_size", 0), numbers.get("axis", 1) % 2
    if depth % 4:
        return None
    if weight.data_type == _INT8 and not block and axis == 1 and list(scales.dims) == [columns]:
        return "MatMulInt8", [], columns
    whole = block and block % 4 == 0 and axis == 0 and list(scales.dims) == [-(-depth // block), columns]
    if weight.data_type == _INT4 and whole and columns % 2 == 0:
        attribute = type(dequantize).DESCRIPTOR.fields_by_name["attribute"].message_type._concrete_class
        return "MatMulInt4", [attribute(name="block_size", i=block, type=_INT_ATTRIBUTE)], columns
    return None


def _merge_attention(nodes: Sequence[Any], weights: dict[str, Any], readers: Counter[str]) -> list[Any]:
    """Attention over pieces of the queries, which keeps ONNX Runtime's scores small, becomes one: ours keeps no more than those
    of a tile, and would prepare the keys for every piece. Returns what is no longer needed."""
    makers = {name: node for node in nodes for name in node.output}
    gone = []
    for concat in nodes:
        pieces: list[Any] = [makers.get(name) for name in concat.input]
        if concat.op_type != "Concat" or not all(_is_plain_attention(piece) for piece in pieces):
            continue
        if {attribute.i for attribute in concat.attribute} != {2} or any(readers[name] != 1 for name in concat.input):
            continue
        first, whole, between = pieces[0], set[str](), list[Any]()
        for number, piece in enumerate(pieces):
            squeeze: Any = makers.get(piece.input[0])
            cut: Any = makers.get(squeeze.input[0]) if squeeze is not None and squeeze.op_type == "Squeeze" else None
            if cut is None or cut.op_type != "Slice" or len(cut.input) != 4 or list(piece.input[1:]) != list(first.input[1:]):
                break
            numbers = [_integers(weights.get(name)) for name in (*cut.input[1:], *squeeze.input[1:2])]
            if numbers != [[number], [number + 1], [2], [2]] or readers[cut.output[0]] != 1 or readers[squeeze.output[0]] != 1:
                break
            whole.add(cut.input[0])
            between += [cut, squeeze, piece]
        else:
            divided: Any = makers.get(whole.pop()) if len(whole) == 1 else None
            shape = _integers(weights.get(divided.input[1])) if divided is not None and divided.op_type == "Reshape" else None
            if shape is not None and len(shape) == 5 and shape[2] == len(pieces):
                concat.op_type, concat.domain = "Attention", _DOMAIN
                del concat.attribute[:]
                concat.attribute.extend(first.attribute)
                concat.input[:] = [divided.input[0], *first.input[1:]]
                gone += [*between, *([divided] if readers[divided.output[0]] == len(pieces) else [])]
    return gone


def _is_plain_attention(node: Any) -> bool:
    return node is not None and node.op_type == "Attention" and node.domain == _DOMAIN and len(node.input) == 3


def _integers(tensor: Any) -> list[int] | None:
    """Of a small constant of int64."""
    if tensor is None or tensor.data_type != _INT64 or tensor.data_location == _EXTERNAL:
        return None
    return [value for (value,) in struct.iter_unpack("<q", tensor.raw_data)]


def _replaceable(node: Any, makers: dict[str, Any], given: dict[str, int]) -> bool:
    """Whether our attention does what this one does: four-dimensional inputs, a scale, and at most a mask of truth values."""
    if node.domain or len(node.output) != 1 or len(node.input) > 4:
        return False
    # A scale says that inputs are four-dimensional here: with head counts as attributes, they have three.
    if {attribute.name for attribute in node.attribute} != {"scale"}:
        return False
    return len(node.input) < 4 or not node.input[3] or _is_truth(node.input[3], makers, given)


def _is_truth(name: str, makers: dict[str, Any], given: dict[str, int]) -> bool:
    if name in given:
        return given[name] == _BOOL
    node = makers.get(name)
    if node is None:
        return False
    if node.op_type == "Cast":
        return any(attribute.name == "to" and attribute.i == _BOOL for attribute in node.attribute)
    inputs = node.input[1:] if node.op_type == "Where" else node.input
    return node.op_type in _TRUTH or (node.op_type in (*_SAME_TYPE, "Where") and _is_truth(inputs[0], makers, given))
