"""Tiny random OpenFlamingo inputs as they are published: a CLIP folder, a language model's folder, and a state dict."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny import tiny_tokenizer

WIDTH, SIDE, PATCH = 32, 28, 7
#: MosaicGPT's names for what MPT has.
MOSAIC = {".norm_": ".ln_", ".ffn.up_proj.": ".mlp.mlp_up.", ".ffn.down_proj.": ".mlp.mlp_down."}


@dataclass(frozen=True)
class TinyOpenFlamingo:
    """A configuration. `latents`, `depth` and the heads (of 64, as published) are the resampler's and the gated layers'.

    `lists` publishes the gated layers as the first release does, twice. `mosaic` gives the language model the form of
    MosaicGPT, whose weights are a pickle; `training` wraps the state dict as the training script saves it.
    """

    name: str
    language: str = "llama"
    layers: int = 4
    every: int = 2
    hidden: int = 64
    heads: int = 4
    latents: int = 5
    depth: int = 2
    tied: bool = False
    lists: bool = False
    mosaic: bool = False
    training: bool = False
    whole_clip: bool = True
    dtype: str = "float32"
    text: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)


OPEN_FLAMINGOS = [
    TinyOpenFlamingo("open-flamingo-llama", text={"num_key_value_heads": 2}, lists=True),
    TinyOpenFlamingo("open-flamingo-mpt", language="mpt", every=1, layers=2, tied=True),
    TinyOpenFlamingo("open-flamingo-mosaic", language="mpt", every=3, layers=3, hidden=60, heads=6, latents=7, depth=1,
                     tied=True, mosaic=True, training=True, whole_clip=False, text={"logit_scale": "inv_sqrt_d_model"},
                     attention={"qk_ln": True, "clip_qkv": 0.9, "softmax_scale": 0.3, "alibi_bias_max": 6}),
    TinyOpenFlamingo("open-flamingo-half", every=4, tied=True, dtype="float16"),
]  # fmt: skip


def tiny_config(tiny: TinyOpenFlamingo, vocabulary: int) -> dict[str, Any]:
    """What the converted `config.json` says of sizes."""
    if tiny.language == "llama":
        text = {
            "model_type": "llama", "vocab_size": vocabulary, "hidden_size": tiny.hidden, "intermediate_size": 96,
            "num_hidden_layers": tiny.layers, "num_attention_heads": tiny.heads, "max_position_embeddings": 256,
            "tie_word_embeddings": tiny.tied, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **tiny.text,
        }  # fmt: skip
    else:
        text = {
            "model_type": "mpt", "vocab_size": vocabulary, "d_model": tiny.hidden, "n_heads": tiny.heads,
            "n_layers": tiny.layers, "max_seq_len": 256, "expansion_ratio": 3 if tiny.mosaic else 4, "no_bias": True,
            "tie_word_embeddings": tiny.tied, "attn_config": {"alibi": True, **tiny.attention}, **tiny.text,
        }  # fmt: skip
    return {
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH, "hidden_act": "quick_gelu"},
        "text_config": text,
        "cross_attn_every_n_layers": tiny.every,
        "resampler": {"heads": 1, "head_dim": 64, "intermediate_size": 72, "depth": tiny.depth, "latents": tiny.latents},
        "cross_attention": {"heads": 2, "head_dim": 64, "intermediate_size": 80},
        "image_token_id": vocabulary - 1,
        "endofchunk_token_id": vocabulary - 2,
    }  # fmt: skip


def tiny_model(tiny: TinyOpenFlamingo, vocabulary: int = 50, seed: int = 0) -> Any:
    """The torch model with random weights, gates that are open, and biases and norms that are no constants."""
    import torch

    from edgevlm.models.open_flamingo import model_from_config

    torch.manual_seed(seed)
    model = model_from_config(tiny_config(tiny, vocabulary)).eval()
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = parameter.ndim > 1
            parameter.add_(torch.randn_like(parameter) * (0.6 * parameter[0].numel() ** -0.5 if wide else 0.1))
            if name.endswith("_gate"):
                parameter.copy_((0.4 + torch.rand_like(parameter)) * torch.randn_like(parameter).sign())
    return model


def make_open_flamingo(folder: Path, tiny: TinyOpenFlamingo, seed: int = 0) -> dict[str, Path]:
    """Writes the three inputs into `folder` and returns their paths, by the names that `convert_open_flamingo` gives them."""
    import torch
    from safetensors.torch import save_file

    paths = {"weights": folder / "checkpoint.pt", "vision": folder / "clip", "language": folder / "language"}
    for name in ("vision", "language"):
        paths[name].mkdir(parents=True)
    tokenizer = tiny_tokenizer(image=False)
    words = len(tokenizer)
    tokenizer.save_pretrained(paths["language"])
    config = tiny_config(tiny, words + 2)
    model = tiny_model(tiny, words + 2, seed)
    state = {name: tensor.to(getattr(torch, tiny.dtype)) for name, tensor in model.state_dict().items()}

    _write_clip(paths["vision"], state, config["vision_config"], tiny.whole_clip)
    text = dict(config["text_config"])
    table = "model.embed_tokens.weight" if tiny.language == "llama" else "transformer.wte.weight"
    language = {n.removeprefix("language_model."): t for n, t in state.items() if n.startswith("language_model.")}
    stored = {name: t[:words] if len(t) == words + 2 else t for name, t in language.items()}
    stored[table] = torch.randn_like(stored[table])  # what the trained table takes the place of
    if tiny.tied:
        stored.pop("lm_head.weight")
    text |= {"vocab_size": words, "architectures": ["LlamaForCausalLM" if tiny.language == "llama" else "MptForCausalLM"]}
    if tiny.mosaic:
        text = _as_mosaic(text)
        for old, new in MOSAIC.items():
            stored = {name.replace(old, new): tensor for name, tensor in stored.items()}
        torch.save(stored, paths["language"] / "pytorch_model.bin")
    else:
        save_file({name: t.contiguous() for name, t in stored.items()}, paths["language"] / "model.safetensors")
    (paths["language"] / "config.json").write_text(json.dumps(text))

    torch.save(published_state(tiny, state, table), paths["weights"])
    return paths


def published_state(tiny: TinyOpenFlamingo, state: dict[str, Any], table: str) -> dict[str, Any]:
    """The state dict of what is trained, under the names that the published code gives it."""
    body = "model.layers" if tiny.language == "llama" else "transformer.blocks"
    published = {name: tensor for name, tensor in state.items() if name.startswith("perceiver.")}
    for name, tensor in state.items():
        if name.startswith("gated_cross_attn_layers."):
            _, layer, rest = name.split(".", 2)
            published[f"lang_encoder.{body}.{layer}.gated_cross_attn_layer.{rest}"] = tensor
            if tiny.lists:
                published[f"lang_encoder.{name}"] = tensor
    published[f"lang_encoder.{table}"] = state[f"language_model.{table}"]
    if tiny.training:
        wrapped = {f"module.{name}": tensor for name, tensor in published.items()}
        return {"epoch": 3, "model_state_dict": wrapped, "lr_scheduler_state_dict": {"last_epoch": 7}}
    return published


def _as_mosaic(text: dict[str, Any]) -> dict[str, Any]:
    attention = text.pop("attn_config")
    renamed = {f"attn_{name}" if name in ("qk_ln", "clip_qkv") else name: value for name, value in attention.items()}
    text |= {"model_type": "mosaic_gpt", "architectures": ["MosaicGPT"], "mlp_ratio": text.pop("expansion_ratio"), **renamed}
    return text


def _write_clip(folder: Path, state: dict[str, Any], config: dict[str, Any], whole: bool) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tower = {n.removeprefix("vision_tower."): t.clone() for n, t in state.items() if n.startswith("vision_tower.")}
    if whole:  # as openai/clip-vit-large-patch14: both towers, and what older versions of transformers kept
        tower = {f"vision_model.{name}": tensor for name, tensor in tower.items()}
        tower |= {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
        tower["vision_model.embeddings.position_ids"] = torch.arange((SIDE // PATCH) ** 2 + 1)[None]
        config = {"architectures": ["CLIPModel"], "model_type": "clip", "text_config": {}, "vision_config": config}
    save_file(tower, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
