"""Weights that a checkpoint already holds quantized: read as they are packed, and not made float on the way.

    checkpoint (packed integers, scales, zero points) → rows of integers `[K, N]` → DequantizeLinear → MatMul

A quantized linear layer is `W[k, n] = (q[k, n] − z[g(k), n]) · s[g(k), n]` in every layout here, `q` and `z` without sign:

    awq, gemm            qweight [K, N/8]     qzeros [G, N/8]      scales [G, N]     nibbles of a word: outputs 0 2 4 6 1 3 5 7
    awq, gemv            qweight [N, K/8]     qzeros [N, ⌈G/8⌉…]   scales [N, G…]    in order; both padded
    gptq                 qweight [K·b/32, N]  qzeros [G, N·b/32]   scales [G, N]     g_idx [K]; qzeros hold z − 1
    gptq_v2              the same                                                    qzeros hold z
    pack-quantized       weight_packed [N, ⌈K·b/32⌉]  weight_scale [N, G]  weight_zero_point [⌈N·b/32⌉, G]  weight_g_idx [K]
    int-quantized        weight int8 [N, K]           weight_scale [N, G]  weight_zero_point int8 [N, G]

Sources: AutoAWQ (awq/modules/linear/gemm.py, gemv.py, awq/utils/packing_utils.py), AutoGPTQ (nn_modules/qlinear), GPTQModel
(utils/model.py), compressed-tensors (compressors/pack_quantized, naive_quantized). Written here because these load whole models
into torch, some of them on a GPU only. It knows nothing of families.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, UnsupportedModelError, WeightsError
from ..tensors import WeightEntry

__all__ = [
    "PackedWeight",
    "Quantization",
    "find_older_quantization",
    "find_quantization",
    "split_packed",
    "without_quantization",
]

#: What a nibble of AutoAWQ's words stands for is at this place among the word's eight.
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
_BITS = (4, 8)
#: Integers that are unpacked in one go.
_AT_ONCE = 1 << 22
#: Where `config.json` says how the checkpoint, or the language model in it, was quantized.
_KEYS, _LANGUAGE = ("quantization_config", "compression_config"), ("text_config", "llm_config")
_LAYOUTS = {
    "awq": ("gemm", "gemv"),
    "gptq": ("gptq", "gptq_v2"),
    # The last says nothing of the layers: their tensors do.
    "compressed-tensors": ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision", ""),
}
_KNOWN = "awq (gemm, gemv), gptq (gptq, gptq_v2) and compressed-tensors (pack-quantized, int-quantized)"
_REMEDY = "Export the checkpoint with float weights and quantize it with --quantize."
#: Tensors of a quantized linear layer, by what its checkpoint's method calls them; the first is the weight itself.
_WORDS = ("qweight", "qzeros", "scales", "g_idx")
_TENSORS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint says of how it was quantized: `quantization_config` in its `config.json`, or a file of its own."""

    method: str
    config: dict[str, Any]

    @property
    def layout(self) -> str:
        """`gemm`, `gptq_v2` and so on; compressed-tensors names it for each layer in its tensors."""
        default = {"awq": "gemm", "gptq": "gptq"}.get(self.method, "")
        keys = ("version",) * (self.method == "awq") + ("checkpoint_format", "format")
        return str(next((self.config[key] for key in keys if self.config.get(key)), default)).lower()

    @property
    def left_out(self) -> list[str]:
        """What it quantized besides weights, which an export leaves as it is."""
        found = {
            "activations": _schemes(self.config, "input_activations") or _schemes(self.config, "output_activations"),
            "KV cache": self.config.get("kv_cache_scheme"),
        }
        return [what for what, is_so in found.items() if is_so]

    def to_recipe(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "name": f"checkpoint: {self.method}",
            "rules": [],
            "checkpoint": {"method": self.method, "layout": self.layout, "left_out": self.left_out, "config": self.config},
        }


