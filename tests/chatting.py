"""Tokenizers of three kinds, a chat template and turns of a chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from PIL import Image
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

SENTENCES = [
    "USER: What is on the table? ASSISTANT: a red cube and two blue balls",
    "You are a helpful assistant. Describe the picture, please!",
    "Is there a star?\nYes, there is one. The ball is left of the cone.",
    "system user assistant image im_start im_end",
] * 3

LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>", "<|vision|>"]


def llama(metaspace: bool) -> Backend:
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*SPECIAL[:3], *(f"<0x{b:02X}>" for b in range(256))], show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    state = json.loads(backend.to_str())  # fallback bytes are pieces of the model, not special tokens
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    backend = Backend.from_str(json.dumps(state))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>") or 0)]
    )
    return backend


def bytelevel() -> Backend:
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL[1:]])
    backend.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("é", special=False)])
    return backend


BACKENDS: dict[str, Callable[[], Backend]] = {
    "metaspace": lambda: llama(True),
    "prepend": lambda: llama(False),
    "bytelevel": bytelevel,
}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

PICTURE = Image.new("RGB", (28, 28), "red")
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "You are a robot."}]}


def turn(role: str, *parts: str | Image.Image) -> dict[str, Any]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": role, "content": content}
