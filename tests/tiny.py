"""Tiny random checkpoints in Hugging Face format, for tests: real architectures, real files, no meaning."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SENTENCES = [
    "USER: \nHow many cubes are there? ASSISTANT: two",
    "Describe the scene. A large red cube, a small blue ball and a white star.",
    "is the green cone left of the yellow star",
] * 20

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{{ ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyLlava:
    """A configuration of LLaVA. `shards` over 1 writes an index; `legacy` uses the weight names of older checkpoints."""

    name: str
    tower: str = "clip"
    decoder: str = "llama"
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    layer: Any = -2
    strategy: str = "default"
    bias: bool = False
    tied: bool = False
    dtype: str = "float32"
    max_shard: str | None = None
    legacy: bool = True
    side: int = 28
    patch: int = 7
    hidden: int = 64
    text: dict[str, Any] = field(default_factory=dict)
    template: bool = True


LLAVAS = [
    TinyLlava("clip-llama"),
    TinyLlava("clip-llama-gqa-bias", kv_heads=2, bias=True, layer=[-3, -2], strategy="full"),
    TinyLlava("clip-mistral-window", decoder="mistral", kv_heads=1, text={"sliding_window": 12}, dtype="bfloat16"),
    TinyLlava("clip-qwen2-tied", decoder="qwen2", kv_heads=2, tied=True, max_shard="100KB", dtype="float16"),
    TinyLlava("siglip-qwen2", tower="siglip", decoder="qwen2", kv_heads=2, layer=-1, strategy="full", legacy=False),
    TinyLlava("siglip-llama-default", tower="siglip", strategy="default", side=30, patch=6),
    TinyLlava("odd-widths", hidden=60, head_dim=10, heads=6, kv_heads=3, text={"intermediate_size": 100}),
    TinyLlava("llama3-rope", text={"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    TinyLlava("linear-rope", text={"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    TinyLlava("yarn-rope", head_dim=24, text={"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}}),
    TinyLlava("qwen2-some-layers-slide", decoder="qwen2", kv_heads=2, text={
        "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}),
    TinyLlava("siglip-three-layers", tower="siglip", layer=[0, -2, -1], strategy="full"),
]  # fmt: skip


def tiny_tokenizer() -> Any:
    """Byte-fallback BPE as Llama has it, a few hundred tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = pre_tokenizers.Metaspace(prepend_scheme="first")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = words
    learner.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    names = special + [f"<0x{b:02X}>" for b in range(256)] + sorted(learnt["vocab"], key=learnt["vocab"].get)
    merges = [tuple(m) for m in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in special])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"}, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_llava(folder: Path, tiny: TinyLlava, seed: int = 0) -> Path:
    """Writes the checkpoint into `folder` and returns it."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        MistralConfig,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = tiny_tokenizer()
    common = {"num_hidden_layers": 3, "image_size": tiny.side, "patch_size": tiny.patch, "num_attention_heads": 4}
    if tiny.tower == "clip":
        vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, projection_dim=32, **common)
    else:
        vision = SiglipVisionConfig(hidden_size=32, intermediate_size=48, **common)
    shared = {
        "vocab_size": len(tokenizer) + 3, "hidden_size": tiny.hidden, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": tiny.heads, "num_key_value_heads": tiny.kv_heads, "max_position_embeddings": 2048,
        "tie_word_embeddings": tiny.tied, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    shared |= tiny.text
    if tiny.decoder == "llama":
        text = LlamaConfig(head_dim=tiny.head_dim, attention_bias=tiny.bias, mlp_bias=tiny.bias, **shared)
    elif tiny.decoder == "mistral":
        text = MistralConfig(head_dim=tiny.head_dim, **shared)
    else:
        text = Qwen2Config(**shared)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=tiny.layer,
        vision_feature_select_strategy=tiny.strategy, tie_word_embeddings=tiny.tied,
        multimodal_projector_bias=tiny.bias or tiny.name == "clip-llama",
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are constants when they are new
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.1))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.to(getattr(torch, tiny.dtype)).save_pretrained(
        folder, save_original_format=tiny.legacy, **({"max_shard_size": tiny.max_shard} if tiny.max_shard else {})
    )
    places = (tiny.side // tiny.patch) ** 2 + (tiny.tower == "clip") - (tiny.strategy == "default")
    if tiny.tower == "clip":
        size = {"shortest_edge": tiny.side}
        images: Any = CLIPImageProcessorPil(size=size, crop_size={"height": tiny.side, "width": tiny.side})
    else:
        images = SiglipImageProcessorPil(size={"height": tiny.side, "width": tiny.side})
    processor = LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=tiny.patch, vision_feature_select_strategy=tiny.strategy,
        num_additional_image_tokens=int(tiny.tower == "clip"), image_token="<image>",
        chat_template=CHAT_TEMPLATE if tiny.template else None,
    )  # fmt: skip
    processor.save_pretrained(folder)
    assert places > 0
    return folder
