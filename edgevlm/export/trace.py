"""A torch module becomes an ONNX graph without a single weight in memory.

The module is built with parameters that have a shape and no storage (PyTorch's FakeTensorMode), and traced by
`torch.onnx.export` without optimisation, so that every initializer keeps the name of its parameter. What should stay
one node is replaced before tracing by a symbolic operator: linear layers (`edgevlm::Linear`, lowered by a pass), RMS
norms and rotary embeddings (standard ONNX operators of opset 23); attention is in `edgevlm.models.decoder`.

It knows nothing of families, of bundles, or of where weights come from.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx.ops import symbolic
from transformers.initialization import no_init_weights

from ..models import PartSpec
from ..models.decoder import ATTENTION

__all__ = ["OPSET", "PARAMETER", "FakeModel", "build_fake", "one_node_each", "trace_part"]

OPSET = 24
#: Metadata of an initializer: the model's name of the parameter it holds.
PARAMETER = "edgevlm.parameter"


@dataclass
class FakeModel:
    """A transformers model whose parameters have no storage; `dtype` is what its graphs compute in."""

    model: Any
    mode: FakeTensorMode
    names: dict[int, str] = field(default_factory=dict)  # id of a parameter → its name in the model

    def __post_init__(self) -> None:
        self.names = {id(p): n for n, p in self.model.named_parameters()}

    @property
    def tied(self) -> dict[str, str]:
        """Names of parameters that share another's values, and that other's."""
        return dict(getattr(self.model, "all_tied_weights_keys", {}))


def build_fake(build: Callable[[], nn.Module], dtype: str) -> FakeModel:
    """Calls `build` with parameters that take no memory. Buffers (rotary frequencies, position tables) stay real."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    register = nn.Module.register_parameter

    def register_fake(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not isinstance(parameter, FakeTensor):
            with mode:
                parameter = nn.Parameter(torch.empty(parameter.shape, dtype=getattr(torch, dtype)), requires_grad=False)
        register(self, name, parameter)

    # Initial values of nothing cost nothing, but some initialisers read what they drew.
    with _patched(nn.Module, "register_parameter", register_fake), no_init_weights(), torch.no_grad():
        model = build()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = ATTENTION
    return FakeModel(model.eval(), mode)


# ------------------------------------------------------------------------------- what stays one node


def _linear(self: nn.Linear, x: Tensor) -> Tensor:
    inputs = [x, self.weight] if self.bias is None else [x, self.weight, self.bias]
    return symbolic("edgevlm::Linear", inputs, dtype=x.dtype, shape=(*x.shape[:-1], self.out_features), version=1)


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    # Llama's norm computes in float32 and scales after the cast back: what stash_type 1 says.
    epsilon = float(self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps)
    attributes: dict[str, Any] = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    return symbolic("RMSNormalization", [x, self.weight], attributes, dtype=x.dtype, shape=x.shape, version=23)


def _rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    # transformers repeats the angles for both halves of a head; the operator takes them once, `[B, S, D/2]`.
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    turned = [symbolic("RotaryEmbedding", [x, cos, sin], dtype=x.dtype, shape=x.shape, version=23) for x in (query, key)]
    return turned[0], turned[1]


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    saved = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, saved)


@contextlib.contextmanager
def one_node_each(module: nn.Module) -> Iterator[None]:
    """Replaces linear layers, RMS norms and rotary embeddings of transformers by their symbolic operators."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_patched(nn.Linear, "forward", _linear))
        classes = {type(m) for m in module.modules()}
        for norm in (c for c in classes if c.__name__.endswith(("RMSNorm", "T5LayerNorm"))):
            stack.enter_context(_patched(norm, "forward", _rms_norm))
        for source in {sys.modules[c.__module__] for c in classes}:
            if hasattr(source, "apply_rotary_pos_emb"):
                stack.enter_context(_patched(source, "apply_rotary_pos_emb", _rotary))
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The exporter reports every operator it does not know from torchvision, and each of its steps.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ------------------------------------------------------------------------------------------- tracing

#: `torch.onnx.export` reads how each of PyTorch's operators is written in ONNX anew for every part, half a second each.
_operators = functools.cache(ONNXRegistry.from_torchlib)


def trace_part(fake: FakeModel, spec: PartSpec) -> ir.Model:
    """The part as an ONNX graph. Initializers that are parameters have no value, and their name as metadata.

    Constants that were real during the trace (rotary frequencies, position tables) keep their values. Dynamic
    dimensions carry the names that the spec gives them.
    """
    names = {name: fake.names[id(p)] for name, p in spec.module.named_parameters(remove_duplicate=False)}
    dims = dict.fromkeys(dim for shape, _ in spec.inputs.values() for dim in shape if isinstance(dim, str))
    sizes = {dim: 3 + i for i, dim in enumerate(dims)}  # no two alike, none of them 0 or 1, or torch would specialise

    with fake.mode:
        arguments = tuple(
            torch.zeros([sizes[d] if isinstance(d, str) else d for d in shape], dtype=getattr(torch, dtype))
            for shape, dtype in spec.inputs.values()
        )
    once = _patched(ONNXRegistry, "from_torchlib", staticmethod(_operators))
    with torch.no_grad(), one_node_each(spec.module), _quiet(), once, fake.mode:
        program = torch.onnx.export(
            spec.module.eval(), arguments, dynamo=True, optimize=False, verbose=False, opset_version=OPSET,
            dynamic_shapes=_dynamic_shapes(spec), input_names=list(spec.inputs), output_names=list(spec.outputs),
        )  # fmt: skip
    assert program is not None
    model = program.model
    for value in model.graph.initializers.values():
        if value.name in names:
            value.const_value = None
            value.metadata_props[PARAMETER] = names[value.name]
    _name_dims(model, spec)
    return model


def _dynamic_shapes(spec: PartSpec) -> tuple[Any, ...]:
    """torch.export wants them nested as the signature is: a `*past` is one tuple."""
    shapes = tuple(
        {i: torch.export.Dim.DYNAMIC for i, d in enumerate(shape) if isinstance(d, str)} for shape, _ in spec.inputs.values()
    )
    parameters = list(inspect.signature(spec.module.forward).parameters.values())
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL:
        fixed = len(parameters) - 1
        return (*shapes[:fixed], shapes[fixed:]) if shapes[fixed:] else shapes
    return shapes


def _name_dims(model: ir.Model, spec: PartSpec) -> None:
    """torch numbers its symbols (`s44`), several for one dimension; the spec names them."""
    symbols: dict[str, str] = {}
    for value, (shape, _) in zip(model.graph.inputs, spec.inputs.values(), strict=True):
        for traced, declared in zip(value.shape or (), shape, strict=True):
            if isinstance(traced, ir.SymbolicDim) and traced.value is not None and isinstance(declared, str):
                symbols[traced.value] = declared
    for value in (output for node in model.graph for output in node.outputs if output.shape is not None):
        value.shape = ir.Shape(symbols.get(str(d.value)) if isinstance(d, ir.SymbolicDim) else d for d in value.shape or ())
    for value, (shape, _) in zip(model.graph.inputs, spec.inputs.values(), strict=True):
        value.shape = ir.Shape(shape)
    for value, (shape, _) in zip(model.graph.outputs, spec.outputs.values(), strict=True):
        value.shape = ir.Shape(shape)
