"""The layout that InternVL's own code publishes (`internvl_chat`), in the terms of transformers' model: configuration, names of
weights, conversation, preprocessing, tokenizer. The family is in `internvl.py`; none of the published code is run.

Facts from https://github.com/OpenGVLab/InternVL (configuration_internvl_chat.py, configuration_intern_vit.py,
modeling_internvl_chat.py, modeling_intern_vit.py, modeling_internlm2.py, conversation.py) and from transformers'
convert_internvl_weights_to_hf.py. InternLM2, the decoder of some sizes of 2.5, is Llama with other names and one matrix for
queries, keys and values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedModelError, WeightsError
from . import Rows, llava

ARCHITECTURE = "InternVLChatModel"
#: What stands in a prompt before, for, and behind the places of a picture.
BEFORE, IMAGE, AFTER = "<img>", "<IMG_CONTEXT>", "</img>"

#: `architectures` of `llm_config` → what transformers calls such a model.
DECODERS = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama",
            "InternLM2ForCausalLM": "llama"}  # fmt: skip
INTERNLM2 = "InternLM2ForCausalLM"

#: Options of the published configurations → name in transformers, and the published default; then of the whole model.
_VISION = {
    "hidden_size": ("hidden_size", 3200), "num_hidden_layers": ("num_hidden_layers", 48),
    "num_attention_heads": ("num_attention_heads", 25), "intermediate_size": ("intermediate_size", 12800),
    "image_size": ("image_size", 224), "patch_size": ("patch_size", 14), "num_channels": ("num_channels", 3),
    "qkv_bias": ("attention_bias", False), "qk_normalization": ("use_qk_norm", True), "hidden_act": ("hidden_act", "gelu"),
    "norm_type": ("norm_type", "rms_norm"), "layer_norm_eps": ("layer_norm_eps", 1e-6),
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "ps_version": "v1", "pad2square": False, "select_layer": -1, "downsample_ratio": 0.5, "force_image_size": None,
    "dynamic_image_size": False, "use_thumbnail": False, "min_dynamic_patch": 1, "max_dynamic_patch": 6, "template": None,
    "system_message": None, "use_backbone_lora": 0, "use_llm_lora": 0,
}  # fmt: skip

#: Conversations by the name in `template`: what ends a turn, and the system's message unless `system_message` is another.
TEMPLATES = {
    "internvl2_5": (
        "<|im_end|>\n",
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
    ),
    **dict.fromkeys(
        ("Hermes-2", "internlm2-chat"),
        (
            "<|im_end|>",
            "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。",
        ),
    ),
}

#: Published names of weights to those of transformers, one after the other.
_NAMES = tuple(
    (re.compile(published), name)
    for published, name in (
        (r"^vision_model\.embeddings\.class_embedding$", "vision_tower.embeddings.cls_token"),
        (r"^vision_model\.embeddings\.position_embedding$", "vision_tower.embeddings.position_embeddings"),
        (r"^vision_model\.embeddings\.patch_embedding\.", "vision_tower.embeddings.patch_embeddings.projection."),
        (r"^vision_model\.encoder\.layers\.", "vision_tower.encoder.layer."),
        (r"\.attn\.proj\.", ".attention.projection_layer."),
        (r"\.attn\.", ".attention."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.ls([12])$", r".lambda_\1"),
        (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
        (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
        (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
        (r"^language_model\.model\.tok_embeddings\.", "language_model.model.embed_tokens."),
        (r"^language_model\.output\.", "language_model.lm_head."),
        (r"\.attention\.(wo|wqkv)\.", r".self_attn.\1."),
        (r"\.wo\.", ".o_proj."),
        (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
        (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
        (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
        (r"\.attention_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
    )
)


def is_chat(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is in this layout."""
    return ARCHITECTURE in (config.get("architectures") or [])


