"""Weights as they are published, pickles among them, and weights written as safetensors, for `edgevlm convert`.

A pickle can run any code when it is read, so this one place where pickles are read at all lets torch rebuild tensors and plain
containers only (`weights_only`), and refuses the file otherwise. Tensors stay in their files, memory-mapped, and are
written one after the other in the dtype they have: no more than a piece of one is in memory. It knows nothing of
architectures.
"""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError, OutputError, UnsupportedModelError, WeightsError
from ..graphs import Progress
from .checkpoint import Checkpoint, open_checkpoint
from .packed import without_quantization

__all__ = [
    "FLOATS",
    "SHARD_BYTES",
    "Source",
    "Weight",
    "blocks",
    "float_folder",
    "listed",
    "mapped",
    "open_source",
    "pickle_shards",
    "read_json",
    "read_pickle",
    "write_json",
    "write_shard",
    "write_weights",
]

#: Bytes of weights in one file, as Hugging Face's own default.
SHARD_BYTES = 5_000_000_000
_BLOCK = 64 << 20
#: safetensors' names of what a model computes with, and of what else its files hold.
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_DTYPES: dict[str, Any] = {
    **FLOATS, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
#: torch's names of the same.
_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """A tensor in its file: shape, dtype as safetensors names it, and its rows in pieces that are read when asked for."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], list[np.ndarray]]

    @property
    def known(self) -> bool:
        """Whether safetensors has its dtype."""
        return self.dtype in _DTYPES

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize


@dataclass(frozen=True)
class Source:
    """A checkpoint: what the user called it, its `config.json` (empty for a bare file), and its weights."""

    name: str
    folder: Path
    config: dict[str, Any]
    weights: dict[str, Weight]


def open_source(model: str, stage: Callable[[str], None]) -> Source:
    """A folder or Hub id. A local folder may hold pickles instead of safetensors: the published MPT ones do."""
    folder = Path(model).expanduser()
    pickles = sorted(folder.glob("pytorch_model*.bin")) if folder.is_dir() else []
    if not pickles or any(folder.glob("*.safetensors")):
        checkpoint = open_checkpoint(model)
        if checkpoint.quantization:
            raise UnsupportedModelError(
                f"{checkpoint.name} is already quantized ({checkpoint.quantization.method}); only float weights are converted. "
                "`edgevlm export` takes some quantized checkpoints as they are."
            )
        weights = {name: Weight(e.shape, e.dtype, mapped(e.map)) for name, e in checkpoint.weights.items()}
        return Source(checkpoint.name, checkpoint.folder, checkpoint.config, weights)
    config = read_json(folder / "config.json")
    if not config:
        raise CheckpointError(f"{folder} is no Hugging Face checkpoint: it has no config.json.")
    read: dict[str, Weight] = {}
    for path in pickle_shards(folder):
        read |= read_pickle(path, stage)
    return Source(model, folder, config, read)


def pickle_shards(folder: Path) -> list[Path]:
    """The files `pytorch_model*.bin` of a folder, those that its index names among them; WeightsError where one is missing."""
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    index = read_json(folder / "pytorch_model.bin.index.json").get("weight_map", {})
    if not isinstance(index, dict) or not all(isinstance(name, str) and Path(name).name == name for name in index.values()):
        raise WeightsError(f"{folder / 'pytorch_model.bin.index.json'} is damaged: it does not say which files weights are in.")
    missing = sorted(set(index.values()) - {path.name for path in pickles})
    if missing:
        raise WeightsError(f"{folder} lacks {len(missing)} weight files: {', '.join(missing[:4])}. Fetch the checkpoint again.")
    return [path for path in pickles if path.name in index.values()] if index else pickles


def read_pickle(path: Path, stage: Callable[[str], None]) -> dict[str, Weight]:
    """The tensors of a state dict, memory-mapped. Raises WeightsError where it holds anything else, or code."""
    import torch

    stage(f"reading {path.name} (a pickle can run any code when it is read: only tensors are let in)")
    try:
        # What torch before 1.6 wrote is no archive that could be mapped, and comes into memory whole.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of other pickle protocols before it refuses them
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as exc:
        reason = next((line.strip() for line in str(exc).splitlines() if "GLOBAL" in line or "Unsupported" in line), str(exc))
        raise WeightsError(
            f"{path} is refused: it asks for more than tensors when it is read, which could run any code ({reason[:200]}). A "
            "state dict needs nothing but tensors; get the file from where it was published."
        ) from exc
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as exc:
        raise WeightsError(
            f"{path} cannot be read as what torch.save writes ({type(exc).__name__}: {str(exc)[:200]}). It may be truncated: "
            "fetch it again."
        ) from exc
    if isinstance(state, Mapping) and isinstance(state.get("model_state_dict"), Mapping):  # of the training script
        state = state["model_state_dict"]
    if not isinstance(state, Mapping) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise WeightsError(f"{path} holds no state dict: a mapping of names to tensors is what the published files hold.")
    return {str(name): Weight(tuple(tensor.shape), _dtype(tensor), mapped(_viewer(tensor))) for name, tensor in state.items()}


def _dtype(tensor: Any) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return _NAMES.get(name, name)


def _viewer(tensor: Any) -> Callable[[], np.ndarray]:
    import torch

    def view() -> np.ndarray:
        raw: np.ndarray = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return raw.view(_DTYPES[_dtype(tensor)]).reshape(tuple(tensor.shape))

    return view


def mapped(read: Callable[[], np.ndarray]) -> Callable[[], list[np.ndarray]]:
    """What gives one array, as what gives a weight's pieces."""
    return lambda: [read()]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file. Raises CheckpointError."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} is not JSON: {exc}. Fetch the checkpoint again.") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no object. Fetch the checkpoint again.")
    return content


