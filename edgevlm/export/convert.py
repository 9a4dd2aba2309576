"""`edgevlm convert --model …`: a Hugging Face checkpoint whose weights are pickles becomes one with safetensors.

    pytorch_model-00001-of-00010.bin …   →   model-00001-of-00010.safetensors …   one file after the other, same dtype
    *.json, tokenizer files              →   copied; code (*.py) is left behind

What may be in a pickle, and how it is read, is in `weights`; OpenFlamingo, whose weights need two other checkpoints, in
`convert_open_flamingo`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from ..bundle import publish_bundle
from ..errors import CheckpointError, OutputError, WeightsError
from ..graphs import Progress
from ..models import family_for_config
from .checkpoint import find_checkpoint
from .weights import Weight, listed, pickle_shards, read_json, read_pickle, write_json, write_shard

__all__ = ["convert_checkpoint"]

_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
_INDEX = "pytorch_model.bin.index.json"


def convert_checkpoint(
    model: str,
    output: str | Path,
    *,
    progress: Progress | None = None,
    stage: Callable[[str], None] = lambda _: None,
) -> Path:
    """Writes the folder `output` and returns it. `model` is an alias, a Hub id or a folder of a family that EdgeVLM knows.

    Raises CheckpointError, UnsupportedModelError or WeightsError, saying what is wrong, and OutputError where `output`
    exists.
    """
    destination = Path(output)
    if destination.exists():
        raise OutputError(f"{destination} exists. Give another --output.")
    folder, name = find_checkpoint(model, pickles=True)
    config = read_json(folder / "config.json")
    if not config:
        raise CheckpointError(f"{folder} is no Hugging Face checkpoint: it has no config.json.")
    family_for_config(config)
    if any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{name} has safetensors already: `edgevlm export --model {model}` takes it as it is.")
    shards = pickle_shards(folder)
    if not shards:
        raise WeightsError(f"{folder} holds no pytorch_model*.bin, the name that pickled weights have.")
    index = read_json(folder / _INDEX).get("weight_map", {})
    with publish_bundle(destination) as staging:
        placed = _write_shards(staging, shards, len(index), progress, stage)
        if missing := [weight for weight in index if weight not in placed]:
            raise WeightsError(f"{folder} lacks {listed(missing)}, which {_INDEX} names. Fetch the checkpoint again.")
        if len(shards) > 1:
            total = sum((staging / file).stat().st_size for file in set(placed.values()))
            write_json(staging / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": placed})
        stage("copying tokenizer and configuration")
        _copy(_companions(folder), folder, staging)
    return destination


def _write_shards(
    folder: Path, shards: list[Path], count: int, progress: Progress | None, stage: Callable[[str], None]
) -> dict[str, str]:
    """Each weight's new file. A shard is let go of before the next is read."""
    placed: dict[str, str] = {}
    for number, path in enumerate(shards, 1):
        weights = read_pickle(path, stage)
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _check(path, weights, placed)
        for name, weight in write_shard(folder / file, weights):
            if progress:
                progress(name, len(placed), max(count, len(weights)), weight.nbytes)
            placed[name] = file
        del weights, weight  # what has been read of an old file lies in memory
    return placed


def _check(path: Path, weights: dict[str, Weight], placed: dict[str, str]) -> None:
    if twice := [name for name in weights if name in placed]:
        raise WeightsError(f"{path} holds {listed(twice)}, as another of the files does. Fetch the checkpoint again.")
    for name, weight in weights.items():
        if not weight.known:
            raise WeightsError(f"{path} has {name} in the dtype {weight.dtype}, which cannot be written as safetensors.")


def _companions(folder: Path) -> Iterable[Path]:
    """Text files of the checkpoint, also those one folder down."""
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        wanted = path.suffix in _COPIED or path.name.startswith(("LICENSE", "NOTICE"))
        if path.is_file() and wanted and not hidden and not path.name.endswith(".index.json"):
            yield path


def _copy(paths: Iterable[Path], source: Path, target: Path) -> None:
    for path in paths:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