def check_config(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError, naming what is not covered and what is."""
    option, vision, language = _options(config), _vision(config), config.get("llm_config") or {}
    decoder = _decoder(language)
    if decoder not in DECODERS:
        raise UnsupportedModelError(
            f"InternVL with the decoder {decoder!r} is not supported; supported are {', '.join(DECODERS)}."
        )
    size, side, most = vision["image_size"], option["force_image_size"], option["max_dynamic_patch"]
    refused = {
        f"ps_version {option['ps_version']!r} (supported: 'v2')": option["ps_version"] != "v2",
        "pad2square (supported: pictures resized to tiles)": option["pad2square"],
        f"force_image_size {side} and positions for image_size {size} (supported: one size)": side not in (None, size),
        "LoRA weights (supported: merged ones)": option["use_backbone_lora"] or option["use_llm_lora"],
        "tiles without the whole picture behind them (supported: use_thumbnail true)": (
            option["dynamic_image_size"] and most > 1 and not option["use_thumbnail"]
        ),
        "rope_pos_id_version 'v2pe' (supported: 'default')": language.get("rope_pos_id_version", "default") != "default",
        "a mixture of experts in the vision tower (supported: use_moe false)": vision["use_moe"],
    }
    if found := [what for what, is_so in refused.items() if is_so]:
        raise UnsupportedModelError(f"InternVL with {' and '.join(found)} is not supported.")
    chat_template(config)


def read_config(folder: Path, config: Mapping[str, Any]) -> Any:
    """As an InternVLConfig of transformers. Raises UnsupportedModelError where the tokenizer has no token for a picture."""
    from transformers import InternVLConfig, InternVLVisionConfig

    option, vision, text = _options(config), _vision(config), _text_config(config["llm_config"])
    (image,) = token_numbers(folder, IMAGE)
    patches = vision["image_size"] // vision["patch_size"]
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            **{name: vision[published] for published, (name, _) in _VISION.items()},
            use_mean_pooling=True, use_absolute_position_embeddings=True,
        ),
        text_config=text, tie_word_embeddings=text.tie_word_embeddings, image_token_id=image,
        image_seq_length=int(patches**2 * option["downsample_ratio"] ** 2), downsample_ratio=option["downsample_ratio"],
        vision_feature_layer=option["select_layer"], vision_feature_select_strategy="default",
    )  # fmt: skip


def _text_config(language: Mapping[str, Any]) -> Any:
    from dataclasses import fields

    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[DECODERS[_decoder(language)]]
    # Published files hold options of generation, of attention kernels and of other models as well.
    known = {f.name for f in fields(kind)} - {f.name for f in fields(PreTrainedConfig)} | {"rope_theta", "rope_scaling"}
    given = {name: value for name, value in language.items() if name in known}
    if _decoder(language) == INTERNLM2:
        given["attention_bias"] = language.get("bias", True)
    return kind(**given)


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config.get(name, default) for name, default in _DEFAULTS.items()}


def _vision(config: Mapping[str, Any]) -> dict[str, Any]:
    given = config.get("vision_config") or {}
    return {name: given.get(name, default) for name, (_, default) in _VISION.items()} | {"use_moe": given.get("use_moe", False)}


def _decoder(language: Mapping[str, Any]) -> str:
    return str((language.get("architectures") or [language.get("model_type")])[0])


# ---------------------------------------------------------------------------------------------- weights


def split_weight(config: Mapping[str, Any], name: str, shape: Sequence[int]) -> dict[str, Rows | None]:
    """The names in transformers of what a published weight holds, each with its rows (None: all of them).

    Raises WeightsError where queries, keys and values do not have the rows that `config` says.
    """
    published = name
    for pattern, replacement in _NAMES:
        name = pattern.sub(replacement, name)
    name = llava.weight_name(name)
    if ".attention.qkv." in name:
        width = _vision(config)["hidden_size"]
        sizes, period = {"q_proj": width, "k_proj": width, "v_proj": width}, 3 * width
        _check_rows(published, shape, period)
        return _stacked(name, "qkv", sizes, period)
    if ".self_attn.wqkv." in name:
        language = config["llm_config"]
        heads = int(language.get("num_attention_heads", 32))
        groups = int(language.get("num_key_value_heads") or heads)
        depth = int(language.get("hidden_size", 4096)) // heads
        sizes = {"q_proj": heads // groups * depth, "k_proj": depth, "v_proj": depth}
        _check_rows(published, shape, groups * sum(sizes.values()))
        return _stacked(name, "wqkv", sizes, sum(sizes.values()))
    return {name: None}


def _stacked(name: str, fused: str, sizes: Mapping[str, int], period: int) -> dict[str, Rows | None]:
    rows: dict[str, Rows | None] = {}
    first = 0
    for part, count in sizes.items():
        rows[name.replace(f".{fused}.", f".{part}.")] = Rows(first, count, period)
        first += count
    return rows


def _check_rows(name: str, shape: Sequence[int], rows: int) -> None:
    if not shape or shape[0] != rows:
        raise WeightsError(f"The weight {name!r} has the shape {list(shape)}; config.json asks for {rows} rows.")


# ------------------------------------------------------------------------------------------------- text


def token_numbers(folder: Path, *texts: str) -> list[int]:
    """The numbers of added tokens. Raises UnsupportedModelError where the tokenizer adds no such token."""
    try:
        known = _added_tokens(folder)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise CheckpointError(f"The tokenizer in {folder} is damaged: {type(exc).__name__}: {exc}.") from exc
    for text in texts:
        if text not in known:
            raise UnsupportedModelError(
                f"The tokenizer in {folder} adds no token {text!r}, which the prompts of this model hold. Copy the tokenizer "
                "files that belong to this checkpoint into its folder."
            )
    return [known[text] for text in texts]


def _added_tokens(folder: Path) -> dict[str, int]:
    """By text, of `tokenizer.json` or of what it would be made from."""
    if (folder / "tokenizer.json").is_file():
        return {str(entry["content"]): int(entry["id"]) for entry in _read(folder / "tokenizer.json").get("added_tokens", [])}
    listed = _read(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    named = {str(entry["content"]): int(number) for number, entry in listed.items()}
    return {**{str(text): int(number) for text, number in _read(folder / "added_tokens.json").items()}, **named}


def chat_template(config: Mapping[str, Any]) -> str | None:
    """The conversation that `template` names, as Jinja, None where it names none. A picture is its token and a line break.

    Raises UnsupportedModelError for a name that is not known here.
    """
    option = _options(config)
    if option["template"] is None:
        return None
    if option["template"] not in TEMPLATES:
        raise UnsupportedModelError(
            f"config.json names the conversation template {option['template']!r}, which is code of the checkpoint; known here "
            f"are {', '.join(TEMPLATES)}. Without 'template' in config.json, the tokenizer's own chat template is used."
        )
    end, system = TEMPLATES[option["template"]]
    if option["system_message"] is not None:
        system = option["system_message"]
    began, ended = (json.dumps(text, ensure_ascii=False) for text in (f"<|im_start|>system\n{system}{end}", end))
    return (
        f"{{% if messages[0]['role'] != 'system' %}}{{{{ {began} }}}}{{% endif %}}"
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{{{{ '{IMAGE}\\n' }}}}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        f"{{% endfor %}}{{% endif %}}{{{{ {ended} }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def tokenizer(folder: Path) -> Any:
    """The tokenizer, by transformers' own classes. Raises CheckpointError where its files are damaged or need code."""
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    if (folder / "tokenizer.json").is_file():
        kind: Any = PreTrainedTokenizerFast
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        kind = Qwen2Tokenizer
    else:
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor vocab.json and merges.txt; another tokenizer is code of the checkpoint, "
            "which is not run. Copy tokenizer.json from the same model in transformers' layout (its name ends in -hf)."
        )
    try:
        return kind.from_pretrained(folder)
    except Exception as exc:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"The tokenizer in {folder} is damaged: {type(exc).__name__}: {exc}.") from exc


# ------------------------------------------------------------------------------------------------ files


def image_processor(config: Mapping[str, Any]) -> dict[str, Any]:
    """`dynamic_preprocess` and `build_transform` of the published code as an image processor of transformers."""
    option, side = _options(config), _vision(config)["image_size"]
    dynamic = option["dynamic_image_size"]
    return {
        "image_processor_type": "GotOcr2ImageProcessor", "size": {"height": side, "width": side}, "resample": 3,
        "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "crop_to_patches": True,
        "min_patches": option["min_dynamic_patch"] if dynamic else 1,
        "max_patches": option["max_dynamic_patch"] if dynamic else 1,
    }  # fmt: skip


def bundle_files(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The files of a checkpoint in transformers' layout that this one lacks or has in another form, by name."""
    made = {"preprocessor_config.json": json.dumps(image_processor(config), indent=2) + "\n"}
    if not (folder / "tokenizer.json").is_file():
        made["tokenizer.json"] = tokenizer(folder).backend_tokenizer.to_str(pretty=True)
    template = chat_template(config)
    if template is not None:
        made["chat_template.jinja"] = template
        (end,) = token_numbers(folder, TEMPLATES[config["template"]][0].strip())  # `chat` stops at it, whatever the files say
        generation = _read(folder / "generation_config.json")
        made["generation_config.json"] = json.dumps({**generation, "eos_token_id": end}, indent=2) + "\n"
    return made


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} is not JSON: {exc}.") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no object.")
    return content
