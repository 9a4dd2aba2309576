"""Tiny random checkpoints in Hugging Face format, for tests: real architectures, real files, no meaning."""

from __future__ import annotations

import json
from collections.abc import Sequence
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


@dataclass(frozen=True)
class TinyBlip2:
    """A configuration of BLIP-2. `queries` are the Q-Former's, every `frequency`-th of its layers sees the picture.

    `published` gives the files the form that those of Salesforce have, see `_as_published`; what they lack `load_tiny`
    adds.
    """

    name: str
    language: str = "opt"
    queries: int = 4
    frequency: int = 2
    side: int = 28
    patch: int = 7
    tied: bool = True
    dtype: str = "float32"
    max_shard: str | None = None
    published: bool = False
    vision: dict[str, Any] = field(default_factory=dict)
    qformer: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)


BLIP2S = [
    TinyBlip2("blip2-opt"),
    TinyBlip2("blip2-opt-350m", queries=7, frequency=1, vision={"hidden_act": "quick_gelu", "qkv_bias": False},
              text={"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    TinyBlip2("blip2-opt-plain", frequency=3, tied=False, qformer={"num_hidden_layers": 4, "num_attention_heads": 2},
              text={"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"}),
    TinyBlip2("blip2-opt-no-final-norm", queries=1, side=30, patch=6, qformer={"hidden_act": "relu", "num_hidden_layers": 2},
              text={"_remove_final_layer_norm": True, "word_embed_proj_dim": 40}, dtype="bfloat16"),
    TinyBlip2("blip2-opt-half", side=42, patch=14, dtype="float16", max_shard="100KB"),
    TinyBlip2("blip2-opt-published", published=True),
    TinyBlip2("blip2-t5", language="t5", tied=False, text={"num_layers": 3, "num_decoder_layers": 2}),
    TinyBlip2("blip2-t5-tied", language="t5", queries=7, text={
        "feed_forward_proj": "relu", "relative_attention_num_buckets": 7, "relative_attention_max_distance": 9}),
    TinyBlip2("blip2-t5-half", language="t5", tied=False, frequency=1, dtype="float16", max_shard="100KB",
              text={"feed_forward_proj": "gated-silu"}),
    TinyBlip2("blip2-t5-bfloat16", language="t5", tied=False, frequency=3, dtype="bfloat16", text={"num_heads": 3}),
    TinyBlip2("blip2-t5-published", language="t5", tied=False, published=True),
]  # fmt: skip


@dataclass(frozen=True)
class TinyInstructBlip(TinyBlip2):
    """A configuration of InstructBLIP, whose Q-Former reads the question too, cut into tokens of its own."""


INSTRUCTBLIPS = [
    TinyInstructBlip("instructblip-llama", language="llama", tied=False),
    TinyInstructBlip("instructblip-llama-half", language="llama", tied=False, queries=7, frequency=1, dtype="float16",
                     max_shard="100KB", vision={"hidden_act": "quick_gelu", "qkv_bias": False},
                     text={"num_key_value_heads": 2}),
    TinyInstructBlip("instructblip-llama-published", language="llama", tied=False, published=True),
    TinyInstructBlip("instructblip-t5", language="t5", tied=False, frequency=3, qformer={"num_hidden_layers": 4}),
    TinyInstructBlip("instructblip-t5-published", language="t5", tied=False, published=True, dtype="bfloat16"),
]  # fmt: skip


@dataclass(frozen=True)
class TinyFlamingo:
    """A configuration of IDEFICS. Every `interval`-th of the `layers`, from the first, has a gated cross-attention before it.

    `special` is what the tokenizer has after the tokens of Llama; these have a table of their own of `additional` rows,
    or where that is 0 rows in the table of the others. `published` gives the files the form they have on the Hub.
    """

    name: str
    layers: int = 2
    interval: int = 1
    heads: int = 4
    hidden: int = 48
    act: str = "silu"
    alpha: str = "float"
    norms: bool = False
    special: tuple[str, ...] = ("<fake_token_around_image>", "<image>")
    additional: int = 2
    tied: bool = False
    resampler: bool = True
    resampler_norms: bool = False
    latents: int = 5
    depth: int = 2
    resampler_heads: int = 2
    resampler_head_dim: int = 12
    side: int = 28
    patch: int = 7
    dtype: str = "float32"
    max_shard: str | None = None
    published: bool = False
    vision: dict[str, Any] = field(default_factory=dict)


END_OF_UTTERANCE = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
FLAMINGOS = [
    TinyFlamingo("flamingo"),
    TinyFlamingo("flamingo-every-second", layers=4, interval=2, alpha="vector", norms=True, resampler_norms=True,
                 special=END_OF_UTTERANCE, additional=3, published=True),
    TinyFlamingo("flamingo-every-third", layers=3, interval=3, resampler=False, tied=True, norms=True),
    TinyFlamingo("flamingo-no-resampler", layers=3, resampler=False, alpha="vector", act="gelu", side=30, patch=6,
                 vision={"hidden_act": "quick_gelu"}),
    TinyFlamingo("flamingo-one-table", additional=0, hidden=60, heads=6, latents=1, depth=1, resampler_norms=True),
    TinyFlamingo("flamingo-one-table-tied", additional=0, tied=True, special=END_OF_UTTERANCE, norms=True, dtype="bfloat16"),
    TinyFlamingo("flamingo-half", layers=4, interval=2, latents=7, depth=3, resampler_heads=3, resampler_head_dim=16,
                 special=END_OF_UTTERANCE, additional=4, side=42, patch=14, dtype="float16", max_shard="100KB"),
]  # fmt: skip


@dataclass(frozen=True)
class TinyInternVL:
    """A configuration of InternVL; `most` tiles of a picture, `side` pixels each."""

    name: str
    decoder: str = "qwen2"
    kv_heads: int = 2
    side: int = 28
    patch: int = 7
    layer: int = -1
    most: int = 12
    tied: bool = False
    legacy: bool = True
    dtype: str = "float32"
    max_shard: str | None = None
    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)


