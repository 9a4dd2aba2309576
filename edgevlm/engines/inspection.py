"""What a parsed network must still have of the graph that it was parsed from.

TensorRT's parser passes over some of what it does not know: an input of Attention was seen to vanish without a word. So a
network is not built before it was compared:

1. Every input that the graph reads is read, and every output is there.
2. Every Attention is an attention layer, with a mask where the graph has one.
3. Every TensorScatter is a cache update from the part's own input into its own output, which then share their memory.
4. Where attention is written out instead, its mask and its softmax are layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from ..errors import EngineError
from .tensorrt import Network

__all__ = ["Expected", "check_network", "expected_of"]


@dataclass(frozen=True)
class Expected:
    """By name: inputs that are read, outputs, attention nodes with their masks (empty: none), cache updates with what they read
    and write, and nodes that must have layers of their own."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attention: dict[str, str]
    caches: dict[str, tuple[str, str]]
    layers: tuple[str, ...] = field(default=())

    @property
    def aliases(self) -> dict[str, str]:
        """Output → input."""
        return {present: past for past, present in self.caches.values()}


def expected_of(model: ir.Model) -> Expected:
    attention, caches, layers = {}, {}, []
    for node in model.graph:
        name = node.name or ""
        if node.op_type == "Attention":
            mask = node.inputs[3] if len(node.inputs) > 3 else None
            attention[name] = (mask.name or "") if mask is not None else ""
        elif node.op_type == "TensorScatter":
            past, present = node.inputs[0], node.outputs[0]
            caches[name] = ((past.name if past is not None else "") or "", present.name or "")
        elif name.endswith((".attention.mask", ".attention.softmax")):
            layers.append(name)
    read = tuple(v.name or "" for v in model.graph.inputs if v.uses())
    return Expected(read, tuple(v.name or "" for v in model.graph.outputs), attention, caches, tuple(layers))


def check_network(network: Network, expected: Expected, part: str) -> dict[str, int]:
    """How many layers, attention layers, masks, cache updates and dequantized weights there are.

    Raises EngineError, naming part and layer.
    """

    def refuse(what: str) -> None:
        raise EngineError(
            f"TensorRT did not read the part {part} as it is: {what}. The engine would be wrong; it is not built."
        )

    read = {name for layer in network.layers for name in layer.inputs}
    for name in expected.inputs:
        if name not in network.inputs or name not in read:
            refuse(f"the input {name} was dropped")
    for name in expected.outputs:
        if name not in network.outputs:
            refuse(f"the output {name} is missing")
    found = {layer.name.removesuffix("_AttentionInput"): layer for layer in network.layers if layer.kind == "ATTENTION_INPUT"}
    for name, mask in expected.attention.items():
        if name not in found:
            refuse(f"the attention layer {name} is missing")
        elif mask and not any(found[name].inputs[3:4]):
            refuse(f"the attention layer {name} lost its mask {mask}")
    updates = {layer.name: layer for layer in network.layers if layer.kind == "KV_CACHE_UPDATE"}
    for name, (past, present) in expected.caches.items():
        if name not in updates:
            refuse(f"the cache update {name} is missing")
        elif updates[name].inputs[:1] != (past,) or updates[name].outputs[:1] != (present,) or present not in network.outputs:
            refuse(f"the cache update {name} does not write {past} into {present}")
    names = {layer.name for layer in network.layers}
    for name in expected.layers:
        if name not in names:
            refuse(f"the layer {name} is missing")
    masks = sum(bool(mask) for mask in expected.attention.values())
    dequantized = sum(layer.kind == "DEQUANTIZE" for layer in network.layers)
    return {
        "layers": len(network.layers), "attention": len(found), "masks": masks, "cache_updates": len(updates),
        "dequantized": dequantized,
    }  # fmt: skip
