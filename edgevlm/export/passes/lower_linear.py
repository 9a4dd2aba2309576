"""`edgevlm::Linear(x, weight, bias?)` becomes `MatMul(x, weightᵀ)` and, with a bias, `Add`.

1. The weight initializer keeps its name and gets the shape `[in, out]`; metadata says that it is stored transposed.
   `[in, out]` is what block-wise DequantizeLinear on axis 0 and MatMul fuse with in ONNX Runtime.
2. An input of two dimensions gets a leading 1 for the product: ONNX Runtime would make a `Gemm` of it and its bias, which it
   does not fuse with quantized weights, and dequantize them at every run.
3. A weight that something else reads too (a tied embedding inside one part) gets a second, transposed initializer.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["TRANSPOSED", "run"]

#: Metadata of an initializer: it holds its parameter transposed.
TRANSPOSED = "edgevlm.transposed"


def run(model: ir.Model) -> None:
    graph = model.graph
    for node in list(graph):
        if (node.domain, node.op_type) != ("edgevlm", "Linear"):
            continue
        if node.outputs[0].shape is not None and len(node.outputs[0].shape) == 2:
            _lift(graph, node)
        x, weight, *bias = node.inputs
        assert x is not None
        assert weight is not None
        assert weight.shape is not None
        matmul = ir.Node("", "MatMul", [x, _transposed(graph, weight)], name=node.name)
        _describe(matmul.outputs[0], node.outputs[0])
        new = [matmul]
        if bias:
            new.append(ir.Node("", "Add", [matmul.outputs[0], bias[0]], name=f"{node.name}_bias"))
            _describe(new[-1].outputs[0], node.outputs[0])
        graph.insert_before(node, new)
        name = node.outputs[0].name
        ir.convenience.replace_all_uses_with(node.outputs[0], new[-1].outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        new[-1].outputs[0].name = name
    model.opset_imports.pop("edgevlm", None)


def _lift(graph: ir.Graph, node: ir.Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    assert x.shape is not None
    assert y.shape is not None
    axis = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor([0]))])
    axis.outputs[0].shape, axis.outputs[0].dtype = ir.Shape([1]), ir.DataType.INT64
    lifted = ir.Node("", "Unsqueeze", [x, axis.outputs[0]])
    lifted.outputs[0].shape, lifted.outputs[0].type = ir.Shape([1, *x.shape]), x.type
    flat = ir.Node("", "Squeeze", [y, axis.outputs[0]])
    _describe(flat.outputs[0], y)
    ir.convenience.replace_all_uses_with(y, flat.outputs[0], replace_graph_outputs=True)
    flat.replace_input_with(0, y)
    graph.insert_before(node, [axis, lifted])
    graph.insert_after(node, flat)
    node.replace_input_with(0, lifted.outputs[0])
    flat.outputs[0].name, y.name = y.name, f"{y.name}_lifted"
    y.shape = ir.Shape([1, *y.shape])


def _describe(value: ir.Value, like: ir.Value) -> None:
    value.shape, value.type = like.shape, like.type


def _transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    assert weight.shape is not None
    assert weight.name is not None
    if all(use.node.op_type == "Linear" for use in weight.uses()) and TRANSPOSED not in weight.metadata_props:
        out, in_ = weight.shape
        weight.shape = ir.Shape([in_, out])
        weight.metadata_props[TRANSPOSED] = "1"
    if TRANSPOSED in weight.metadata_props:
        return weight
    name = f"{weight.name}.transposed"
    if name not in graph.initializers:
        out, in_ = weight.shape
        twin = ir.Value(name=name, shape=ir.Shape([in_, out]), type=weight.type)
        twin.metadata_props.update(weight.metadata_props | {TRANSPOSED: "1"})
        graph.register_initializer(twin)
    return graph.initializers[name]
