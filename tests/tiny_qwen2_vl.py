"""Tiny random checkpoints of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, in the forms that they are published in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny import disturb, tiny_bytes_tokenizer

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyQwen2VL:
    """A configuration. `generation` is 2, 2.5 or 3; `flat` writes `config.json` and the weights' names as before transformers
    4.52."""

    name: str
    generation: float = 2
    patch: int = 4
    merge: int = 2
    temporal: int = 2
    fewest: int = 256
    most: int = 4096
    kv_heads: int = 2
    tied: bool = False
    flat: bool = False
    dtype: str = "float32"
    max_shard: str | None = None
    sections: tuple[int, int, int] = (2, 3, 2)
    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)

    def make(self, folder: Path, seed: int = 0) -> Path:
        """Writes the checkpoint into `folder` and returns it; Qwen2VLProcessor, which needs torchvision, writes none of it."""
        import torch
        import transformers
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        prefix = {2: "Qwen2VL", 2.5: "Qwen2_5_VL", 3: "Qwen3VL"}[self.generation]
        tokenizer = tiny_bytes_tokenizer(SPECIAL, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        number, kind = tokenizer.convert_tokens_to_ids, "type" if self.generation < 3 else "rope_type"
        sizes: dict[str, Any] = {"depth": 3, "num_heads": 4, "patch_size": self.patch, "spatial_merge_size": self.merge,
                                 "temporal_patch_size": self.temporal}  # fmt: skip
        if self.generation == 2:
            sizes |= {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": 56}
        elif self.generation == 3:
            sizes |= {"hidden_size": 32, "intermediate_size": 44, "out_hidden_size": 56, "deepstack_visual_indexes": [0, 2],
                      "num_position_embeddings": 25}  # fmt: skip
        else:
            sizes |= {"hidden_size": 32, "intermediate_size": 44, "out_hidden_size": 56, "fullatt_block_indexes": [1],
                      "window_size": 2 * self.merge * self.patch, "tokens_per_second": 2}  # fmt: skip
        config = getattr(transformers, f"{prefix}Config")(
            vision_config=sizes | self.vision,
            text_config={
                "vocab_size": len(tokenizer) + 3, "hidden_size": 56, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": self.kv_heads, "max_position_embeddings": 2048,
                "tie_word_embeddings": self.tied, "rope_theta": 1e4, "eos_token_id": number("<|im_end|>"), "bos_token_id": None,
                "pad_token_id": 0,
                "rope_scaling": {kind: "mrope" if kind == "type" else "default", "mrope_section": list(self.sections)},
                **self.text,
            },
            image_token_id=number("<|image_pad|>"), video_token_id=number("<|video_pad|>"),
            vision_start_token_id=number("<|vision_start|>"), vision_end_token_id=number("<|vision_end|>"),
            tie_word_embeddings=self.tied,
        )  # fmt: skip
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
        disturb(model)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = number("<|im_end|>"), 0
        model.to(getattr(torch, self.dtype)).save_pretrained(
            folder, save_original_format=self.flat, **({"max_shard_size": self.max_shard} if self.max_shard else {})
        )
        if self.flat:
            _flatten(folder / "config.json")
        tokenizer.save_pretrained(folder)
        Qwen2VLImageProcessorPil(
            patch_size=self.patch, merge_size=self.merge, temporal_patch_size=self.temporal,
            min_pixels=self.fewest, max_pixels=self.most,
        ).save_pretrained(folder)  # fmt: skip
        if self.flat:
            about = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
            about |= {"min_pixels": self.fewest, "max_pixels": self.most, "image_processor_type": "Qwen2VLImageProcessor"}
            about["size"] = {"min_pixels": self.fewest, "max_pixels": self.most}
            (folder / "preprocessor_config.json").write_text(json.dumps(about), encoding="utf-8")
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        return folder


def _flatten(path: Path) -> None:
    """What belongs to the language model stands at the top, as in the first checkpoints."""
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    kept = {k: v for k, v in text.items() if k not in ("model_type", "layer_types", "dtype", "architectures")}
    path.write_text(json.dumps(kept | config), encoding="utf-8")


QWEN2_VLS = [
    TinyQwen2VL("qwen2-vl"),
    TinyQwen2VL("qwen2-vl-flat-tied", tied=True, flat=True, kv_heads=1, dtype="bfloat16", max_shard="60KB"),
    TinyQwen2VL("qwen2-vl-odd", patch=3, merge=3, temporal=3, fewest=81, most=6561, kv_heads=4, sections=(1, 1, 2),
                vision={"embed_dim": 48, "num_heads": 2, "depth": 2, "hidden_act": "gelu"},
                text={"num_attention_heads": 7, "num_key_value_heads": 7, "use_sliding_window": True, "sliding_window": 9,
                      "max_window_layers": 1}),
    TinyQwen2VL("qwen2.5-vl", 2.5),
    TinyQwen2VL("qwen2.5-vl-windows", 2.5, patch=5, dtype="float16", tied=True, vision={
        "window_size": 30, "fullatt_block_indexes": [0, 2], "depth": 4, "tokens_per_second": 4}),
    TinyQwen2VL("qwen3-vl", 3, text={"head_dim": 14}),
    TinyQwen2VL("qwen3-vl-tied", 3, patch=5, tied=True, dtype="bfloat16", sections=(4, 2, 2), vision={
        "deepstack_visual_indexes": [1], "depth": 4, "num_position_embeddings": 144}, text={"head_dim": 16}),
    TinyQwen2VL("qwen2.5-vl-whole", 2.5, merge=1, flat=True, vision={"fullatt_block_indexes": [0, 1, 2]}),
]  # fmt: skip