INTERNVLS = [
    TinyInternVL("internvl-qwen2"),
    TinyInternVL("internvl-qwen3-tied", decoder="qwen3", tied=True, most=4, dtype="float16", max_shard="100KB", legacy=False),
    TinyInternVL("internvl-llama-rms", decoder="llama", kv_heads=4, side=42, most=6, vision={
        "norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": True, "use_mean_pooling": False}, dtype="bfloat16"),
    TinyInternVL("internvl-one-tile", layer=-2, most=1, vision={"use_absolute_position_embeddings": False}),
]  # fmt: skip


def tiny_tokenizer(image: bool = True) -> Any:
    """Byte-fallback BPE as Llama has it, a few hundred tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = pre_tokenizers.Metaspace(prepend_scheme="first")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = words
    learner.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    special = ["<pad>", "<s>", "</s>", "<unk>", *["<image>"][: int(image)]]
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
        clean_up_tokenization_spaces=False, **({"extra_special_tokens": {"image_token": "<image>"}} if image else {}),
    )  # fmt: skip


def tiny_bytes_tokenizer(special: Sequence[str], **names: Any) -> Any:
    """Byte-level BPE as Qwen has it, a few hundred tokens, the special ones behind them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    learner.decoder = decoders.ByteLevel()
    learner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=learner, clean_up_tokenization_spaces=False, **names)


def opt_tokenizer() -> Any:
    """Byte-level BPE as OPT has it: `</s>` begins a text and ends an answer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    added = [AddedToken(n, special=True, normalized=True) for n in special]
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=400, special_tokens=added, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("</s> $A", "</s> $A </s> $B", [("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def t5_tokenizer() -> Any:
    """Unigram as T5 has it: `</s>` ends every text, an answer starts from `<pad>`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({"▁" + word for sentence in SENTENCES for word in sentence.split()})
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -4.0 - index / 16) for index, word in enumerate(words)]
    pieces += [(word[:length], -6.0 - length / 8) for word in words for length in (2, 3) if length < len(word)]
    pieces += [(letter, -9.0 - index / 64) for index, letter in enumerate(letters)]
    pieces = list(dict(reversed(pieces)).items())[::-1]  # a piece has its first score
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens=[f"<extra_id_{index}>" for index in range(3)], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def bert_tokenizer() -> Any:
    """WordPiece as the Q-Former of InstructBLIP has it, with the token `[DEC]` that BERT lacks."""
    from transformers import BertTokenizer

    words = sorted({word.strip("?.,:").lower() for sentence in SENTENCES for word in sentence.split()})
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters), *words]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return BertTokenizer(vocab=vocabulary, bos_token="[DEC]", truncation_side="right")


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


