"""What the exporter leaves behind: foldable constants, equal subgraphs, identities, unused nodes.

All of it is done by passes of onnx_ir and onnxscript. Weights have no value while a graph is canonical, so nothing
here can fold, merge or rename them.
"""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as library
from onnxscript.optimizer import fold_constants

__all__ = ["name_values", "run"]


_SMALL = 4096  # elements; larger constants are tables, not shapes and scalars


def run(model: ir.Model) -> None:
    # It warns of every initializer without a value, which here is every weight.
    logging.getLogger(library.initializer_deduplication.__name__).setLevel(logging.ERROR)
    fold_constants(model, onnx_shape_inference=False)
    Sequential(
        library.IdentityEliminationPass(),
        library.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        library.DeduplicateInitializersPass(size_limit=_SMALL),
        library.CommonSubexpressionEliminationPass(),
        library.RemoveUnusedNodesPass(),
        library.RemoveUnusedOpsetsPass(),
    )(model)


def name_values(model: ir.Model) -> None:
    """Numbers values and nodes by their order, and drops what the trace noted: the same graph gives the same bytes."""
    for number, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{number}"
        node.doc_string = None
        node.metadata_props.clear()
        for place, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.name = f"{node.op_type}_{number}_{place}"
    constants = 0
    for value in list(model.graph.initializers.values()):
        if "edgevlm.parameter" not in value.metadata_props:
            value.name = f"constant_{constants}"
            constants += 1
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name, model.graph.doc_string, model.doc_string = "edgevlm", None, None
    model.producer_name, model.producer_version = "edgevlm", None