@dataclass(frozen=True)
class PackedWeight:
    """A quantized linear layer's weight in its file. `shape` is `[N, K]`, as that of the float weight would be.

    `codes` reads rows of the matrix `[K, N]` by their numbers, `scales` the scales `[groups, N]`, `zeros` the zero points
    `[groups, N]` (None: the middle of the range). All integers are unsigned. `order` are the rows of the first group, of the
    second and so on, None where they lie so.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    codes: Callable[[np.ndarray], np.ndarray]
    scales: Callable[[], np.ndarray]
    zeros: Callable[[], np.ndarray] | None
    order: np.ndarray | None = None

    def rows(self, first: int, count: int, period: int) -> PackedWeight:
        """The outputs from `first` on, `count` of every `period`: see `WeightEntry.rows`."""
        number = np.arange(self.shape[0]).reshape(-1, period)[:, first : first + count].reshape(-1)
        zeros = self.zeros
        return replace(
            self,
            shape=(len(number), self.shape[1]),
            codes=lambda rows: self.codes(rows)[:, number],
            scales=lambda: self.scales()[:, number],
            zeros=None if zeros is None else lambda: zeros()[:, number],
        )

    def dequantize(self) -> np.ndarray:
        """The float32 weight `[N, K]` that it stands for. Exact: a product of 9 and at most 24 bits, rounded once."""
        outputs, inputs = self.shape
        order = np.arange(inputs) if self.order is None else self.order
        groups = np.empty(inputs, np.int64)
        groups[order] = np.arange(inputs) // self.group_size
        scales = self.scales().astype(np.float32)
        zeros = np.full(scales.shape, 1 << (self.bits - 1)) if self.zeros is None else self.zeros()
        whole = np.empty((outputs, inputs), np.float32)
        for rows in self.pieces(np.arange(inputs)):
            codes = self.codes(rows).astype(np.float32)
            whole[:, rows] = ((codes - zeros[groups[rows]].astype(np.float32)) * scales[groups[rows]]).T
        return whole

    def pieces(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Row numbers, as many at a time as may be in memory: an even number, so that pairs of nibbles stay together."""
        step = max(2, _AT_ONCE // self.shape[0] & ~1)
        yield from (rows[first : first + step] for first in range(0, len(rows), step))


def find_quantization(config: Mapping[str, Any], name: str) -> Quantization | None:
    """What `config.json` says of a checkpoint's quantization, or of its language model's; None of float weights.

    Raises UnsupportedModelError for what no layout here covers.
    """
    places = [config, *(config.get(part) for part in _LANGUAGE)]
    said = [place[key] for place in places if isinstance(place, dict) for key in _KEYS if place.get(key) is not None]
    return _checked(said[0], name) if said else None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` that says nothing of it."""
    kept = {name: value for name, value in config.items() if name not in _KEYS}
    inner = {name: without_quantization(kept[name]) for name in _LANGUAGE if isinstance(kept.get(name), dict)}
    return kept | inner


def find_older_quantization(folder: Path, name: str) -> Quantization | None:
    """The same from the file that AutoGPTQ and AutoAWQ wrote before `config.json` had a place for it."""
    for file, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (folder / file).is_file():
            try:
                content = json.loads((folder / file).read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as exc:
                raise CheckpointError(f"{folder / file} is not JSON: {exc}.") from exc
            return _checked({"quant_method": method, **content} if isinstance(content, dict) else content, name)
    return None


def _checked(said: Any, name: str) -> Quantization:
    method = said.get("quant_method") if isinstance(said, dict) else None
    if not isinstance(method, str):
        raise UnsupportedModelError(f"{name} is already quantized (an unknown method). {_REMEDY}")
    quantization = Quantization(method, said)
    refused = _refusal(quantization)
    if refused is not None:
        raise UnsupportedModelError(f"{name} is already quantized ({method}){refused}. Taken as they are: {_KNOWN}. {_REMEDY}")
    return quantization


def _refusal(quantization: Quantization) -> str | None:
    """What of it is not covered, as a text behind its method; None where all is."""
    method, config, layout = quantization.method, quantization.config, quantization.layout
    if method not in _LAYOUTS:
        return ""
    if layout not in _LAYOUTS[method]:
        return f" in the layout {layout!r}"
    bits = config.get("bits", config.get("w_bit", 4))
    if method != "compressed-tensors" and bits not in (_BITS if method == "gptq" else (4,)):
        return f" with {bits} bits"
    if config.get("pack_dtype") not in (None, "int32"):
        return f" in words of {config['pack_dtype']}"
    if config.get("is_marlin_format"):
        return " in the layout 'marlin'"
    for step in ("rotation", "transform_config"):
        if config.get(step):
            return f" with {step}, which turns activations too"
    sparse = config.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format") not in (None, "dense"):
        return f" and sparse ({sparse['format']})"
    for weights in _schemes(config, "weights"):
        if weights.get("type", "int") != "int":
            return f" with {weights.get('type')} weights of {weights.get('num_bits')} bits"
    return None


def _schemes(config: Mapping[str, Any], of: str) -> list[dict[str, Any]]:
    """What compressed-tensors does to weights or activations, for each group of layers that it does something to."""
    groups = config.get("config_groups")
    schemes = [group.get(of) for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    return [scheme for scheme in schemes if isinstance(scheme, dict)]


def split_packed(
    quantization: Quantization, weights: Mapping[str, WeightEntry], name: str
) -> tuple[dict[str, WeightEntry], dict[str, PackedWeight]]:
    """The checkpoint's tensors, those of quantized layers apart, by the name that the layer's float weight would have.

    Raises UnsupportedModelError where no tensor has a layout known here, WeightsError where some belong to no whole.
    """
    tensors = quantization.method == "compressed-tensors"
    layers: dict[str, dict[str, WeightEntry]] = {}
    for key, entry in weights.items():
        layer, _, kind = key.rpartition(".")
        if kind in (_TENSORS if tensors else _WORDS) or (tensors and kind == "weight" and not entry.readable):
            layers.setdefault(layer, {})[kind] = entry
    # `scales` alone may be any model's parameter.
    layers = {layer: kinds for layer, kinds in layers.items() if tensors or set(kinds) & {"qweight", "qzeros", "g_idx"}}
    if not layers:
        said = "weight_packed, weight_scale" if tensors else "qweight, qzeros, scales"
        raise UnsupportedModelError(
            f"{name} is already quantized ({quantization.method}), as its configuration says, but no weight of it is stored so "
            f"(no tensor is called {said}). {_REMEDY}"
        )
    packed = {f"{layer}.weight": _read_layer(quantization, layer, kinds, weights) for layer, kinds in layers.items()}
    taken = {f"{layer}.{kind}" for layer, kinds in layers.items() for kind in kinds}
    return {key: entry for key, entry in weights.items() if key not in taken}, packed


def _read_layer(
    quantization: Quantization, layer: str, kinds: Mapping[str, WeightEntry], weights: Mapping[str, WeightEntry]
) -> PackedWeight:
    if quantization.method != "compressed-tensors":
        wanted: tuple[str, ...] = _WORDS[:3]
    elif "weight" in kinds:
        wanted = ("weight", "weight_scale")
    else:
        wanted = ("weight_packed", "weight_scale", "weight_shape")
    missing = [kind for kind in wanted if kind not in kinds]
    if missing:
        raise WeightsError(
            f"The quantized layer {layer!r} has {', '.join(sorted(kinds))}, but no {', '.join(missing)}. The checkpoint's "
            "files are incomplete; fetch it again."
        )
    if "weight" not in kinds and f"{layer}.weight" in weights:
        raise WeightsError(f"The layer {layer!r} has both {wanted[0]} and a float weight; which of the two counts is not said.")
    if quantization.method == "compressed-tensors":
        return _compressed(quantization, layer, kinds)
    _require_type(layer, kinds, ("I32",), "qweight", "qzeros")
    _require_type(layer, kinds, ("F16", "BF16", "F32"), "scales")
    if quantization.method == "gptq":
        return _gptq(quantization, layer, kinds)
    return (_awq_gemv if quantization.layout == "gemv" else _awq_gemm)(quantization, layer, kinds)


def _require_type(layer: str, kinds: Mapping[str, WeightEntry], known: tuple[str, ...], *names: str) -> None:
    for name in names:
        if name in kinds and kinds[name].dtype not in known:
            raise UnsupportedModelError(
                f"The quantized layer {layer!r} has {name} in {kinds[name].dtype}; {', '.join(known)} can be read. {_REMEDY}"
            )


def _require_shape(layer: str, kinds: Mapping[str, WeightEntry], name: str, wanted: tuple[int, ...]) -> None:
    if kinds[name].shape != wanted:
        raise WeightsError(
            f"The quantized layer {layer!r} has {name} of the shape {list(kinds[name].shape)}; {list(wanted)} fits the others."
        )


def _require_matrices(layer: str, kinds: Mapping[str, WeightEntry], *names: str) -> None:
    for name in names:
        if name in kinds and (len(kinds[name].shape) != 2 or 0 in kinds[name].shape):
            raise WeightsError(
                f"The quantized layer {layer!r} has {name} of the shape {list(kinds[name].shape)}; it is no matrix."
            )


def _group_size(layer: str, asked: Any, inputs: int, groups: int) -> int:
    """As the configuration says, or as the scales do, where a layer has its own."""
    if isinstance(asked, int) and asked > 0 and -(-inputs // asked) == groups:
        return asked
    if groups and inputs % groups == 0:
        return inputs // groups
    raise WeightsError(
        f"The quantized layer {layer!r} has {inputs} inputs and scales for {groups} groups of them; groups of "
        f"{asked}, as the configuration says, do not fit."
    )


def _require_bits(layer: str, words: int, codes: int) -> int:
    """How many bits each of `codes` integers has that fill so many words of 32."""
    for bits in _BITS:
        if -(-codes * bits // 32) == words:
            return bits
    raise UnsupportedModelError(
        f"The quantized layer {layer!r} has {32 * words / max(1, codes):.3g} bits a weight; taken are 4 and 8. {_REMEDY}"
    )


# --------------------------------------------------------------------------------------------- layouts


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 `[…, w]` → uint8 `[…, w · 32 / bits]`, the lowest bits first."""
    lanes = np.ascontiguousarray(words).view(np.uint8)
    return lanes if bits == 8 else np.stack([lanes & 0xF, lanes >> 4], -1).reshape(*words.shape[:-1], -1)


def _awq_gemm(quantization: Quantization, layer: str, kinds: Mapping[str, WeightEntry]) -> PackedWeight:
    _require_matrices(layer, kinds, "qweight", "qzeros", "scales")
    weight, zeros, scales = (kinds[kind] for kind in _WORDS[:3])
    inputs, outputs, groups = weight.shape[0], weight.shape[1] * 8, scales.shape[0]
    _require_shape(layer, kinds, "scales", (groups, outputs))
    _require_shape(layer, kinds, "qzeros", (groups, weight.shape[1]))

    def in_order(words: np.ndarray) -> np.ndarray:
        nibbles = _unpack(words, 4)
        return nibbles.reshape(*words.shape, 8)[..., _AWQ_PLACES].reshape(nibbles.shape)

    return PackedWeight(
        layer,
        (outputs, inputs),
        4,
        _group_size(layer, _asked_group(quantization), inputs, groups),
        lambda rows: in_order(weight.map()[rows]),
        scales.map,
        lambda: in_order(zeros.map()),
    )


def _awq_gemv(quantization: Quantization, layer: str, kinds: Mapping[str, WeightEntry]) -> PackedWeight:
    _require_matrices(layer, kinds, "qweight", "qzeros", "scales")
    weight, zeros, scales = (kinds[kind] for kind in _WORDS[:3])
    outputs, inputs = weight.shape[0], weight.shape[1] * 8
    asked = _asked_group(quantization)
    size = asked if isinstance(asked, int) and asked > 0 else inputs
    groups = -(-inputs // size)  # scales are padded with zeros behind these
    _require_shape(layer, kinds, "scales", (outputs, 8 * zeros.shape[1]))
    _require_shape(layer, kinds, "qzeros", (outputs, zeros.shape[1]))
    if groups > scales.shape[1]:
        raise WeightsError(
            f"The quantized layer {layer!r} has scales for {scales.shape[1]} groups; {inputs} inputs have {groups}."
        )
    return PackedWeight(
        layer,
        (outputs, inputs),
        4,
        size,
        lambda rows: _columns(weight.map(), rows, 4),
        lambda: scales.map()[:, :groups].T,
        lambda: _unpack(zeros.map(), 4)[:, :groups].T,
    )


def _gptq(quantization: Quantization, layer: str, kinds: Mapping[str, WeightEntry]) -> PackedWeight:
    _require_matrices(layer, kinds, "qweight", "qzeros", "scales")
    weight, zeros, scales = (kinds[kind] for kind in _WORDS[:3])
    groups, outputs = scales.shape
    _require_shape(layer, kinds, "qweight", (weight.shape[0], outputs))
    said = quantization.config.get("bits", 4)
    inputs = math.prod(kinds["g_idx"].shape) if "g_idx" in kinds else weight.shape[0] * 32 // said
    bits = _require_bits(layer, weight.shape[0], inputs)
    _require_shape(layer, kinds, "qzeros", (groups, -(-outputs * bits // 32)))
    size = _group_size(layer, _asked_group(quantization), inputs, groups)

    def codes(rows: np.ndarray) -> np.ndarray:
        lane = 32 // bits
        words = weight.map().view(np.uint32)[rows // lane]
        shifts = (rows % lane * bits).astype(np.uint32)
        return (words >> shifts[:, None]).astype(np.uint8) & np.uint8((1 << bits) - 1)

    def zero_points() -> np.ndarray:
        words = zeros.map().view(np.uint32)
        if quantization.layout == "gptq_v2":
            return _unpack(words, bits)[:, :outputs]
        # AutoGPTQ adds the 1 to each number, and a 16 becomes 0. GPTQModel took it from whole words, with borrows.
        if "gptqmodel" in str(quantization.config.get("meta")).lower():
            return _unpack(words + np.uint32(0x11111111 if bits == 4 else 0x01010101), bits)[:, :outputs]
        return (_unpack(words, bits)[:, :outputs] + np.uint8(1)) & np.uint8((1 << bits) - 1)

    order = _order(layer, kinds, "g_idx", inputs, size)
    return PackedWeight(layer, (outputs, inputs), bits, size, codes, scales.map, zero_points, order)


def _compressed(quantization: Quantization, layer: str, kinds: Mapping[str, WeightEntry]) -> PackedWeight:
    _require_type(layer, kinds, ("F16", "BF16", "F32"), "weight_scale")
    _require_type(layer, kinds, ("I32", "I8"), "weight_zero_point")
    _require_type(layer, kinds, ("I8",), "weight")
    _require_type(layer, kinds, ("I32",), "weight_packed")
    _require_matrices(layer, kinds, "weight", "weight_packed")
    if "weight" in kinds:
        outputs, inputs, bits = *kinds["weight"].shape, 8
    else:
        _require_type(layer, kinds, ("I32", "I64"), "weight_shape")
        _require_shape(layer, kinds, "weight_shape", (2,))
        outputs, inputs = (int(d) for d in kinds["weight_shape"].map())
        bits = _require_bits(layer, kinds["weight_packed"].shape[1], inputs)
        if bits not in (named := _named_bits(quantization)) and named:  # a few inputs fill one word with either
            bits = named[0]
        _require_shape(layer, kinds, "weight_packed", (outputs, -(-inputs * bits // 32)))
    scale, zero, packed = kinds["weight_scale"], kinds.get("weight_zero_point"), kinds.get("weight_packed")
    if scale.shape not in ((), (1,), (outputs,)) and (len(scale.shape) != 2 or scale.shape[0] != outputs):
        _require_shape(layer, kinds, "weight_scale", (outputs, 1))
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    size = _group_size(layer, _asked_group(quantization), inputs, groups)

    def codes(rows: np.ndarray) -> np.ndarray:
        if packed is not None:
            return _columns(packed.map(), rows, bits)
        return kinds["weight"].map()[:, rows].T.view(np.uint8) ^ np.uint8(0x80)

    def by_group(stored: np.ndarray) -> np.ndarray:
        """`[N, G]`, or one number for all outputs, as `[G, N]`."""
        return np.broadcast_to(stored.reshape(-1, groups), (outputs, groups)).T

    def zero_points() -> np.ndarray:
        assert zero is not None
        stored = zero.map()
        if zero.dtype == "I32":  # packed along the outputs
            return _unpack(stored.reshape(-1, groups).T, bits)[:, :outputs]
        return by_group(stored).view(np.uint8) + np.uint8(1 << (bits - 1))

    if zero is not None and zero.dtype == "I32":
        _require_shape(layer, kinds, "weight_zero_point", (-(-outputs * bits // 32), groups))
    elif zero is not None:
        _require_shape(layer, kinds, "weight_zero_point", scale.shape)
    order = _order(layer, kinds, "weight_g_idx", inputs, size)
    return PackedWeight(
        layer, (outputs, inputs), bits, size, codes, lambda: by_group(scale.map()), zero_points if zero else None, order
    )


def _asked_group(quantization: Quantization) -> Any:
    config = quantization.config
    named = [weights.get("group_size") for weights in _schemes(config, "weights")]
    return config.get("group_size", config.get("q_group_size", next(iter(named), None)))


def _named_bits(quantization: Quantization) -> list[int]:
    named = [weights.get("num_bits") for weights in _schemes(quantization.config, "weights")]
    return [bits for bits in _BITS if bits in named]


def _columns(words: np.ndarray, rows: np.ndarray, bits: int) -> np.ndarray:
    """Of `[N, K · bits / 32]` the inputs `rows`, as uint8 `[rows, N]`."""
    lane = 32 // bits
    first, last = int(rows.min()) // lane, int(rows.max()) // lane
    return _unpack(words[:, first : last + 1], bits)[:, rows - first * lane].T


def _order(layer: str, kinds: Mapping[str, WeightEntry], name: str, inputs: int, size: int) -> np.ndarray | None:
    """Which inputs each group has, from its number for each input (`g_idx`), one group after the other."""
    if name not in kinds:
        return None
    _require_type(layer, kinds, ("I32", "I64"), name)
    _require_shape(layer, kinds, name, (inputs,))
    numbers, plain = np.asarray(kinds[name].map()), np.arange(inputs) // size
    if np.array_equal(numbers, plain) or (numbers == -1).all():  # -1: never set
        return None
    order = np.argsort(numbers, kind="stable")
    if not np.array_equal(numbers[order], plain):
        raise WeightsError(
            f"The quantized layer {layer!r} has groups of inputs ({name}) of other sizes than {size}; those are no blocks."
        )
    return order