def make_blip2(folder: Path, tiny: TinyBlip2, seed: int = 0) -> Path:
    """Writes the checkpoint of BLIP-2 or InstructBLIP into `folder` and returns it."""
    import torch
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipProcessor,
        LlamaConfig,
        OPTConfig,
        T5Config,
    )
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    instruct = isinstance(tiny, TinyInstructBlip)
    tokenizer = {"opt": opt_tokenizer, "t5": t5_tokenizer, "llama": lambda: tiny_tokenizer(image=False)}[tiny.language]()
    image_token, vocabulary = len(tokenizer), len(tokenizer) + 3
    own_tokenizer = bert_tokenizer() if instruct else None

    vision = {
        "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": tiny.side, "patch_size": tiny.patch, **tiny.vision,
    }  # fmt: skip
    qformer = {
        "vocab_size": len(own_tokenizer) + 2 if own_tokenizer else 300, "hidden_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "intermediate_size": 44, "max_position_embeddings": 64,
        "cross_attention_frequency": tiny.frequency, **tiny.qformer,
    }  # fmt: skip
    if tiny.language == "opt":
        text: Any = OPTConfig(**{
            "vocab_size": vocabulary, "hidden_size": 56, "ffn_dim": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 128, "tie_word_embeddings": tiny.tied, **tiny.text,
        })  # fmt: skip
    elif tiny.language == "t5":
        text = T5Config(**{
            "vocab_size": vocabulary, "d_model": 56, "d_kv": 12, "d_ff": 60, "num_layers": 2, "num_heads": 4,
            "relative_attention_num_buckets": 8, "relative_attention_max_distance": 8, "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": tiny.tied, **tiny.text,
        })  # fmt: skip
    else:
        text = LlamaConfig(**{
            "vocab_size": vocabulary, "hidden_size": 56, "intermediate_size": 72, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": tiny.tied,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **tiny.text,
        })  # fmt: skip
    if tiny.published and tiny.language == "opt":  # Salesforce's end an answer at the end of its line
        text.eos_token_id = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    config = (InstructBlipConfig if instruct else Blip2Config)(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=tiny.queries,
        image_token_index=image_token,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = (InstructBlipForConditionalGeneration if instruct else Blip2ForConditionalGeneration)(config).eval()
    if tiny.language == "t5" and not tiny.tied:  # Transformers ties the head of a new T5 whatever its configuration says
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight) / 8)
        model.all_tied_weights_keys.pop("language_model.lm_head.weight")
    disturb(model)
    with torch.no_grad():
        model.query_tokens.copy_(torch.randn_like(model.query_tokens))
    _save(model, folder, tiny.dtype, tiny.max_shard)

    images = BlipImageProcessorPil(size={"height": tiny.side, "width": tiny.side})
    if tiny.published:
        tokenizer.save_pretrained(folder)
        images.save_pretrained(folder)
        if own_tokenizer:
            own_tokenizer.save_pretrained(folder / "qformer_tokenizer")
        _as_published(folder, model, "InstructBlipProcessor" if instruct else "Blip2Processor")
    elif own_tokenizer:
        InstructBlipProcessor(images, tokenizer, own_tokenizer, num_query_tokens=tiny.queries).save_pretrained(folder)
    else:
        Blip2Processor(images, tokenizer, num_query_tokens=tiny.queries).save_pretrained(folder)
    return folder


