"""Checkpoints of real shapes with seeded random weights: how fast a model runs does not depend on what it has learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["SHAPES", "make_checkpoint"]

QWEN2_05B = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
}  # fmt: skip
QWEN2_15B = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2,
}  # fmt: skip
#: Name → (family, language model, side of a picture in pixels)
SHAPES: dict[str, tuple[str, dict[str, int], int]] = {
    "llava-0.5b": ("llava", QWEN2_05B, 336),
    "llava-1.5b": ("llava", QWEN2_15B, 336),
    "qwen2-vl-2b": ("qwen2-vl", QWEN2_15B, 448),
}
VOCABULARY = 151_936
#: Qwen2-VL's special tokens, from `<|endoftext|>` on.
FIRST_SPECIAL = 151_643
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
#: The places of a picture, as each family's prompt has them.
PICTURE = {"llava": "<image>", "qwen2-vl": "<|vision_start|><|image_pad|><|vision_end|>"}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "What is in this picture, and where? Why? now"


def prompt_of(family: str, question: str, picture: bool) -> tuple[str, str, str]:
    """What comes before the picture, what stands for it, and what comes after, as TEMPLATE puts them."""
    mark = {"llava": "<image>", "qwen2-vl": "<|image_pad|>"}[family] if picture else ""
    before, after = PICTURE[family].split(mark) if mark else ("", "")
    return f"<|im_start|>user\n{before}", mark, f"{after}{question}<|im_end|>\n<|im_start|>assistant\n"


def make_checkpoint(name: str, folder: Path, decoder: Path) -> None:
    """Writes the whole model, and its language model alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2Config

    family, text, side = SHAPES[name]
    tokenizer = make_tokenizer(family)
    number = tokenizer.convert_tokens_to_ids
    shared: dict[str, Any] = {
        **text, "vocab_size": VOCABULARY, "max_position_embeddings": 32_768, "tie_word_embeddings": True,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "bos_token_id": number("<|endoftext|>"), "eos_token_id": number("<|im_end|>"),
    }  # fmt: skip
    config = _llava(shared, side, number) if family == "llava" else _qwen2_vl(shared, number)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = AutoModelForImageTextToText.from_config(config)
        alone = AutoModelForCausalLM.from_config(Qwen2Config(**shared))
    finally:
        torch.set_default_dtype(torch.float32)
    alone.model.load_state_dict(model.model.language_model.state_dict())
    for one, place in ((model, folder), (alone, decoder)):
        one.generation_config.eos_token_id = number("<|im_end|>")
        one.save_pretrained(place)
        tokenizer.save_pretrained(place)
    _save_processor(family, side, tokenizer, folder)


def make_tokenizer(family: str) -> Any:
    """Qwen2's kind of tokenizer, with as many tokens; all but a few are never made."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = words
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator([WORDS + " now" * 100], trainer)
    import json

    learnt = json.loads(learner.to_str())["model"]
    names = sorted(learnt["vocab"], key=learnt["vocab"].get)
    names += [f"w{place}" for place in range(len(names), FIRST_SPECIAL)]
    special = list(SPECIAL) + [f"<|extra_{place}|>" for place in range(FIRST_SPECIAL + len(SPECIAL), VOCABULARY)]
    if family == "llava":
        special[special.index("<|image_pad|>")] = PICTURE["llava"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(names)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = words, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False,
        **({"extra_special_tokens": {"image_token": PICTURE["llava"]}} if family == "llava" else {}),
    )  # fmt: skip


def _llava(text: dict[str, Any], side: int, number: Any) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig, Qwen2Config

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, projection_dim=768, num_hidden_layers=24, num_attention_heads=16,
        image_size=side, patch_size=14,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=Qwen2Config(**text), image_token_index=number("<image>"), vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=True,
    )  # fmt: skip


def _qwen2_vl(text: dict[str, Any], number: Any) -> Any:
    from transformers import Qwen2VLConfig

    vision = {
        "depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"], "num_heads": 16, "mlp_ratio": 4, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    mrope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    return Qwen2VLConfig(
        vision_config=vision, text_config=text | {"rope_scaling": mrope}, image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"), vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"), tie_word_embeddings=True,
    )  # fmt: skip


def _save_processor(family: str, side: int, tokenizer: Any, folder: Path) -> None:
    import json

    template = TEMPLATE.replace("PICTURE", PICTURE[family])
    if family == "llava":
        from transformers import LlavaProcessor
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        LlavaProcessor(
            image_processor=images, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, image_token="<image>", chat_template=template,
        ).save_pretrained(folder)  # fmt: skip
        return
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    Qwen2VLImageProcessorPil().save_pretrained(folder)
    # As published: the processor itself needs torchvision.
    file = folder / "preprocessor_config.json"
    about = json.loads(file.read_text(encoding="utf-8"))
    about |= {"min_pixels": 3136, "max_pixels": 12_845_056, "image_processor_type": "Qwen2VLImageProcessor"}
    about |= {"processor_class": "Qwen2VLProcessor", "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    about.pop("size", None)
    file.write_text(json.dumps(about, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
