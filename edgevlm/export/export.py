"""`edgevlm export`: a Hugging Face checkpoint goes in, a bundle comes out.

    checkpoint → family → traced parts (no weights) → passes → [quantization] → weights streamed to disk → manifest

No more than one weight is in memory at a time, whatever the size of the model.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..bundle import Bundle, Part, check_output, publish_bundle, scratch_folder, seal
from ..errors import CheckpointError, ExportError, RecipeError, UnsupportedModelError, WeightsError
from ..graphs import Progress, part_record, save_graph
from ..models import Family, PartSpec, family_for_config
from ..quant.quantize import Calibration, check_recipe, open_calibration, quantize_bundle, quantize_graph
from ..quant.recipe import Recipe, load_recipe
from ..tensors import StoredTensor, WeightEntry
from .checkpoint import Checkpoint, open_checkpoint
from .dequantize import write_dequantize
from .packed import PackedWeight

__all__ = ["DTYPES", "companion_files", "export_bundle", "write_companions"]

DTYPES = {"fp32": "float32", "fp16": "float16"}
#: The checkpoint's own files that the runtime reads, or that a user of the bundle expects to find.
_COMPANIONS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "qformer_tokenizer/tokenizer.json", "qformer_tokenizer/tokenizer_config.json", "qformer_tokenizer/special_tokens_map.json",
)  # fmt: skip


def export_bundle(
    model: str,
    output: str | Path,
    *,
    dtype: str = "fp32",
    recipe: str | Recipe | None = None,
    calibration: Calibration | str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    stage: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Exports `model` (alias, Hub id, folder or shipped model) to the folder `output`.

    `dtype` is what the graphs compute in, `fp32` or `fp16`; a recipe's name, file or object quantizes on the way.
    One that looks at `calibration` samples (see `quantize_bundle`) needs the float bundle to run them through: it is written
    beside `output`, and removed.
    `stage` is told in a few words what begins, `progress` gets every tensor written.

    Raises CheckpointError, UnsupportedModelError, WeightsError, RecipeError, OutputError, ExportError.
    """
    if dtype not in DTYPES:
        raise UnsupportedModelError(f"The dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    chosen = load_recipe(recipe) if recipe is not None else None
    path = check_output(output, force=force)
    checkpoint = open_checkpoint(model)
    if chosen and chosen.calibrated:
        if checkpoint.quantization:
            raise RecipeError(
                f"{checkpoint.name} is already quantized ({checkpoint.quantization.method}); its remaining float weights take "
                f"recipes without calibration (int8, int4-rtn), and {chosen.name!r} looks at samples."
            )
        samples = open_calibration(calibration)
        with scratch_folder(path) as folder:
            _export(checkpoint, folder / "bundle", dtype, chosen, force, progress, stage)
            return quantize_bundle(
                folder / "bundle", output, chosen, calibration=samples, force=force, progress=progress, stage=stage
            )
    return _export(checkpoint, path, dtype, chosen, force, progress, stage)


def _export(
    checkpoint: Checkpoint, output: Path, dtype: str, chosen: Recipe | None, force: bool, progress: Progress | None,
    stage: Callable[[str], None],
) -> Bundle:  # fmt: skip
    """The bundle, quantized unless the recipe looks at samples; it is float then, and the recipe is known to fit."""
    try:
        name, family = family_for_config(checkpoint.config)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'} is damaged: {exc}.") from exc
    companions = companion_files(family, checkpoint.folder)
    _require_companions(checkpoint, set(companions))

    from huggingface_hub.errors import StrictDataclassError  # a value of another type in config.json

    from .passes import canonical_graph  # torch and transformers take seconds to import; bad input is refused before
    from .trace import build_fake, trace_part

    stage(f"building {name} without weights")
    try:
        fake = build_fake(lambda: family.build_model(checkpoint.folder), DTYPES[dtype])
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as exc:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'} does not describe a {name} model: {exc}.") from exc
    weights = _named_weights(family, checkpoint)
    _refuse_lost_biases(weights, family, fake.names.values())
    config: Any = fake.model.config
    try:
        manifest = family.describe(checkpoint.folder, config, DTYPES[dtype])
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise CheckpointError(f"{checkpoint.folder / 'tokenizer.json'} is damaged: {type(exc).__name__}: {exc}.") from exc

    with publish_bundle(output, force=force) as folder:
        (folder / "onnx").mkdir()
        graphs: dict[str, ir.Model] = {}
        for spec in family.part_specs(fake.model, DTYPES[dtype]):
            stage(f"tracing {spec.name}")
            graphs[spec.name] = graph = trace_part(fake, spec)
            canonical_graph(graph)
            bind_weights(graph, spec, family, weights, fake.tied)
        if chosen:
            check_recipe(chosen, graphs)
        if chosen and chosen.calibrated:
            chosen = None
        parts: dict[str, Part] = {}
        for name, graph in graphs.items():
            if chosen:
                quantize_graph(graph, name, chosen)
            file = f"onnx/{name}.onnx"
            stage(f"writing {name}")
            save_graph(graph, folder / file, progress)
            parts[name] = part_record(graph, file)
        write_companions(companions, folder)
        seal(
            folder,
            dataclasses.replace(
                manifest, parts=parts, recipe=_recipe_record(checkpoint, chosen), provenance=_provenance(checkpoint)
            ),
        )
    return Bundle.open(output, check_files=False)


def companion_files(family: Family, folder: Path) -> dict[str, Path | str]:
    """What a bundle holds beside its graphs, by name: a file of the checkpoint in `folder`, or a text instead of one."""
    made = family.bundle_files(folder) if hasattr(family, "bundle_files") else {}
    return {n: folder / n for n in _COMPANIONS if n not in made and (folder / n).is_file()} | dict(made)


def write_companions(companions: Mapping[str, Path | str], folder: Path) -> None:
    """Puts them into a folder."""
    for name, content in companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_text(content, encoding="utf-8")


def _recipe_record(checkpoint: Checkpoint, chosen: Recipe | None) -> dict[str, Any] | None:
    """What the manifest says of how weights were quantized: by the checkpoint's maker, by a recipe, or by both."""
    quantization = checkpoint.quantization
    if quantization is None:
        return chosen.to_dict() if chosen else None
    record = quantization.to_recipe()
    return record | chosen.to_dict() | {"name": f"{record['name']}, then {chosen.name}"} if chosen else record


def _named_weights(family: Family, checkpoint: Checkpoint) -> dict[str, WeightEntry | PackedWeight]:
    """The checkpoint's weights by the names that `bind_weights` looks for."""
    stored: dict[str, WeightEntry | PackedWeight] = {**checkpoint.weights, **checkpoint.packed}
    if not hasattr(family, "split_weight"):
        return {family.weight_name(key): entry for key, entry in stored.items()}
    return {
        name: entry if rows is None else entry.rows(rows.first, rows.count, rows.period)
        for key, entry in stored.items()
        for name, rows in family.split_weight(checkpoint.config, key, entry.shape).items()
    }


def _refuse_lost_biases(weights: Mapping[str, WeightEntry | PackedWeight], family: Family, parameters: Iterable[str]) -> None:
    """A bias in the checkpoint that the model has no place for; AutoGPTQ wrote zeros for layers that have none."""
    known = {family.weight_name(name) for name in parameters}
    for name, entry in weights.items():
        bias = f"{name.removesuffix('.weight')}.bias"
        found = weights.get(bias)
        if not isinstance(entry, PackedWeight) or not isinstance(found, WeightEntry) or name not in known or bias in known:
            continue
        if not found.readable or np.any(np.asarray(found.map(), np.float32)):
            raise WeightsError(
                f"The quantized checkpoint has a bias {bias!r}, and its config.json a layer without one; they do not belong "
                "together."
            )


def bind_weights(
    graph: ir.Model,
    spec: PartSpec,
    family: Family,
    weights: Mapping[str, WeightEntry | PackedWeight],
    tied: Mapping[str, str],
) -> None:
    """Gives every initializer that stands for a parameter its name and its place in the checkpoint, or what dequantizes it.

    `tied` names parameters that share another's values; a checkpoint may hold either of the two.
    """
    from .passes.lower_linear import TRANSPOSED
    from .trace import PARAMETER

    shared = _shared({family.weight_name(a): family.weight_name(b) for a, b in tied.items()})
    initializers = list(graph.graph.initializers.values())
    graph.graph.initializers.clear()
    for value in initializers:
        parameter = value.metadata_props.pop(PARAMETER, None)
        transposed = value.metadata_props.pop(TRANSPOSED, None) is not None
        if parameter is not None:
            name = family.weight_name(parameter)
            entry = next((weights[n] for n in (name, *shared.get(name, ())) if n in weights), None)
            if entry is None:
                raise WeightsError(
                    f"The checkpoint has no weight {name!r}, which its configuration asks for in the part {spec.name}. "
                    "Its files are incomplete, or belong to another configuration."
                )
            assert value.shape is not None
            assert value.dtype is not None
            expected = tuple(int(d) for d in value.shape)  # type: ignore[arg-type]
            stored = entry.shape[::-1] if transposed else entry.shape
            if stored != expected:
                raise WeightsError(f"The weight {name!r} has the shape {list(stored)}; config.json asks for {list(expected)}.")
            if isinstance(entry, PackedWeight):
                write_dequantize(graph.graph, value, name, entry, transposed=transposed)
                continue
            if not entry.readable:
                raise WeightsError(
                    f"The weight {name!r} has the dtype {entry.dtype}; float32, float16 and bfloat16 can be read."
                )
            value.name = name if name not in graph.graph.initializers else f"{name}.transposed"
            value.const_value = StoredTensor(entry, value.dtype, value.name, transposed=transposed)
        graph.graph.register_initializer(value)
    foreign = {node.domain for node in graph.graph} - {""}
    if foreign:
        raise ExportError(
            f"The part {spec.name} has operators of {', '.join(sorted(foreign))}; a bundle holds standard ones only."
        )


def _shared(tied: Mapping[str, str]) -> dict[str, list[str]]:
    """For each name all that stand for the same values, the source first."""
    groups: dict[str, list[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, [source]).append(target)
    return {name: group for group in groups.values() for name in group}


def _require_companions(checkpoint: Checkpoint, present: set[str]) -> None:
    if "tokenizer.json" not in present:
        raise CheckpointError(
            f"{checkpoint.folder} has no tokenizer.json. Load its tokenizer in transformers (AutoTokenizer.from_pretrained) "
            "and save it back with save_pretrained, which writes one."
        )
    if not present & {"preprocessor_config.json", "processor_config.json"}:
        raise CheckpointError(f"{checkpoint.folder} has neither preprocessor_config.json nor processor_config.json.")


def _provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint.name,
        "architecture": (checkpoint.config.get("architectures") or ["?"])[0],
        "edgevlm": metadata.version("edgevlm"),
        **{package: metadata.version(package) for package in ("torch", "transformers", "onnx-ir")},
    }
