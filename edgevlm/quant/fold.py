"""Exact rescaling of what goes into linear layers, so that the graph gains no operator.

A layer's input `x` divided by factors, and the rows of its weights multiplied by them, is the same function. The division goes
into what makes `x`: the scale and bias of a norm, or the columns and bias of a linear layer, through whatever commutes with it
on the way:

- a product with something else, ReLU
- operators that only move numbers about (reshapes, transposes, slices: a layer that makes queries, keys and values in one)
- attention, whose output is linear in the values, and the KV cache in front of it

On the way back from `x`, every number carries its *slot*: the column of the weight (or number of the norm) that it comes from.
Operators that move numbers are carried out on the slots. Nothing else may read what is divided. AWQ and SmoothQuant choose the
factors; it knows nothing of methods. Written here because libraries have lists of what folds into what, for torch modules of
the architectures they know; on the graph it is found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from .rtn import stored_matrix

__all__ = ["Fold", "consumers_of", "find_fold", "origin_of", "scale_rows", "weight_of"]

_KEEPS_LAST = ("Unsqueeze", "Squeeze", "Reshape")


@dataclass
class Fold:
    """A place that takes a division of `x`, `[…, K]`.

    `slots`, int `[K]`, are the places along the last dimension of every one of the `targets` that the numbers of `x` come
    from; several of them may share one (query heads that share values). `cached` is what is divided on its way into the KV
    cache, and the slots of its numbers, heads side by side.
    """

    slots: np.ndarray
    targets: list[ir.Value]
    cached: tuple[str, np.ndarray] | None = None

    @property
    def width(self) -> int:
        """`K`."""
        return len(self.slots)

    def tie(self, factors: np.ndarray) -> np.ndarray:
        """The factors `[K]`, equal (geometric mean) where numbers share a slot."""
        _, own, shared = np.unique(self.slots, return_inverse=True, return_counts=True)
        logs = np.bincount(own, np.log(factors.astype(np.float64))) / shared
        return np.exp(logs)[own].astype(factors.dtype)

    def divide(self, factors: np.ndarray) -> bool:
        """Divides by tied factors `[K]`. False, and nothing is changed, where a target's type cannot hold the result."""
        divided = []
        for target in self.targets:
            array = stored_matrix(target.const_value)
            own = np.ones(array.shape[-1], np.float32)
            own[self.slots] = factors
            divided.append(_as(target, array / own))
        if not all(np.isfinite(array).all() for array in divided):
            return False
        for target, array in zip(self.targets, divided, strict=True):
            target.const_value = ir.Tensor(array, name=target.name)
        return True

    def cached_factors(self, factors: np.ndarray) -> np.ndarray:
        """What the numbers in the KV cache are divided by, heads side by side."""
        assert self.cached is not None
        own = dict(zip(self.slots.tolist(), factors.tolist(), strict=True))
        return np.array([own[slot] for slot in self.cached[1].tolist()], factors.dtype)


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
        elif use.idx == 0 and _keeps_last(node):
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
    while node is not None and _keeps_last(node) and node.inputs[0] is not None:
        if len(list(node.inputs[0].uses())) > 1 or node.inputs[0].is_graph_output():
            break
        value = node.inputs[0]
        node = value.producer()
    return value


def find_fold(value: ir.Value) -> Fold | None:
    """Where a division of `value`, along its last dimension, can go; None where nothing takes it."""
    trace = _Trace()
    slots = trace.slots_of(value)
    if slots is None or not trace.closed(value):
        return None
    rows = slots.reshape(-1, slots.shape[-1])
    if not (rows == rows[0]).all():
        return None
    return Fold(rows[0], list(trace.targets), trace.cached)


def scale_rows(weight: ir.Value, factors: np.ndarray) -> None:
    """Multiplies the rows of a weight `[K, N]` by factors `[K]`."""
    scaled = stored_matrix(weight.const_value) * factors[:, None].astype(np.float32)
    weight.const_value = ir.Tensor(_as(weight, scaled), name=weight.name)


def _as(value: ir.Value, array: np.ndarray) -> np.ndarray:
    """An array in a value's type."""
    assert value.const_value is not None
    with np.errstate(over="ignore"):
        return array.astype(value.const_value.dtype.numpy())


# ------------------------------------------------------------------------------------------- tracing


