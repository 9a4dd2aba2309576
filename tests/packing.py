"""Checkpoints as AutoAWQ, AutoGPTQ, GPTQModel and llm-compressor write them, made of float ones."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LINEAR = re.compile(
    r"(language_model|model|transformer)\.(?!.*(vision|visual|projector|embed|norm|lm_head|mlp1)).*"
    r"(_proj|c_attn|c_proj|w1|w2|w3|wqkv|wo)\.weight$"
)


@dataclass(frozen=True)
class Layout:
    """`group` inputs share a scale (0: all); `sorts` gives groups inputs from anywhere (act-order)."""

    method: str
    kind: str
    bits: int = 4
    group: int = 16
    symmetric: bool = False
    sorts: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        extra = "-sym" * self.symmetric + "-sorted" * self.sorts
        return f"{self.kind}-{self.bits}bit-g{self.group}{extra}"


@dataclass(frozen=True)
class Layer:
    """A matrix `[K, N]` in unsigned integers; `groups` is the group of each input."""

    codes: np.ndarray
    scales: np.ndarray  # [G, N]
    zeros: np.ndarray  # [G, N]
    groups: np.ndarray

    @property
    def float32(self) -> np.ndarray:
        """`[N, K]`, as every one of these formats defines it."""
        difference = self.codes.astype(np.int64) - self.zeros[self.groups]
        return (difference.astype(np.float32) * self.scales.astype(np.float32)[self.groups]).T.copy()


def quantize(weight: np.ndarray, layout: Layout, seed: int = 0) -> Layer:
    """`[N, K]` rounded to nearest."""
    rng = np.random.default_rng(seed)
    outputs, inputs = weight.shape
    group = layout.group or inputs
    groups = np.arange(inputs) // group
    if layout.sorts:
        groups = groups[rng.permutation(inputs)]
    top = 2**layout.bits - 1
    scales, zeros = (np.empty((math.ceil(inputs / group), outputs), np.float32) for _ in range(2))
    for number in range(len(scales)):
        block = weight.T[groups == number]
        if layout.symmetric:
            scales[number], zeros[number] = np.abs(block).max(0) / (top // 2), (top + 1) // 2
        else:
            low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
            scales[number] = (high - low) / top
            zeros[number] = np.rint(-low / np.maximum(scales[number], 1e-9)).clip(1, top)
    scales = np.maximum(scales, 1e-4).astype(np.float16)
    codes = np.rint(weight.T / scales.astype(np.float32)[groups] + zeros[groups]).clip(0, top)
    return Layer(codes.astype(np.int64), scales, zeros.astype(np.int64), groups)


def words(numbers: np.ndarray, bits: int, order: list[int] | None = None) -> np.ndarray:
    """`[rows, n]` unsigned → int32 `[rows, ⌈n · bits / 32⌉]`; place j of a word holds the number `order[j]` of its numbers."""
    lane = 32 // bits
    order = order or list(range(lane))
    out = np.zeros((numbers.shape[0], math.ceil(numbers.shape[1] / lane)), np.uint64)
    for column in range(out.shape[1]):
        for place, which in enumerate(order):
            if column * lane + which < numbers.shape[1]:
                out[:, column] |= numbers[:, column * lane + which].astype(np.uint64) << np.uint64(bits * place)
    return out.astype(np.uint32).view(np.int32)


def pack(layer: Layer, layout: Layout) -> dict[str, np.ndarray]:
    """The tensors of a layer, by what stands behind its name."""
    codes, scales, zeros = layer.codes, layer.scales, layer.zeros
    if layout.kind == "gemm":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return {"qweight": words(codes, 4, order), "qzeros": words(zeros, 4, order), "scales": scales}
    if layout.kind == "gemv":
        wide = math.ceil(len(scales) / 8) * 8
        padded = np.zeros((scales.shape[1], wide), np.float16)
        padded[:, : len(scales)] = scales.T
        return {"qweight": words(codes.T, 4), "qzeros": words(zeros.T, 4), "scales": padded}
    if layout.kind in ("gptq", "gptq_v2"):
        stored = zeros if layout.kind == "gptq_v2" else zeros - 1 & 2**layout.bits - 1
        return {
            "qweight": words(codes.T, layout.bits).T.copy(), "qzeros": words(stored, layout.bits), "scales": scales,
            "g_idx": layer.groups.astype(np.int32),
        }  # fmt: skip
    half = 2 ** (layout.bits - 1)
    if layout.kind == "int-quantized":
        made = {"weight": (codes - half).T.astype(np.int8), "weight_scale": scales.T.copy()}
        return made if layout.symmetric else {**made, "weight_zero_point": (zeros - half).T.astype(np.int8)}
    shape = np.array(codes.T.shape, np.int64)
    made = {"weight_packed": words(codes.T, layout.bits), "weight_scale": scales.T.copy(), "weight_shape": shape}
    if not layout.symmetric:
        made["weight_zero_point"] = words(zeros, layout.bits).T.copy()
    if layout.sorts:
        made["weight_g_idx"] = layer.groups.astype(np.int32)
    return made


def quantization_config(layout: Layout) -> dict[str, Any]:
    """What `config.json` says of it."""
    if layout.method == "compressed-tensors":
        weights = {
            "num_bits": layout.bits, "type": "int", "symmetric": layout.symmetric, "group_size": layout.group or None,
            "strategy": "group" if layout.group else "channel",
        }  # fmt: skip
        groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
        return {
            "quant_method": layout.method,
            "format": layout.kind,
            "config_groups": groups,
            "ignore": ["lm_head"],
        } | layout.config
    common = {"quant_method": layout.method, "bits": layout.bits, "group_size": layout.group or -1}
    if layout.method == "awq":
        return common | {"version": layout.kind, "zero_point": True, "modules_to_not_convert": ["visual"]} | layout.config
    return common | {"checkpoint_format": layout.kind, "desc_act": layout.sorts, "sym": layout.symmetric} | layout.config


def pack_checkpoint(
    source: Path,
    packed: Path,
    plain: Path,
    layout: Layout,
    *,
    chosen: Callable[[str], object] = LINEAR.search,
    fits: Callable[[tuple[int, ...]], bool] = lambda _: True,
) -> dict[str, Layer]:
    """Writes a quantized checkpoint, and a float one with the weights that it stands for; gives the layers by their names."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor for path in sorted(source.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    layers = {
        name.removesuffix(".weight"): quantize(tensor.float().numpy(), layout, seed)
        for seed, (name, tensor) in enumerate(tensors.items())
        if chosen(name) and tensor.ndim == 2 and fits(tuple(tensor.shape))
    }
    assert layers
    import torch

    kept = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in layers}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for folder in (packed, plain):
        skipped = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json")
        shutil.copytree(source, folder, ignore=skipped)
    made = {f"{n}.{k}": torch.from_numpy(a.copy()) for n, layer in layers.items() for k, a in pack(layer, layout).items()}
    save_file({**kept, **made}, packed / "model.safetensors", {"format": "pt"})
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config(layout)}))
    floats = {f"{name}.weight": torch.from_numpy(layer.float32) for name, layer in layers.items()}
    save_file({**kept, **floats}, plain / "model.safetensors", {"format": "pt"})
    return layers
