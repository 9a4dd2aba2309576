"""`edgevlm convert --weights …`: published OpenFlamingo weights become a checkpoint folder that `edgevlm export` takes.

    checkpoint.pt (what was trained) ┐
    CLIP tower, as published         ├→ config.json, *.safetensors, tokenizer.json, preprocessor_config.json, …
    language model, as published     ┘

OpenFlamingo (https://github.com/mlfoundations/open_flamingo) publishes the trained parameters alone, as one pickled state
dict: the resampler, the gated cross-attention, and the table of embeddings with the tokens that were added. How pickles are
read, and weights written, is in `weights`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import publish_bundle
from ..errors import CheckpointError, OutputError, UnsupportedModelError, WeightsError
from ..graphs import Progress
from ..models import open_flamingo
from ..models.open_flamingo import END, IMAGE
from .checkpoint import read_weights
from .weights import (
    FLOATS,
    SHARD_BYTES,
    Source,
    Weight,
    blocks,
    listed,
    mapped,
    open_source,
    read_json,
    read_pickle,
    write_json,
    write_weights,
)

__all__ = ["convert_open_flamingo"]

#: The width of an attention head in the resampler and the gated layers: fixed in the published code (helpers.py, `dim_head`).
HEAD_DIM = 64

#: Language models by where their layers are in the published state dicts.
_BODIES = {
    "model.layers": "Llama", "transformer.blocks": "MPT", "gpt_neox.layers": "GPT-NeoX (RedPajama, Pythia)",
    "model.decoder.layers": "OPT", "transformer.h": "GPT-J",
}  # fmt: skip
_LANGUAGE_MODELS = {
    "LlamaForCausalLM": "llama", "MptForCausalLM": "mpt", "MPTForCausalLM": "mpt", "MosaicGPT": "mpt",
}  # fmt: skip
#: MosaicGPT, the first form of MPT that the 3B checkpoints are built on, names things in its own way.
_MOSAIC_NAMES = {".ln_": ".norm_", ".mlp.mlp_up.": ".ffn.up_proj.", ".mlp.mlp_down.": ".ffn.down_proj."}
#: What old checkpoints hold beside their parameters.
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")


def convert_open_flamingo(
    weights: str | Path,
    vision: str,
    language: str,
    output: str | Path,
    *,
    cross_attn_every_n_layers: int | None = None,
    vision_post_layernorm: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    stage: Callable[[str], None] = lambda _: None,
) -> Path:
    """Writes the folder `output` and returns it.

    `weights` is the published `checkpoint.pt`, one of its training script, or the same as safetensors. `vision` and
    `language` are folders (or Hub ids) of the CLIP tower and the language model that it was trained on. How often
    a gated layer comes follows from the weights; `cross_attn_every_n_layers` is compared with it. Set
    `vision_post_layernorm` for weights that were trained with open_clip 2.23 or newer: see `OpenFlamingoConfig`.

    Raises CheckpointError, UnsupportedModelError or WeightsError, naming what does not fit, and OutputError where `output`
    exists.
    """
    from huggingface_hub.errors import StrictDataclassError  # a value of another type in config.json

    destination = Path(output)
    if destination.exists():
        raise OutputError(f"{destination} exists. Give another --output.")
    trained = _read_trained(Path(weights), stage)
    stage("reading the vision tower and the language model")
    tower, lm = open_source(vision, stage), open_source(language, stage)
    try:
        return _convert(
            trained, tower, lm, destination, cross_attn_every_n_layers, vision_post_layernorm, shard_bytes, progress, stage
        )
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, StrictDataclassError) as exc:
        raise CheckpointError(
            f"The config.json of {tower.name} or of {lm.name} is damaged: {type(exc).__name__}: {exc}. Fetch it again."
        ) from exc


def _convert(
    trained: Source, tower: Source, lm: Source, destination: Path, asked: int | None, post_layernorm: bool,
    shard_bytes: int, progress: Progress | None, stage: Callable[[str], None],
) -> Path:  # fmt: skip
    tower_config, text_config, mosaic = _vision_config(tower), *_text_config(lm)
    found = _trained_weights(trained, text_config["model_type"])
    every = _interval(found, text_config, asked, trained.name)
    tokenizer, settings = _tokenizer(lm)
    table = found.get(_table(text_config))
    if table is None:
        raise WeightsError(
            f"{trained.name} has no table of embeddings (lang_encoder.{_table(text_config).removeprefix('language_model.')}), "
            f"so the rows of {IMAGE} and {END} are not known. The published files have it, also where it was frozen."
        )
    if len(table.shape) != 2 or table.shape[0] < tokenizer.get_vocab_size():
        raise WeightsError(
            f"The table of embeddings in {trained.name} has the shape {list(table.shape)}; the tokenizer of {lm.name} has "
            f"{tokenizer.get_vocab_size()} tokens with the added ones. Give the language model that it was trained on."
        )
    text_config["vocab_size"] = table.shape[0]
    config = {
        "architectures": list(open_flamingo.ARCHITECTURES),
        "model_type": "open_flamingo",
        "cross_attn_every_n_layers": every,
        "image_token_id": tokenizer.token_to_id(IMAGE),
        "endofchunk_token_id": tokenizer.token_to_id(END),
        "vision_post_layernorm": post_layernorm,
        "tie_word_embeddings": text_config["tie_word_embeddings"],
        **_sizes(found, every, trained.name),
        "vision_config": tower_config,
        "text_config": text_config,
    }
    open_flamingo.check_config(config)

    stage("comparing names and shapes")
    language_weights = _language_weights(lm, mosaic)
    _fit_head(found, language_weights, text_config, trained.name, stage)
    complete = _matched(config, trained, found, tower, _vision_weights(tower), lm, language_weights)
    companions = {
        "config.json": config,
        "generation_config.json": _generation(config, lm, tokenizer, settings),
        "preprocessor_config.json": _preprocessing(tower),
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": settings,
    }
    with publish_bundle(destination) as folder:
        stage("writing weights")
        write_weights(folder, complete, shard_bytes, progress)
        for name, content in companions.items():
            write_json(folder / name, content)
    return destination


# ------------------------------------------------------------------------------------------- the three inputs


def _read_trained(path: Path, stage: Callable[[str], None]) -> Source:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}; the weights are one file, as published: checkpoint.pt.")
    if path.suffix == ".safetensors":
        stage(f"reading {path.name}")
        weights = {name: Weight(e.shape, e.dtype, mapped(e.map)) for name, e in read_weights(path).items()}
    else:
        weights = read_pickle(path, stage)
    return Source(str(path), path.parent, {}, weights)


# --------------------------------------------------------------------------------------------- configuration


def _vision_config(tower: Source) -> dict[str, Any]:
    from transformers import CLIPVisionConfig

    kind = tower.config.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise UnsupportedModelError(
            f"The vision tower {tower.name} has the model_type {kind!r}; OpenFlamingo's are CLIP towers (clip, "
            "clip_vision_model): the published weights belong to openai/clip-vit-large-patch14."
        )
    raw = tower.config.get("vision_config") or {} if kind == "clip" else tower.config
    known = CLIPVisionConfig()
    fields = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
        "patch_size", "hidden_act", "layer_norm_eps",
    )  # fmt: skip
    return {"model_type": "clip_vision_model", **{name: raw.get(name, getattr(known, name)) for name in fields}}


def _text_config(lm: Source) -> tuple[dict[str, Any], bool]:
    """The language model's configuration as transformers names it, and whether it is MosaicGPT."""
    config = lm.config
    asked = [str(name) for name in config.get("architectures") or []]
    kind = next((_LANGUAGE_MODELS[name] for name in asked if name in _LANGUAGE_MODELS), None)
    if kind is None:
        raise UnsupportedModelError(
            f"The language model {lm.name} is {' / '.join(asked) or config.get('model_type')!r}; covered are "
            f"{', '.join(_LANGUAGE_MODELS)}. Of the published weights these are the 3B and 9B ones; the 4B ones are built on "
            "RedPajama, a GPT-NeoX."
        )
    if kind == "llama":
        dropped = ("architectures", "_name_or_path", "auto_map", "torch_dtype", "dtype", "transformers_version")
        kept = {name: value for name, value in config.items() if name not in dropped}
        return {**kept, "model_type": "llama", "tie_word_embeddings": bool(config.get("tie_word_embeddings"))}, False
    mosaic = "MosaicGPT" in asked
    own = config if mosaic else config.get("attn_config") or {}
    prefix = "attn_" if mosaic else ""
    # transformers' MPT has ALiBi and no biases whatever its configuration says; the others say so.
    published = "MptForCausalLM" not in asked
    text: dict[str, Any] = {
        "model_type": "mpt",
        **{name: config[name] for name in ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size") if name in config},
        "expansion_ratio": config.get("mlp_ratio" if mosaic else "expansion_ratio", 4),
        "layer_norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "no_bias": config.get("no_bias", False) if published else True,
        "logit_scale": config.get("logit_scale"),
        "norm_type": config.get("norm_type", "low_precision_layernorm"),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", True)),
        "attn_config": {
            "attn_type": own.get("attn_type", "multihead_attention"),
            "alibi": own.get("alibi", False) if published else True,
            "alibi_bias_max": own.get("alibi_bias_max", 8),
            "clip_qkv": own.get(f"{prefix}clip_qkv"),
            "qk_ln": own.get(f"{prefix}qk_ln", False),
            "softmax_scale": own.get("softmax_scale"),
            "prefix_lm": own.get("prefix_lm", False),
        },
    }
    return text, mosaic


def _interval(found: Mapping[str, Weight], text: Mapping[str, Any], asked: int | None, name: str) -> int:
    """Every how many layers a gated one comes, as the weights have it."""
    matches = (re.match(r"gated_cross_attn_layers\.(\d+)\.", key) for key in found)
    gated = sorted({int(match[1]) for match in matches if match})
    layers = int(text["n_layers"] if text["model_type"] == "mpt" else text["num_hidden_layers"])
    every = gated[0] + 1 if gated else 0
    if not gated or gated != list(range(every - 1, layers, every)):
        raise WeightsError(
            f"{name} has gated cross-attention before the layers {listed(list(map(str, gated)))}; before every n-th of the "
            f"{layers} layers of the language model is what is expected. Give the language model that it was trained on."
        )
    if asked not in (None, every):
        raise WeightsError(
            f"{name} has gated cross-attention before every layer number {every}, {len(gated)} in all; {asked} was asked for. "
            "Leave it out: it follows from the weights."
        )
    return every


def _sizes(found: Mapping[str, Weight], every: int, name: str) -> dict[str, Any]:
    """What the shapes say of the resampler and the gated layers."""
    gated = f"gated_cross_attn_layers.{every - 1}"

    def rows(key: str) -> int:
        if key not in found or not found[key].shape:
            raise WeightsError(f"{name} lacks {key}. It is no published OpenFlamingo checkpoint, or not complete.")
        return found[key].shape[0]

    def attention(key: str, feed: str) -> dict[str, int]:
        inner = rows(key)
        if inner % HEAD_DIM:
            raise UnsupportedModelError(f"{key} has {inner} rows; OpenFlamingo's attention has heads of {HEAD_DIM}.")
        return {"heads": inner // HEAD_DIM, "head_dim": HEAD_DIM, "intermediate_size": rows(feed)}

    depth = len({key.split(".")[2] for key in found if key.startswith("perceiver.layers.")})
    return {
        "resampler": {
            "depth": depth, "latents": rows("perceiver.latents"),
            **attention("perceiver.layers.0.0.to_q.weight", "perceiver.layers.0.1.1.weight"),
        },
        "cross_attention": attention(f"{gated}.attn.to_q.weight", f"{gated}.ff.1.weight"),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- names


def _table(text: Mapping[str, Any]) -> str:
    """The name of the table of embeddings."""
    return f"language_model.{'transformer.wte' if text['model_type'] == 'mpt' else 'model.embed_tokens'}.weight"


def _trained_weights(trained: Source, kind: str) -> dict[str, Weight]:
    """The published names as those of `edgevlm.models.open_flamingo`; others stay as they are and will be refused.

    A gated layer is published inside the layer it precedes, in a list of its own, or in both: the first release has
    the same tensors twice.
    """
    body = {"llama": "model.layers", "mpt": "transformer.blocks"}[kind]
    found: dict[str, Weight] = {}
    for published, weight in trained.weights.items():
        name = re.sub(r"(^|\.)(module|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.)", "", published).lstrip(".")
        layer = re.fullmatch(r"lang_encoder\.(.+)\.(\d+)\.gated_cross_attn_layer\.(.+)", name)
        if layer and layer[1] != body:
            raise CheckpointError(
                f"{trained.name} was trained on {_BODIES.get(layer[1], 'another language model')}, the language model given is "
                f"{_BODIES[body]}. Give the one that it was trained on."
            )
        if layer:
            name = f"gated_cross_attn_layers.{layer[2]}.{layer[3]}"
        elif name.startswith("lang_encoder.gated_cross_attn_layers."):
            name = name.removeprefix("lang_encoder.")
        elif name in ("lang_encoder.lm_head.weight", _table({"model_type": kind}).replace("language_model", "lang_encoder")):
            name = name.replace("lang_encoder", "language_model")
        if name in found and not _equal(found[name], weight):
            raise WeightsError(f"{trained.name} has two different tensors for {name}: {published!r} and another.")
        found[name] = weight
    return found


def _equal(a: Weight, b: Weight) -> bool:
    return (
        (a.shape, a.dtype) == (b.shape, b.dtype)
        and a.dtype in FLOATS
        and all(np.array_equal(x, y) for x, y in zip(blocks(a.read()), blocks(b.read()), strict=True))
    )


def _vision_weights(tower: Source) -> dict[str, Weight]:
    """The tower of a CLIPModel, a CLIPVisionModel or a CLIPVisionModelWithProjection."""
    other = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    return {
        f"vision_tower.{name.removeprefix('vision_model.')}": weight
        for name, weight in tower.weights.items()
        if not name.startswith(other) and not name.endswith(_BUFFERS)
    }


def _language_weights(lm: Source, mosaic: bool) -> dict[str, Weight]:
    renamed = {}
    for name, weight in lm.weights.items():
        if name.endswith(_BUFFERS):
            continue
        for old, new in _MOSAIC_NAMES.items() if mosaic else ():
            name = name.replace(old, new)
        renamed[f"language_model.{name}"] = weight
    return renamed


def _fit_head(
    found: dict[str, Weight], language: dict[str, Weight], text: Mapping[str, Any], name: str, stage: Callable[[str], None]
) -> None:
    """The tables of the language model give way to the trained one; its output head gets as many rows.

    The published code resizes both tables to the tokenizer, and trains and stores the embeddings alone. A head that is
    the same table comes with them. One that is not got random rows for the added tokens at every start; here they
    are the mean of the others, whose logit is below the largest, so that no such token is ever the likeliest.
    """
    head, table = "language_model.lm_head.weight", _table(text)
    language.pop(table, None)
    if text["tie_word_embeddings"]:
        if head in found and not _equal(found[head], found[table]):
            raise WeightsError(
                f"{name} has an output head that differs from its embeddings; in this language model they are one."
            )
        found.pop(head, None)
        language.pop(head, None)
        return
    own, rows = language.pop(head, None), text["vocab_size"]
    if head in found or own is None:
        return
    if len(own.shape) != 2 or not own.shape[0] or own.dtype not in FLOATS:
        language[head] = own  # refused with the others
        return
    kept = min(rows, own.shape[0])
    if rows > kept:
        stage(f"{name} has no output head: the {rows - kept} added tokens get the mean of the others there")

    def read() -> list[np.ndarray]:
        array = own.read()[0][:kept]
        total = sum(block.astype(np.float64).sum(0) for block in blocks([array]))
        return [array, np.repeat((total / kept).astype(array.dtype)[None], rows - kept, 0)]

    language[head] = Weight((rows, own.shape[1]), own.dtype, read)


def _matched(
    config: Mapping[str, Any],
    trained: Source, found: Mapping[str, Weight],
    tower: Source, vision: Mapping[str, Weight],
    lm: Source, language: Mapping[str, Weight],
) -> dict[str, Weight]:  # fmt: skip
    """All weights in the order of the model. WeightsError where names or shapes are not those that the model has."""
    import torch
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        model = open_flamingo.model_from_config(config)
    tied = model.all_tied_weights_keys
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in tied}
    sources = ((trained, found), (tower, vision), (lm, language))
    of_trained = ("perceiver.", "gated_cross_attn_layers.", _table(config["text_config"]))
    complete: dict[str, Weight] = {}
    for source, weights in sources:
        if source is trained:
            prefix, wanted = "", {name for name in expected if name.startswith(of_trained) or name in found}
        else:
            prefix = "vision_tower." if source is tower else "language_model."
            wanted = {name for name in expected if name.startswith(prefix) and name not in found}
        missing = [name.removeprefix(prefix) for name in expected if name in wanted and name not in weights]
        unexpected = [name.removeprefix(prefix) for name in weights if name not in wanted]
        if missing or unexpected:
            said = [f"lacks {listed(missing)}"] * bool(missing) + [f"has unexpected {listed(unexpected)}"] * bool(unexpected)
            raise WeightsError(
                f"{source.name} {' and '.join(said)}. Covered are the parameters that OpenFlamingo version 2 publishes, on the "
                "tower and the language model they were trained on."
            )
        for name, weight in weights.items():
            if weight.shape != expected[name]:
                raise WeightsError(
                    f"{source.name} has {name} in the shape {list(weight.shape)}, where {list(expected[name])} belongs: the "
                    f"tower is {config['vision_config']['hidden_size']} wide, the language model "
                    f"{model.config.text_config.hidden_size}. Give those that the weights were trained on."
                )
            if weight.dtype not in FLOATS:
                raise WeightsError(f"{source.name} has {name} in the dtype {weight.dtype}; {', '.join(FLOATS)} can be read.")
        complete |= weights
    return {name: complete[name] for name in expected}


# ----------------------------------------------------------------------------------------------- tokenizer


def _tokenizer(lm: Source) -> tuple[Any, dict[str, Any]]:
    """The language model's tokenizer with the tokens that the published code adds, in its order, and its settings."""
    from tokenizers import AddedToken, Tokenizer

    path = lm.folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{lm.folder} has no tokenizer.json. Load its tokenizer in transformers (AutoTokenizer.from_pretrained) and save "
            "it back with save_pretrained, which writes one."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer: {exc}. Fetch the checkpoint again.") from exc
    settings = read_json(lm.folder / "special_tokens_map.json") | read_json(lm.folder / "tokenizer_config.json")
    for name in ("chat_template", "auto_map", "name_or_path"):  # OpenFlamingo has its own form of prompts
        settings.pop(name, None)
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    added = [END, IMAGE]
    if not settings.get("pad_token"):
        settings["pad_token"] = "<PAD>"
        added.append("<PAD>")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    others = settings.pop("additional_special_tokens", None) or []
    settings["additional_special_tokens"] = [*others, *(token for token in (END, IMAGE) if token not in others)]
    if "added_tokens_decoder" in settings:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        settings["added_tokens_decoder"] |= {str(tokenizer.token_to_id(t)): {"content": t, **flags} for t in added}
    return tokenizer, settings


def _generation(config: Mapping[str, Any], lm: Source, tokenizer: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ends an answer: `<|endofchunk|>`, as in the published `generate`, and the language model's own end of text."""
    own = read_json(lm.folder / "generation_config.json").get("eos_token_id", lm.config.get("eos_token_id"))
    ends = [config["endofchunk_token_id"], *(own if isinstance(own, list) else [own])]
    pad = settings["pad_token"]
    return {
        "eos_token_id": [number for number in dict.fromkeys(ends) if number is not None],
        "pad_token_id": tokenizer.token_to_id(pad["content"] if isinstance(pad, dict) else pad),
    }


def _preprocessing(tower: Source) -> dict[str, Any]:
    """CLIP's, which is what open_clip does for the published weights: shorter side, bicubic, centre crop."""
    found = read_json(tower.folder / "preprocessor_config.json") or read_json(tower.folder / "processor_config.json").get(
        "image_processor", {}
    )
    if not found:
        raise CheckpointError(f"{tower.folder} has neither preprocessor_config.json nor processor_config.json.")
    return {**found, "processor_class": "CLIPProcessor"}
