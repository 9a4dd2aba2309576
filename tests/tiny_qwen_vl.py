"""Tiny random Qwen-VL checkpoints in the form in which they are published: `qwen.tiktoken` and no `tokenizer.json`, no
`preprocessor_config.json`, no chat template."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny import SENTENCES

#: What the tokenizer learns from, so that it has words, runs of blanks and of line ends.
CORPUS = [*SENTENCES, "user\n\n\nassistant\n\n  Picture 1: the cat", "system You are a helpful assistant."] * 3


@dataclass(frozen=True)
class TinyQwenVL:
    """A configuration. `visual` and `text` are entries of `config.json` that differ; `tokens` is how many ranks there are.

    `chat` says whether the generation configuration asks for ChatML. `shards` is the number of weight files, `pickled` whether
    these are what torch saves, as the published ones.
    """

    name: str
    hidden: int = 128
    heads: int = 4
    tokens: int = 300
    chat: bool = True
    dtype: str = "float32"
    shards: int = 1
    pickled: bool = False
    visual: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)

    def make(self, folder: Path) -> Path:
        """Writes the checkpoint into `folder`."""
        return make_qwen_vl(folder, self)


QWEN_VLS = [
    TinyQwenVL("qwen-vl", visual={"width": 64, "layers": 3}),
    TinyQwenVL("qwen-vl-base-biases", chat=False, text={"no_bias": False, "rotary_pct": 0.5, "rotary_emb_base": 500},
               visual={"image_size": 56, "patch_size": 7, "n_queries": 9, "width": 128}),
    TinyQwenVL("qwen-vl-odd", hidden=180, heads=6, tokens=257, shards=3, dtype="float16",
               text={"intermediate_size": 202, "use_dynamic_ntk": False, "max_position_embeddings": 400, "seq_length": 30},
               visual={"image_size": 50, "patch_size": 7, "n_queries": 10, "width": 60, "heads": 5, "mlp_ratio": 4.9231}),
    TinyQwenVL("qwen-vl-two-heads", hidden=256, heads=2, dtype="bfloat16", text={"tie_word_embeddings": True},
               visual={"image_size": 64, "patch_size": 4, "n_queries": 16}),
]  # fmt: skip


def tiny_config(tiny: TinyQwenVL) -> dict[str, Any]:
    """`config.json`, with the entries that the published one has."""
    visual = {
        "heads": 4, "image_size": 28, "image_start_id": tiny.tokens + 214, "layers": 2, "mlp_ratio": 2.5,
        "output_dim": tiny.hidden, "patch_size": 7, "width": 48, "n_queries": 4, **tiny.visual,
    }  # fmt: skip
    return {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "attn_dropout_prob": 0.0, "bf16": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}, "emb_dropout_prob": 0.0, "fp16": False,
        "fp32": True, "hidden_size": tiny.hidden, "initializer_range": 0.02, "intermediate_size": 192,
        "kv_channels": tiny.hidden // tiny.heads, "layer_norm_epsilon": 1e-6, "max_position_embeddings": 512,
        "no_bias": True, "num_attention_heads": tiny.heads, "num_hidden_layers": 2, "onnx_safe": None,
        "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 256,
        "tie_word_embeddings": False, "tokenizer_type": "QWenTokenizer", "use_cache": True, "use_dynamic_ntk": True,
        "use_flash_attn": "auto", "use_logn_attn": True, "visual": visual, "vocab_size": tiny.tokens + 230, **tiny.text,
    }  # fmt: skip


def tiny_ranks(tokens: int) -> dict[bytes, int]:
    """A vocabulary learnt from `CORPUS`: the 256 bytes in the order of byte-level tokenizers, then joins in turn."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from edgevlm.models.qwen_vl import PATTERN

    learner = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=tokens, initial_alphabet=alphabet, show_progress=False))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in learner.get_vocab().items()}
    assert len(ranks) == tokens
    return ranks


def write_tiktoken(path: Path, ranks: dict[bytes, int]) -> None:
    """`qwen.tiktoken`."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ordered))


def tiny_model(tiny: TinyQwenVL, seed: int = 0) -> Any:
    """The torch model with random weights, and biases and norms that are no constants."""
    import torch

    from edgevlm.models.qwen_vl import model_from_config

    torch.manual_seed(seed)
    model = model_from_config(tiny_config(tiny)).eval()
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("pos_embed"):
                wide = parameter.ndim > 1
                parameter.add_(torch.randn_like(parameter) * (0.6 * parameter[0].numel() ** -0.5 if wide else 0.1))
    return model


def make_qwen_vl(folder: Path, tiny: TinyQwenVL, seed: int = 0) -> Path:
    """Writes the checkpoint into `folder`."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = tiny_config(tiny)
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"chat_format": "chatml" if tiny.chat else "raw", "eos_token_id": tiny.tokens, "pad_token_id": tiny.tokens}
    (folder / "generation_config.json").write_text(json.dumps({**generation, "max_window_size": 6144, "do_sample": True}))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "model_max_length": 8192, "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}))  # fmt: skip
    (folder / "modeling_qwen.py").write_text("raise SystemExit('the code of a checkpoint was run')\n")
    write_tiktoken(folder / "qwen.tiktoken", tiny_ranks(tiny.tokens))

    state = {name: tensor.to(getattr(torch, tiny.dtype)) for name, tensor in tiny_model(tiny, seed).state_dict().items()}
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    names = list(state)
    suffix = "bin" if tiny.pickled else "safetensors"
    stem = "pytorch_model" if tiny.pickled else "model"
    placed: dict[str, str] = {}
    for number in range(tiny.shards):
        shard = {name: state[name].contiguous() for name in names[number :: tiny.shards]}
        numbered = f"{stem}-{number + 1:05d}-of-{tiny.shards:05d}.{suffix}" if tiny.shards > 1 else f"{stem}.{suffix}"
        if tiny.pickled:
            torch.save(shard, folder / numbered)
        else:
            save_file(shard, folder / numbered)
        placed |= dict.fromkeys(shard, numbered)
    if tiny.shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder
