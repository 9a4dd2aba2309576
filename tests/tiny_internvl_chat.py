"""Tiny random InternVL checkpoints in the layout of InternVL's own code: other names, queries, keys and values in one matrix,
and a tokenizer without `tokenizer.json`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tiny import SENTENCES, TinyInternVL, make_internvl

#: As in the published files: what generation, other kernels and other models read.
CLUTTER = {
    "_name_or_path": "./pretrained/Qwen2.5-32B-Instruct", "attn_implementation": "flash_attention_2", "moe_config": None,
    "_attn_implementation_autoset": True, "use_bfloat16": True, "temperature": 1.0, "top_k": 50, "output_attentions": False,
    "torch_dtype": "bfloat16", "tf_legacy_loss": False, "initializer_range": 0.02,
}  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<img>", "</img>", "<IMG_CONTEXT>", "<box>", "</box>"]
LANGUAGE = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


@dataclass(frozen=True)
class TinyInternVLChat:
    """`same` is the model as transformers has it; `internlm2` gives its Llama the form of InternLM2."""

    name: str
    same: TinyInternVL
    internlm2: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def make(self, folder: Path) -> Path:
        """Writes the checkpoint into `folder` and returns it."""
        twin = self.make_twin(folder.with_name(f"{folder.name}-twin"))
        folder.mkdir(parents=True)
        try:
            write_chat(folder, self, twin)
        finally:
            shutil.rmtree(twin)
        return folder

    def make_twin(self, folder: Path) -> Path:
        """Writes the same model in transformers' layout, in one file."""
        return make_internvl(folder, replace(self.same, legacy=False, max_shard=None))


INTERNVL_CHATS = [
    TinyInternVLChat("internvl-chat-qwen2", TinyInternVL("", vision={"attention_bias": True}, text={
        "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}})),
    TinyInternVLChat("internvl-chat-qwen3-tied", TinyInternVL(
        "", decoder="qwen3", tied=True, most=4, dtype="float16", max_shard="100KB", layer=-3)),
    TinyInternVLChat("internvl-chat-llama-rms", TinyInternVL("", decoder="llama", kv_heads=4, side=42, most=6, vision={
        "norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": True}, dtype="bfloat16")),
    TinyInternVLChat("internvl-chat-internlm2", TinyInternVL("", decoder="llama", most=1, layer=2, text={
        "head_dim": 14, "attention_bias": True, "rope_scaling": {"type": "dynamic", "factor": 2.0}}), internlm2=True,
        config={"dynamic_image_size": False, "template": "internlm2-chat"}),
]  # fmt: skip


def write_chat(folder: Path, tiny: TinyInternVLChat, twin: Path) -> None:
    """Writes what `twin` holds, which is in transformers' layout, in the published one."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((twin / "config.json").read_text(encoding="utf-8"))
    given = {
        name.removeprefix("model."): tensor
        for path in twin.glob("*.safetensors") for name, tensor in load_file(path).items()
    }  # fmt: skip
    stored = published_weights(given, config["text_config"], internlm2=tiny.internlm2)
    if tiny.same.max_shard:
        names = sorted(stored)
        halves = {f"model-{n:05}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
        for file, members in halves.items():
            save_file({name: stored[name] for name in members}, folder / file, {"format": "pt"})
        index = {"weight_map": {name: file for file, members in halves.items() for name in members}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    else:
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert all(tensor.dtype == getattr(torch, tiny.same.dtype) for tensor in stored.values())
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(published_config(tiny, config), indent=2), encoding="utf-8")
    # CLIP's, as published; the pictures of InternVL go another way.
    pictures = {
        "image_processor_type": "CLIPFeatureExtractor", "crop_size": 448, "do_center_crop": True, "do_normalize": True,
        "do_resize": True, "size": 448, "resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures), encoding="utf-8")
    about = {"_from_model_config": True, "transformers_version": "4.37.2"}
    (folder / "generation_config.json").write_text(json.dumps(about), encoding="utf-8")


def published_weights(given: Mapping[str, Any], text: Mapping[str, Any], *, internlm2: bool) -> dict[str, Any]:
    """The inverse of transformers' conversion script."""
    import torch

    groups, depth = text["num_key_value_heads"], text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    stored: dict[str, Any] = {}
    for name, tensor in given.items():
        for pattern, replacement in (
            (r"^vision_tower\.", "vision_model."), ("cls_token$", "class_embedding"),
            ("position_embeddings$", "position_embedding"), (r"patch_embeddings\.projection", "patch_embedding"),
            (r"encoder\.layer\.", "encoder.layers."), (r"attention\.projection_layer", "attn.proj"),
            (r"\.attention\.", ".attn."), ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("lambda_", "ls"),
            (r"^multi_modal_projector\.layer_norm", "mlp1.0"), (r"^multi_modal_projector\.linear_1", "mlp1.1"),
            (r"^multi_modal_projector\.linear_2", "mlp1.3"), (r"^language_model\.", "language_model.model."),
            (r"^lm_head", "language_model.lm_head"),
            *((
                (r"\.embed_tokens", ".tok_embeddings"), (r"self_attn\.o_proj", "attention.wo"), (r"self_attn\.", "attention."),
                (r"mlp\.gate_proj", "feed_forward.w1"), (r"mlp\.down_proj", "feed_forward.w2"),
                (r"mlp\.up_proj", "feed_forward.w3"), ("input_layernorm", "attention_norm"),
                ("post_attention_layernorm", "ffn_norm"), (r"language_model\.lm_head", "language_model.output"),
            ) if internlm2 and name.startswith(("language_model", "lm_head")) else ()),
        ):  # fmt: skip
            name = re.sub(pattern, replacement, name)
        stored[name] = tensor
    for name in [n for n in stored if re.search(r"\.(attn|attention)\.q_proj", n)]:
        parts = [stored.pop(name.replace("q_proj", f"{which}_proj")) for which in "qkv"]
        if ".attn." in name:
            stored[name.replace("q_proj", "qkv")] = torch.cat(parts).contiguous()
        else:
            by_group = [part.reshape(groups, -1, depth, *part.shape[1:]) for part in parts]
            stored[name.replace("q_proj", "wqkv")] = torch.cat(by_group, 1).reshape(-1, *parts[0].shape[1:]).contiguous()
    return stored


def published_config(tiny: TinyInternVLChat, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` as InternVL's own code writes it."""
    vision, text = config["vision_config"], dict(config["text_config"])
    rope = text.pop("rope_parameters")
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"} if rope["rope_type"] != "default" else None
    if tiny.internlm2:
        text["bias"] = text.pop("attention_bias")
        text.pop("mlp_bias")
        text.pop("head_dim")
        scaling = scaling and {"type": scaling["rope_type"], "factor": scaling["factor"]}
    architecture = "InternLM2ForCausalLM" if tiny.internlm2 else LANGUAGE[tiny.same.decoder]
    llm = {
        **text, **CLUTTER, "architectures": [architecture], "rope_theta": rope["rope_theta"], "rope_scaling": scaling,
        "model_type": "internlm2" if tiny.internlm2 else tiny.same.decoder,
    }  # fmt: skip
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": tiny.same.side, "llm_config": llm,
        "max_dynamic_patch": tiny.same.most, "min_dynamic_patch": 1, "model_type": "internvl_chat", "pad2square": False,
        "ps_version": "v2", "select_layer": tiny.same.layer, "system_message": None, "template": "internvl2_5",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_backbone_lora": 0, "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"], "attention_dropout": 0.0, "drop_path_rate": 0.1, "dropout": 0.0,
            "hidden_act": "gelu", "initializer_factor": 0.1, "initializer_range": 1e-10, "layer_norm_eps": 1e-06,
            "model_type": "intern_vit_6b", "num_channels": 3, "use_flash_attn": True, "use_moe": False, "num_experts": 8,
            "hidden_size": vision["hidden_size"], "image_size": tiny.same.side, "patch_size": tiny.same.patch,
            "intermediate_size": vision["intermediate_size"], "norm_type": vision["norm_type"],
            "num_attention_heads": vision["num_attention_heads"], "num_hidden_layers": vision["num_hidden_layers"],
            "qk_normalization": vision["use_qk_norm"], "qkv_bias": vision["attention_bias"],
        },
        **tiny.config,
    }  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """Qwen2's files: vocabulary and merges, added tokens apart, and a chat template that knows text only."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=318, initial_alphabet=alphabet, show_progress=False))
    learner.model.save(str(folder))
    numbers = {token: learner.get_vocab_size() + i for i, token in enumerate(SPECIAL)}
    (folder / "added_tokens.json").write_text(json.dumps(numbers), encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    table = {str(n): {"content": t, **flags, "special": t != "<tool_call>"} for t, n in numbers.items()}
    about = {
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": table, "additional_special_tokens": SPECIAL[4:],
        "add_bos_token": False, "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>", "errors": "replace",
        "pad_token": "<|endoftext|>", "split_special_tokens": False, "unk_token": None, "model_max_length": 16384,
        "chat_template": "{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% for m in messages %}{{ '<|im_start|>' + "
        "m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