@dataclass
class _Trace:
    """The way from a value back to what can be divided: the slots of every value on it, and the inputs that were followed."""

    slots: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    followed: set[tuple[ir.Node, int]] = field(default_factory=set)
    targets: dict[ir.Value, None] = field(default_factory=dict)
    cached: tuple[str, np.ndarray] | None = None

    def slots_of(self, value: ir.Value) -> np.ndarray | None:
        """Slots in the shape of a value, dynamic dimensions as 1; None where a division cannot go through."""
        if value in self.slots:
            return self.slots[value]
        node = value.producer()
        if node is None or node.domain or (value.is_graph_output() and node.op_type != "TensorScatter"):
            return None
        through = _THROUGH.get(node.op_type)
        slots = through(self, node) if through else self._moved(node, value) if node.op_type in _MOVES else None
        slots = _fitted(slots, value) if slots is not None else None
        if slots is not None:
            self.slots[value] = slots
        return slots

    def closed(self, start: ir.Value) -> bool:
        """Whether nothing reads what is divided on the way but what leads to `start` or what lies in other slots."""
        for value, slots in self.slots.items():
            for use in value.uses() if value is not start else ():
                if (use.node, use.idx) in self.followed or use.node.op_type == "Shape":
                    continue
                others = [_move(use.node, slots, output) if use.idx == 0 else None for output in use.node.outputs]
                if any(other is None or np.isin(other, self.slots[start]).any() for other in others):
                    return False
        return True

    def _follow(self, node: ir.Node, place: int) -> np.ndarray | None:
        source = node.inputs[place] if place < len(node.inputs) else None
        slots = self.slots_of(source) if source is not None else None
        if slots is not None:
            self.followed.add((node, place))
        return slots

    def _take(self, *targets: ir.Value) -> np.ndarray | None:
        """The slots of what the last dimension of these makes, if they may be changed."""
        widths = {_width(target) for target in targets}
        if len(widths) > 1 or not all(_only_here(target) for target in targets):
            return None
        self.targets.update(dict.fromkeys(targets))
        return np.arange(widths.pop())

    def norm(self, node: ir.Node) -> np.ndarray | None:
        own = [value for value in node.inputs[1:3] if value is not None]
        shape, axis = node.outputs[0].shape, node.attributes.get_int("axis", -1)
        if axis != -1 and (shape is None or axis != len(shape) - 1):
            return None
        return self._take(*own) if all(v.const_value is not None and len(v.const_value.shape) == 1 for v in own) else None

    def linear(self, node: ir.Node) -> np.ndarray | None:
        weight = weight_of(node)
        return self._take(weight) if weight is not None else None

    def add(self, node: ir.Node) -> np.ndarray | None:
        """A bias that is added to what something makes."""
        for place, bias in enumerate(node.inputs):
            if bias is None or not bias.is_initializer():
                continue
            slots = self._follow(node, 1 - place)
            rows = slots.reshape(-1, slots.shape[-1]) if slots is not None else None
            if rows is None or len(rows[0]) != _width(bias) or not (rows == np.arange(_width(bias))).all():
                return None
            return slots if self._take(bias) is not None else None
        return None

    def product(self, node: ir.Node) -> np.ndarray | None:
        """One of the factors is divided, whichever can be."""
        own = [place for place, factor in enumerate(node.inputs) if factor is not None and factor.is_initializer()]
        for place in (1, 0):
            factor = node.inputs[place]
            if place not in own and factor is not None and len(list(factor.uses())) == 1:
                kept = dict(self.slots), set(self.followed), dict(self.targets), self.cached
                slots = self._follow(node, place)
                if slots is not None and slots.shape[-1] == _last(node.outputs[0]):
                    return slots
                self.slots, self.followed, self.targets, self.cached = kept
        # The scale of a norm that is no operator of its own.
        factors = [value for place in own if (value := node.inputs[place]) is not None]
        return self._take(factors[0]) if len(factors) == 1 and _width(factors[0]) == _last(node.outputs[0]) else None

    def passed(self, node: ir.Node) -> np.ndarray | None:
        return self._follow(node, 0)

    def joined(self, node: ir.Node) -> np.ndarray | None:
        """Pieces of a sequence, each with the same slots."""
        axis, first = node.attributes.get_int("axis", 0), self._follow(node, 0)
        whole = _along(first, axis % first.ndim) if first is not None and axis % first.ndim < first.ndim - 1 else None
        for place in range(1, len(node.inputs)):
            part = self._follow(node, place) if whole is not None else None
            piece = _along(part, axis % part.ndim) if part is not None else None
            if whole is None or piece is None or not np.array_equal(piece, whole):
                return None
        return whole

    def attention(self, node: ir.Node) -> np.ndarray | None:
        """What it makes is linear in the values, `[B, H_kv, S, D]`, that its query heads share in groups."""
        if len(node.inputs) > 4 and any(value is not None for value in node.inputs[4:]):  # a cache of its own
            return None
        slots, shape = self._follow(node, 2), node.outputs[0].shape
        values = _along(slots, 2) if slots is not None and slots.ndim == 4 else None
        heads = shape[1] if shape is not None and len(shape) == 4 else None
        if values is None or not isinstance(heads, int) or heads % values.shape[1]:
            return None
        return values.repeat(heads // values.shape[1], 1)

    def scatter(self, node: ir.Node) -> np.ndarray | None:
        """Values on their way into the cache, whose content is divided from then on."""
        past, rows = node.inputs[0], node.inputs[1]
        slots = self._follow(node, 1)
        if past is None or past.producer() is not None or rows is None or slots is None or slots.ndim != 4:
            return None
        heads = _along(slots, 2)
        if heads is None or len(heads) != 1 or self.cached is not None:
            return None
        self.cached = rows.name or "", heads.reshape(-1)
        return heads

    def _moved(self, node: ir.Node, value: ir.Value) -> np.ndarray | None:
        slots = self._follow(node, 0)
        return _move(node, slots, value) if slots is not None else None


_THROUGH: dict[str, Callable[[_Trace, ir.Node], np.ndarray | None]] = {
    "RMSNormalization": _Trace.norm,
    "LayerNormalization": _Trace.norm,
    "MatMul": _Trace.linear,
    "Add": _Trace.add,
    "Mul": _Trace.product,
    "Relu": _Trace.passed,
    "Identity": _Trace.passed,
    "Concat": _Trace.joined,
    "Attention": _Trace.attention,
    "TensorScatter": _Trace.scatter,
}

# ------------------------------------------------------------------- operators that only move numbers


def _move(node: ir.Node, slots: np.ndarray, value: ir.Value) -> np.ndarray | None:
    """The slots of `value`, an output of an operator whose first input has these; None where it does more than move them."""
    move = _MOVES.get(node.op_type) if not node.domain else None
    moved = move(node, slots, value) if move else None
    return _fitted(moved, value) if moved is not None else None


def _reshape(node: ir.Node, slots: np.ndarray, value: ir.Value) -> np.ndarray | None:
    sizes, source = _sizes(value), node.inputs[0]
    if sizes is None:
        return None
    if source is not None and source.shape is not None and value.shape is not None:
        # Where dynamic dimensions stay where they are among the others, it is one of the others.
        if _runs(source.shape) == _runs(value.shape):
            return slots.reshape(sizes)
        # Dimensions in the middle may become others, along which all is alike.
        first, last = _common(source.shape, value.shape)
        middle = slots.reshape(*slots.shape[:first], -1, *slots.shape[slots.ndim - last :])
        alike = _along(middle, first)
        if alike is not None:
            return alike.reshape(*alike.shape[:first], *[1] * (len(sizes) - first - last), *alike.shape[first + 1 :])
    # Rows that are all alike may become longer ones, whatever becomes of dynamic dimensions.
    rows = slots.reshape(-1, slots.shape[-1])
    if (rows == rows[0]).all() and isinstance(_last(value), int) and sizes[-1] % rows.shape[1] == 0:
        return np.broadcast_to(np.tile(rows[0], sizes[-1] // rows.shape[1]), sizes)
    return None


def _squeeze(node: ir.Node, slots: np.ndarray, value: ir.Value) -> np.ndarray | None:
    axes = _constant(node, 1)
    return slots.squeeze(tuple(axes.tolist())) if axes is not None and all(slots.shape[a] == 1 for a in axes) else None


def _unsqueeze(node: ir.Node, slots: np.ndarray, value: ir.Value) -> np.ndarray | None:
    axes = _constant(node, 1)
    return np.expand_dims(slots, tuple(axes.tolist())) if axes is not None else None


def _transpose(node: ir.Node, slots: np.ndarray, value: ir.Value) -> np.ndarray | None:
    attribute = node.attributes.get("perm")
    return slots.transpose(list(attribute.as_ints())) if attribute is not None else slots.transpose()


def _gather(node: ir.Node, slots: np.ndarray, value: ir.Value) -> np.ndarray | None:
    axis, fixed = node.attributes.get_int("axis", 0) % slots.ndim, _constant(node, 1)
    if fixed is not None and slots.shape[axis] == _size(node.inputs[0], axis):
        return slots.take(fixed, axis)
    alike = _along(slots, axis)
    if alike is None or value.shape is None:
        return None
    new = range(axis, axis + len(value.shape) - slots.ndim + 1)
    return np.expand_dims(alike.squeeze(axis), tuple(new))


def _gather_elements(node: ir.Node, slots: np.ndarray, value: ir.Value) -> np.ndarray | None:
    return _along(slots, node.attributes.get_int("axis", 0) % slots.ndim)


def _slice(node: ir.Node, slots: np.ndarray, value: ir.Value) -> np.ndarray | None:
    starts, ends, axes, steps = (_constant(node, place) for place in range(1, 5))
    if axes is None:
        return None
    for number, axis in enumerate(axes.tolist()):
        whole = slots.shape[axis] == _size(node.inputs[0], axis)
        if whole and starts is not None and ends is not None and (steps is not None or len(node.inputs) < 5):
            step = int(steps[number]) if steps is not None else 1
            picked = [slice(None)] * slots.ndim
            picked[axis] = slice(int(starts[number]), int(ends[number]), step)
            slots = slots[tuple(picked)]
            continue
        alike = _along(slots, axis % slots.ndim)
        if alike is None:
            return None
        slots = alike
    return slots


def _split(node: ir.Node, slots: np.ndarray, value: ir.Value) -> np.ndarray | None:
    axis, count = node.attributes.get_int("axis", 0) % slots.ndim, len(node.outputs)
    if slots.shape[axis] != _size(node.inputs[0], axis):
        return _along(slots, axis)
    sizes = _constant(node, 1) if len(node.inputs) > 1 else np.full(count, -(-slots.shape[axis] // count))
    if sizes is None:
        return None
    return np.split(slots, np.cumsum(sizes)[:-1], axis)[list(node.outputs).index(value)]


_MOVES: dict[str, Callable[[ir.Node, np.ndarray, ir.Value], np.ndarray | None]] = {
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Slice": _slice,
    "Split": _split,
}


def _fitted(slots: np.ndarray, value: ir.Value) -> np.ndarray | None:
    """Slots in the shape of a value, whose dynamic dimensions are 1."""
    sizes = _sizes(value)
    if sizes is None:
        return slots
    try:
        return np.broadcast_to(slots, sizes)
    except ValueError:
        return None


def _along(slots: np.ndarray, axis: int) -> np.ndarray | None:
    """What is the same all along an axis, which becomes 1 long."""
    first = slots.take([0], axis)
    return first if (slots == first).all() else None


def _sizes(value: ir.Value) -> tuple[int, ...] | None:
    return tuple(d if isinstance(d, int) else 1 for d in value.shape) if value.shape is not None else None


def _runs(shape: ir.Shape) -> list[object]:
    """Dynamic dimensions by name, and the products of the static ones between them; a single nameless one has to be what the
    others leave."""
    runs: list[object] = []
    product, nameless = 1, 0
    for dim in shape:
        if isinstance(dim, int):
            product *= dim
            continue
        nameless += dim.value is None
        # A second nameless one is like no other.
        runs += [product, dim.value if nameless < 2 else object()]
        product = 1
    return [*runs, product]


def _common(one: ir.Shape, other: ir.Shape) -> tuple[int, int]:
    """How many dimensions are the same at the beginning, and, of the rest, at the end."""

    def same(a: object, b: object) -> bool:
        return a == b and not (isinstance(a, ir.SymbolicDim) and a.value is None)

    most = min(len(one), len(other))
    first = next((n for n in range(most) if not same(one[n], other[n])), most)
    return first, next((n for n in range(most - first) if not same(one[-1 - n], other[-1 - n])), most - first)


def _size(value: ir.Value | None, axis: int) -> object:
    return value.shape[axis] if value is not None and value.shape is not None else None


def _constant(node: ir.Node, place: int) -> np.ndarray | None:
    value = node.inputs[place] if place < len(node.inputs) else None
    return np.asarray(value.const_value.numpy()) if value is not None and value.const_value is not None else None


def _only_here(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and len(list(value.uses())) == 1


def _width(value: ir.Value) -> int:
    assert value.const_value is not None
    return int(value.const_value.shape[-1]) if len(value.const_value.shape) else 1  # type: ignore[arg-type]


def _last(value: ir.Value | None) -> object:
    return value.shape[-1] if value is not None and value.shape is not None and len(value.shape) else None


def _keeps_last(node: ir.Node) -> bool:
    """Whether it is a reshape that leaves the last dimension as it is."""
    before, after = _last(node.inputs[0]), _last(node.outputs[0])
    return node.op_type in _KEEPS_LAST and isinstance(before, int) and before == after
