"""`edgevlm::Linear(x, weight, bias?)` becomes `MatMul(x, weightᵀ)` and, with a bias, `Add`.

1. The weight initializer keeps its name and gets the shape `[in, out]`; metadata says that it is stored transposed.
   `[in, out]` is what block-wise DequantizeLinear on axis 0 and MatMul fuse with in ONNX Runtime.
2. A weight that something else reads too (a tied embedding inside one part) gets a second, transposed initializer.
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
