"""Finds a Hugging Face checkpoint and its weights: an alias, a Hub id, a local folder, or a model that ships with EdgeVLM.

Only safetensors are read. It knows nothing of architectures beyond handing out `config.json`.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, CheckpointNotFoundError, WeightsError
from ..models import aliases
from ..tensors import WeightEntry, read_safetensors_index
from .packed import PackedWeight, Quantization, find_older_quantization, find_quantization, split_packed

__all__ = ["Checkpoint", "find_checkpoint", "open_checkpoint", "read_object", "read_weights"]

ASSETS = Path(__file__).resolve().parent.parent / "assets"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: what the user called it, its folder, its `config.json`, its weights by name.

    Of one that is quantized already, `packed` has the weights of quantized layers, by the names that float ones would have.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    weights: dict[str, WeightEntry]
    quantization: Quantization | None = None
    packed: dict[str, PackedWeight] = field(default_factory=dict)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} is not JSON: {exc}.") from exc
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no object.")
    return found


def open_checkpoint(model: str) -> Checkpoint:
    """Raises CheckpointNotFoundError, CheckpointError (no `config.json`), UnsupportedModelError (quantized in a way that is not
    known here), or WeightsError; each says what to do."""
    folder, name = find_checkpoint(model)
    path = folder / "config.json"
    if not path.is_file():
        remedy = (
            " For OpenFlamingo's published weights, run `edgevlm convert` first."
            if (folder / "checkpoint.pt").is_file()
            else ""
        )
        raise CheckpointError(f"{folder} is no Hugging Face checkpoint: it has no config.json.{remedy}")
    config = read_object(path)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise CheckpointError(f"{path} has the 'architectures' {architectures!r}; it is a list of names.")
    quantization = find_quantization(config, name)
    weights = _index_weights(folder, model, name)
    if quantization is None and any(key.endswith(".qweight") for key in weights):
        quantization = find_older_quantization(folder, name)
    if quantization is None:
        return Checkpoint(name, folder, config, weights)
    weights, packed = split_packed(quantization, weights, name)
    return Checkpoint(name, folder, config, weights, quantization, packed)


def find_checkpoint(model: str, *, pickles: bool = False) -> tuple[Path, str]:
    """The folder of an alias, a Hub id, a folder or a shipped model, and its name; `pickles` fetches such weights, too.

    Raises CheckpointNotFoundError, or CheckpointError for a file.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        return local, local.resolve().name
    if (ASSETS / model / "config.json").is_file():
        return ASSETS / model, model
    if local.exists():
        raise CheckpointError(f"{model} is a file; a checkpoint is a folder with config.json and *.safetensors.")
    known = aliases()
    hub_id = known.get(model, model)
    shipped = sorted(p.parent.relative_to(ASSETS).as_posix() for p in ASSETS.glob("*/*/config.json"))
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~", "demo/")):
        raise CheckpointNotFoundError(
            f"{model!r} is neither a folder here, nor an alias ({', '.join(sorted(known))}), nor a shipped model "
            f"({', '.join(shipped) or 'none'}), nor a Hub id (owner/name)."
        )
    return _download(model, hub_id, (*_WANTED, "*.bin") if pickles else _WANTED), hub_id


def _download(model: str, hub_id: str, wanted: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    asked = f"{model!r}" if model == hub_id else f"{model!r} (an alias of {hub_id})"
    remedy = (
        f"Fetch it where there is network with `hf download {hub_id} --local-dir FOLDER`, copy the folder here, and pass it as "
        "--model; or try the shipped model, `--model demo/llava`."
    )
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(wanted)))
    except RepositoryNotFoundError as exc:
        raise CheckpointNotFoundError(
            f"{asked} is not on the Hugging Face Hub, or needs a token (`hf auth login`). A local folder is taken as well."
        ) from exc
    except LocalEntryNotFoundError as exc:
        raise CheckpointNotFoundError(
            f"{asked} is not in the local Hugging Face cache, and the Hub could not be reached. {remedy}"
        ) from exc
    except (HfHubHTTPError, OSError, ValueError) as exc:
        raise CheckpointNotFoundError(f"{asked} could not be fetched from the Hugging Face Hub: {exc}. {remedy}") from exc
    except Exception as exc:  # the Hub client's own HTTP library raises errors that its public names do not cover
        if "http" not in type(exc).__module__:
            raise
        raise CheckpointNotFoundError(f"{asked}: the Hugging Face Hub could not be reached ({exc}). {remedy}") from exc


def _index_weights(folder: Path, model: str, name: str) -> dict[str, WeightEntry]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return read_weights(single)
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [s for s in shards if Path(s).name != s]
            if outside:
                raise ValueError(f"{outside[0]!r} is no file of this folder")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise WeightsError(f"{index} is damaged: {type(exc).__name__}: {exc}. Fetch the checkpoint again.") from exc
        missing = [s for s in shards if not (folder / s).is_file()]
        if missing:
            raise WeightsError(
                f"{folder} lacks {len(missing)} of {len(shards)} weight files: {', '.join(missing[:4])}. "
                "Fetch the checkpoint again."
            )
        weights: dict[str, WeightEntry] = {}
        for shard in shards:
            weights |= read_weights(folder / shard)
        return weights
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles == ["checkpoint.pt"]:
        raise WeightsError(
            f"{folder} holds checkpoint.pt, as OpenFlamingo's weights are published: only what was trained, and pickled. "
            "`edgevlm convert` makes a checkpoint of it together with the vision tower and the language model."
        )
    if pickles or (folder / "pytorch_model.bin.index.json").is_file():
        found = ", ".join(pickles[:3]) or "pytorch_model.bin.index.json names them"
        raise WeightsError(
            f"{folder} holds pickled weights only ({found}). Pickle files can run any code when they are read, so export takes "
            f"safetensors only. Make a checkpoint with safetensors first, which lets nothing but tensors in:\n"
            f"    edgevlm convert --model {shlex.quote(model)} --output {shlex.quote(name.rpartition('/')[2] + '-safetensors')}"
        )
    raise WeightsError(f"{folder} holds no weights: neither model.safetensors nor model.safetensors.index.json.")


def read_weights(path: Path) -> dict[str, WeightEntry]:
    """The tensors of a safetensors file. Raises WeightsError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # validates the header against the file's length
            pass
        return read_safetensors_index(path)
    except (SafetensorError, OSError, ValueError) as exc:
        raise WeightsError(f"{path} cannot be read as safetensors ({exc}). It may be truncated; fetch it again.") from exc