def make_flamingo(folder: Path, tiny: TinyFlamingo, seed: int = 0) -> Path:
    """Writes the checkpoint into `folder` and returns it."""
    import torch
    from transformers import IdeficsConfig, IdeficsForVisionText2Text, IdeficsProcessor
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    tokenizer = tiny_tokenizer(image=False)
    words = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": list(tiny.special)})
    config = IdeficsConfig(
        vocab_size=words if tiny.additional else len(tokenizer) + 3, additional_vocab_size=tiny.additional,
        hidden_size=tiny.hidden, intermediate_size=72, num_hidden_layers=tiny.layers, num_attention_heads=tiny.heads,
        hidden_act=tiny.act, alpha_type=tiny.alpha, cross_layer_interval=tiny.interval, qk_layer_norms=tiny.norms,
        tie_word_embeddings=tiny.tied, use_resampler=tiny.resampler, max_position_embeddings=256,
        vision_config={
            "embed_dim": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": tiny.side, "patch_size": tiny.patch, **tiny.vision},
        perceiver_config={
            "use_resampler": tiny.resampler, "resampler_n_latents": tiny.latents, "resampler_depth": tiny.depth,
            "resampler_n_heads": tiny.resampler_heads, "resampler_head_dim": tiny.resampler_head_dim,
            "qk_layer_norms_perceiver": tiny.resampler_norms},
    )  # fmt: skip
    torch.manual_seed(seed)
    model = IdeficsForVisionText2Text(config).eval()
    disturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "alpha_" in name:  # closed when new
                parameter.copy_((0.4 + torch.rand_like(parameter)) * torch.randn_like(parameter).sign())
    _save(model, folder, tiny.dtype, tiny.max_shard)
    IdeficsProcessor(IdeficsImageProcessorPil(image_size=tiny.side), tokenizer).save_pretrained(folder)
    if tiny.published:
        _as_published(folder, model, "IdeficsProcessor")
    return folder


def disturb(model: Any) -> None:
    """Biases and norms are constants when they are new, and the weights are too small for the picture to matter."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.ndim > 1 and parameter.numel() > max(parameter.shape)
            parameter.add_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if wide else 0.1))


def _save(model: Any, folder: Path, dtype: str, max_shard: str | None) -> None:
    """Half precision leaves the modules in float32 that Transformers loads so, as saving a loaded model does."""
    import torch

    kept = model._keep_in_fp32_modules if dtype == "float16" else ()
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(folder, **({"max_shard_size": max_shard} if max_shard else {}))
    _change(folder / "config.json", dtype=dtype)  # Transformers writes that of the first parameter


def _as_published(folder: Path, model: Any, processor: str) -> None:
    """Gives the files of `folder` the form of those on the Hub that Transformers 4 has written.

    The weights have copies of tied tensors and buffers that were tensors then. config.json lacks `image_token_index`, the
    processor `num_query_tokens`, the tokenizer `<image>` (IDEFICS has it), and each has the names of then.
    """
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    old = {n: b for n, b in model.named_buffers() if n.endswith(("position_ids", "rotary_emb.inv_freq"))}
    for name, value in {**model.state_dict(), **old}.items():
        weights.setdefault(name, value.clone())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {})):
        if "scale_decoder_outputs" in part:  # T5's, which says it by whether the head is tied
            part["tie_word_embeddings"] = part.pop("scale_decoder_outputs")
        if "rope_parameters" in part:
            part["rope_theta"] = part.pop("rope_parameters")["rope_theta"]
    config |= {"torch_dtype": config.pop("dtype"), "transformers_version": "4.31.0"}
    config.pop("image_token_index", None)
    path.write_text(json.dumps(config, indent=2) + "\n")

    whole = folder / "processor_config.json"
    images = json.loads(whole.read_text())["image_processor"] if whole.exists() else {}
    whole.unlink(missing_ok=True)
    images = {**images, "processor_class": processor}
    _change(folder / "preprocessor_config.json", **images)
    tokens = _change(folder / "tokenizer_config.json", drop=["backend"], processor_class=processor)
    if "extra_special_tokens" in tokens:
        more = tokens["extra_special_tokens"]
        _change(folder / "tokenizer_config.json", drop=["extra_special_tokens"], additional_special_tokens=more)


def _change(path: Path, drop: Sequence[str] = (), **values: Any) -> dict[str, Any]:
    """Changes the entries of a JSON file, which need not exist, and returns all of them."""
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries = {key: value for key, value in {**entries, **values}.items() if key not in drop}
    path.write_text(json.dumps(entries, indent=2) + "\n")
    return entries


def load_tiny(folder: Path) -> tuple[Any, Any]:
    """Model and processor of Transformers, with what it asks to be added to the published checkpoints of BLIP-2."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(folder)
    if getattr(processor, "num_query_tokens", 0) is None:
        processor.num_query_tokens = model.config.num_query_tokens
    if getattr(model.config, "image_token_index", 0) is None:
        model.config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    return model, processor


INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_internvl(folder: Path, tiny: TinyInternVL, seed: int = 0) -> Path:
    """Writes the checkpoint into `folder` and returns it; InternVLProcessor, which needs torchvision, writes none of it."""
    import torch
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        LlamaConfig,
        Qwen2Config,
        Qwen3Config,
    )
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    named = {"context_image_token": special[5], "start_image_token": special[3], "end_image_token": special[4]}
    tokenizer = tiny_bytes_tokenizer(
        special, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named | {"video_token": "<video>"}
    )
    image_token, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<IMG_CONTEXT>", "<|im_end|>"))
    vision = InternVLVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=[tiny.side] * 2,
        patch_size=[tiny.patch] * 2, **tiny.vision,
    )  # fmt: skip
    kind = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[tiny.decoder]
    text = kind(
        vocab_size=len(tokenizer) + 3, hidden_size=56, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=tiny.kv_heads, max_position_embeddings=2048, tie_word_embeddings=tiny.tied, eos_token_id=end,
        bos_token_id=None, pad_token_id=0, **(({} if tiny.decoder == "qwen2" else {"head_dim": 16}) | tiny.text),
    )  # fmt: skip
    places = (tiny.side // tiny.patch) ** 2 // 4
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=image_token, image_seq_length=places,
        vision_feature_layer=tiny.layer, tie_word_embeddings=tiny.tied,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.1))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, 0
    model.to(getattr(torch, tiny.dtype)).save_pretrained(
        folder, save_original_format=tiny.legacy, **({"max_shard_size": tiny.max_shard} if tiny.max_shard else {})
    )
    tokenizer.save_pretrained(folder)
    GotOcr2ImageProcessorPil(
        size={"height": tiny.side, "width": tiny.side}, min_patches=1, max_patches=tiny.most, crop_to_patches=False
    ).save_pretrained(folder)
    about = {"processor_class": "InternVLProcessor", "image_seq_length": places}
    (folder / "processor_config.json").write_text(json.dumps(about), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(INTERNVL_TEMPLATE, encoding="utf-8")
    return folder
