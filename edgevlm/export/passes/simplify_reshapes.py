"""Reshapes whose target is computed from the input's own shape become reshapes to a constant.

1. A dimension that has the name (or number) of the input's dimension at the same place is copied: `0`.
2. A dimension that is a number is that number.
3. At most one dimension may be left over: `-1`.
4. Anything else stays as it is.

So `Shape → Gather → Concat → Reshape` chains die, and the graph serves every batch and length.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["run"]


def run(model: ir.Model) -> None:
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.domain:
            continue
        source, target = node.inputs[0], node.inputs[1]
        before, after = source.shape if source else None, node.outputs[0].shape
        if before is None or after is None or target is None or ir.convenience.get_const_tensor(target) is not None:
            continue
        dims: list[int] = []
        for place, dim in enumerate(after):
            same = place < len(before) and before[place] == dim
            if isinstance(dim, int):
                dims.append(dim)
            elif same and dim.value is not None:
                dims.append(0)
            else:
                dims.append(-1)
        if dims.count(-1) > 1:
            continue
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(np.array(dims, np.int64)))])
        constant.outputs[0].shape, constant.outputs[0].dtype = ir.Shape([len(dims)]), ir.DataType.INT64
        model.graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes.pop("allowzero", None)  # 0 must mean "copy", not "empty"