def listed(names: list[str]) -> str:
    """The first names of a list, for an error."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4]) or 'none'}{more}"


@contextlib.contextmanager
def float_folder(checkpoint: Checkpoint, stage: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
    """The checkpoint's folder; of a quantized one a temporary folder with the float32 weights that it stands for, which PyTorch
    loads without the kernels of who quantized it. Raises OutputError where there is no room for them."""
    if not checkpoint.quantization:
        yield checkpoint.folder
        return
    stage(f"writing the float32 weights that {checkpoint.name} stands for")
    weights = {name: Weight(e.shape, e.dtype, mapped(e.map)) for name, e in checkpoint.weights.items() if e.mappable}
    weights |= {name: Weight(packed.shape, "F32", mapped(packed.dequantize)) for name, packed in checkpoint.packed.items()}
    with tempfile.TemporaryDirectory(prefix="edgevlm-") as name:
        folder = Path(name)
        for path in checkpoint.folder.iterdir():
            if path.name != "config.json" and path.suffix != ".safetensors" and ".safetensors." not in path.name:
                (folder / path.name).symlink_to(path.resolve())
        write_json(folder / "config.json", without_quantization(checkpoint.config))
        try:
            write_weights(folder, weights, SHARD_BYTES, None)
        except OSError as exc:
            size = sum(weight.nbytes for weight in weights.values())
            raise OutputError(
                f"The float32 weights of {checkpoint.name}, {size / 1e9:,.1f} GB, cannot be written to {folder.parent}: "
                f"{exc.strerror}. TMPDIR names another place."
            ) from exc
        yield folder


# ------------------------------------------------------------------------------------------------- writing


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object as a file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(folder: Path, weights: Mapping[str, Weight], limit: int, progress: Progress | None) -> None:
    """`model.safetensors`, or shards of at most `limit` bytes (a single tensor may exceed it) with their index."""
    shards: list[dict[str, Weight]] = [{}]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.nbytes
    single = len(shards) == 1
    files = (
        ["model.safetensors"] if single else [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    )
    done = 0
    for file, shard in zip(files, shards, strict=True):
        for name, weight in write_shard(folder / file, shard):
            if progress:
                progress(name, done, len(weights), weight.nbytes)
            done += 1
    if not single:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(weight.nbytes for weight in weights.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def write_shard(path: Path, shard: Mapping[str, Weight]) -> Iterator[tuple[str, Weight]]:
    """Format: https://github.com/huggingface/safetensors#format. The widest dtype comes first, so that all are aligned."""
    ordered = sorted(shard.items(), key=lambda item: -np.dtype(_DTYPES[item[1].dtype]).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, weight in ordered:
        header[name] = {"dtype": weight.dtype, "shape": weight.shape, "data_offsets": [offset, offset + weight.nbytes]}
        offset += weight.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, weight in ordered:
            yield name, weight
            for block in blocks(weight.read()):
                file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)


def blocks(parts: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The rows of all parts, some megabytes at a time."""
    for part in parts:
        rows = np.atleast_1d(part)
        step = max(1, _BLOCK // max(1, rows[:1].nbytes))
        yield from (rows[first : first + step] for first in range(0, len(rows), step))
