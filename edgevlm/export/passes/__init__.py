"""Graph passes, one a file, each `run(model) -> None` on an onnx_ir model, in place.

`canonical_graph` is the order in which a traced graph becomes the bundle's standard form.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as library

from . import lower_linear, simplify_reshapes, tidy

__all__ = ["canonical_graph"]


def canonical_graph(model: ir.Model) -> None:
    """Standard operators only, constants folded, no dead or repeated node, small constants as initializers."""
    lower_linear.run(model)
    tidy.run(model)
    simplify_reshapes.run(model)
    tidy.run(model)
    library.TopologicalSortPass()(model)
    tidy.name_values(model)
