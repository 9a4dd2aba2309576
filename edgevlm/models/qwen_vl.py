"""Qwen-VL, the first generation (Bai et al. 2023, arXiv 2308.12966): Qwen/Qwen-VL and Qwen/Qwen-VL-Chat.

A ViT, a resampler that makes 256 places of a picture whatever its size, and Qwen's decoder. transformers has no such model,
and the code that comes with the checkpoints is never run: the modules are in `qwen_vl_modules`, the tokenizer is made
from `qwen.tiktoken`. `QWenLMHeadModel` is also the name of the text-only Qwen, which has no `visual` in its configuration.

In a prompt a picture is `<img>`, its places, `</img>`. Answers may hold boxes: `<ref>the cat</ref><box>(x1,y1),(x2,y2)</box>`,
in thousandths of the picture's width and height.

Parts: `vision_encoder`, `resampler`, `embed_tokens`, `decoder`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle import ImageTokens, KVCache, Manifest
from ..errors import CheckpointError, UnsupportedModelError, WeightsError

if TYPE_CHECKING:
    from ..prompt import Prompt, PromptBuilder, Request, Tokenizer
    from . import PartSpec, Rows, RunPart

ARCHITECTURES = ("QWenLMHeadModel",)
ALIASES = {"qwen-vl": "Qwen/Qwen-VL-Chat"}

PARTS = ("vision_encoder", "resampler", "embed_tokens", "decoder")
PICTURES = (0, None)

#: tokenization_qwen.py, PAT_STR: how text is cut into words.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: tokenization_qwen.py: what follows the ranks, in this order.
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
PICTURE = ("<img>", "</img>", "<imgpad>")
ADDED = (END_OF_TEXT, START, END, *(f"<|extra_{n}|>" for n in range(205)), *MARKS, *PICTURE)

#: visual.py: the picture as a square, then the numbers that CLIP uses.
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

#: What `make_context` (qwen_generation_utils.py) and `from_list_format` (tokenization_qwen.py) write.
CHAT_TEMPLATE = (
    "{% set seen = namespace(pictures=0) %}"
    "{% if messages[0]['role'] != 'system' %}"
    f"{START}{{{{ 'system\\nYou are a helpful assistant.' }}}}{END}{{{{ '\\n' }}}}"
    "{% endif %}"
    "{% for message in messages %}"
    f"{START}{{{{ message['role'] + '\\n' }}}}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set seen.pictures = seen.pictures + 1 %}"
    "{{ 'Picture ' + seen.pictures|string + ': ' }}<img><imgpad></img>{{ '\\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    f"{END}{{% if not loop.last or add_generation_prompt %}}{{{{ '\\n' }}}}{{% endif %}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{START}{{{{ 'assistant\\n' }}}}{{% endif %}}"
)


# ----------------------------------------------------------------------------------------- the workshop


def check_config(config: Mapping[str, Any]) -> None:
    if not isinstance(config.get("visual"), Mapping):
        raise UnsupportedModelError(
            "This Qwen has no eyes: config.json has no entry 'visual', as text-only Qwen (Qwen-7B, Qwen-7B-Chat) has none. "
            "Qwen/Qwen-VL and Qwen/Qwen-VL-Chat have one, and are supported."
        )


def read_config(config: Mapping[str, Any]) -> Any:
    """What `config.json` says. Raises CheckpointError where something is missing, UnsupportedModelError where sizes do not fit
    together as the published modules have them."""
    from dataclasses import MISSING, fields

    from .qwen_vl_modules import QwenVLConfig, VisualConfig

    check_config(config)

    def read(kind: type[Any], entries: Mapping[str, Any], where: str, **made: Any) -> Any:
        known = {field.name: field for field in fields(kind) if not field.name.startswith("_") and field.name not in made}
        absent = [name for name, field in known.items() if field.default is MISSING and entries.get(name) is None]
        if absent:
            raise CheckpointError(f"config.json lacks what Qwen-VL needs: {', '.join(where + name for name in absent)}.")
        types = {"int": int, "float": float, "bool": bool}
        values = {n: types[str(f.type)](entries[n]) for n, f in known.items() if entries.get(n) is not None}
        return kind(**made, **values)

    try:
        sizes = read(QwenVLConfig, config, "", visual=read(VisualConfig, config["visual"], "visual."))
    except (TypeError, ValueError) as exc:
        raise CheckpointError(f"config.json has an entry that is no number: {exc}.") from exc
    _check_sizes(config, sizes)
    return sizes


def _check_sizes(config: Mapping[str, Any], sizes: Any) -> None:
    visual = sizes.visual
    numbers = [
        value for one in (sizes, visual) for name, value in vars(one).items() if type(value) is int and name != "image_start_id"
    ]
    if min(numbers) < 1 or visual.grid < 1:
        raise UnsupportedModelError("config.json has a size below 1, or a picture smaller than one patch.")
    turned = sizes.head_dim if sizes.rotary_pct == 1.0 else int(sizes.head_dim * sizes.rotary_pct)
    refused = {
        f"hidden_size {sizes.hidden_size} in {sizes.num_attention_heads} heads": sizes.hidden_size % sizes.num_attention_heads,
        f"kv_channels {config.get('kv_channels')}": config.get("kv_channels", sizes.head_dim) != sizes.head_dim,
        f"rotary_pct {sizes.rotary_pct} of {sizes.head_dim} channels": not 2 <= turned + turned % 2 <= sizes.head_dim,
        f"visual.width {visual.width} in {visual.heads} heads": visual.width % visual.heads,
        f"visual.output_dim {visual.output_dim} beside hidden_size {sizes.hidden_size}": visual.output_dim != sizes.hidden_size,
        f"visual.output_dim {visual.output_dim}, which is not divided by 4 and by its heads of 128": visual.output_dim < 128
        or visual.output_dim % 4
        or visual.output_dim % (visual.output_dim // 128),
    }
    if found := [what for what, is_so in refused.items() if is_so]:
        raise UnsupportedModelError(
            f"Qwen-VL with {' and '.join(found)} is not supported. The heads divide the widths, kv_channels is the width of a "
            "decoder's head, and visual.output_dim is the decoder's width, 128 or more."
        )


def build_model(folder: Path) -> Any:
    """The torch model that `config.json` in `folder` describes, with random weights."""
    return model_from_config(_read(folder / "config.json"))


def model_from_config(config: Mapping[str, Any]) -> Any:
    """The same from the parsed `config.json`."""
    from .qwen_vl_modules import QwenVL

    return QwenVL(read_config(config))


def weight_name(name: str) -> str:
    return name


def split_weight(config: Mapping[str, Any], name: str, shape: Sequence[int]) -> Mapping[str, Rows | None]:
    from . import Rows

    stem, _, kind = name.rpartition(".in_proj_")
    if not stem.endswith("attn_pool.attn"):
        return {name: None}
    rows = shape[0] // 3
    return {f"{stem}.{which}.{kind}": Rows(n * rows, rows, 3 * rows) for n, which in enumerate(("query", "key", "value"))}


def part_specs(model: Any, dtype: str) -> list[PartSpec]:
    from . import PartSpec, decoder_spec, embedding_spec
    from .decoder import Embedding
    from .qwen_vl_modules import Decoder, Resampler, VisionEncoder

    config, visual = model.config, model.transformer.visual
    sizes = config.visual
    pixels = (("batch_size", 3, sizes.image_size, sizes.image_size), dtype)
    features = (("batch_size", sizes.grid**2, sizes.width), dtype)
    hidden = config.hidden_size
    return [
        PartSpec("vision_encoder", VisionEncoder(visual), {"pixel_values": pixels}, {"vision_features": features}),
        PartSpec(
            "resampler",
            Resampler(visual),
            {"vision_features": features},
            {"image_features": (("batch_size", sizes.places, hidden), dtype)},
        ),
        embedding_spec(Embedding(model.transformer.wte), hidden, dtype),
        decoder_spec(Decoder(model), kv_cache(config, dtype), None, hidden, config.vocab_size, dtype),
    ]


def kv_cache(config: Any, dtype: str) -> KVCache:
    return KVCache(config.num_hidden_layers, config.num_attention_heads, config.head_dim, dtype)


def describe(folder: Path, config: Any, dtype: str) -> Manifest:
    image = config.visual.image_start_id + 2
    token = _added_tokens(folder).get(image)
    if image >= config.vocab_size:
        raise UnsupportedModelError(f"config.json says that {PICTURE[2]} is number {image}, of {config.vocab_size} tokens.")
    if token != PICTURE[2]:
        raise UnsupportedModelError(
            f"config.json says that {PICTURE[0]} is number {image - 2}, so that {PICTURE[2]} is {image}; the tokenizer in "
            f"{folder} has {token!r} there. Fetch the tokenizer that belongs to this checkpoint."
        )
    return Manifest(
        family="qwen_vl",
        dtype=dtype,
        kv_cache=kv_cache(config, dtype),
        context_length=config.context_length,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        image=ImageTokens(token, image, config.visual.places),
    )


def _added_tokens(folder: Path) -> dict[int, str]:
    from . import tiktoken

    if (folder / "qwen.tiktoken").is_file():
        return dict(enumerate(ADDED, len(tiktoken.read_ranks(folder / "qwen.tiktoken"))))
    return {entry["id"]: entry["content"] for entry in _read(folder / "tokenizer.json").get("added_tokens", [])}


def bundle_files(folder: Path) -> Mapping[str, str]:
    """What the published code has inside: tokenizer, preprocessing, prompt format, and where an answer ends."""
    tokenizer, settings, generation = (
        _read(folder / f"{n}.json") for n in ("tokenizer", "tokenizer_config", "generation_config")
    )
    kind = generation.get("chat_format", "raw")
    if kind not in ("chatml", "raw"):
        raise UnsupportedModelError(f"generation_config.json has the chat_format {kind!r}; supported are 'chatml' and 'raw'.")
    side = _read(folder / "config.json")["visual"].get("image_size")
    files = {"tokenizer.json": build_tokenizer(folder)} if (folder / "qwen.tiktoken").is_file() else {}
    if not files and not tokenizer:
        raise CheckpointError(f"{folder} has no tokenizer: neither qwen.tiktoken, as Qwen-VL is published, nor tokenizer.json.")
    # What `generate` was told to end at, and get_stop_words_ids of qwen_generation_utils.py.
    ends = {END_OF_TEXT} if kind == "raw" else {END_OF_TEXT, START, END}
    told = generation.get("eos_token_id")
    stop = [*(told if isinstance(told, list) else [told]), *(n for n, token in _added_tokens(folder).items() if token in ends)]
    own = {name: value for name, value in settings.items() if name not in ("auto_map", "tokenizer_class")}
    named = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "image_token": PICTURE[2]}
    made = {
        "generation_config.json": {**generation, "eos_token_id": [n for n in dict.fromkeys(stop) if n is not None]},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **named, **own},
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
            "size": {"height": side, "width": side}, "do_center_crop": False, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD,
        },
    }  # fmt: skip
    if kind == "chatml" and "chat_template" not in own and not (folder / "chat_template.jinja").is_file():
        files["chat_template.jinja"] = CHAT_TEMPLATE
    return files | {name: json.dumps(content, indent=2) + "\n" for name, content in made.items()}


def build_tokenizer(folder: Path) -> str:
    """The `tokenizer.json` that `qwen.tiktoken` stands for.

    The marks of boxes are no special tokens in it: an answer's text keeps them, as `chat` of the published code does, and
    a prompt may have them.
    """
    from tokenizers import AddedToken

    from . import tiktoken

    added = [AddedToken(token, special=token not in MARKS, normalized=False) for token in ADDED]
    return str(tiktoken.tokenizer_from_ranks(tiktoken.read_ranks(folder / "qwen.tiktoken"), PATTERN, added).to_str())


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} is not JSON: {exc}. Fetch the checkpoint again.") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no object. Fetch the checkpoint again.")
    return content


# -------------------------------------------------------------------------------------------- the robot


def build_prompt(builder: PromptBuilder, manifest: Manifest, request: Request) -> Prompt:
    """With a chat template as the template has it. Without one, which is the base model, a string is used as it stands, each
    `<img>…</img>` in it a picture, and pictures without a place go before it."""
    if builder.template is None:
        text, ids = builder.encode(replace(request, prompt=_written(request)), raw=True)
    else:
        text, ids = builder.encode(request)
        if builder.template.source == CHAT_TEMPLATE:
            ids = _encode_roles_apart(builder.tokenizer, ids)
    return builder.expand(text, ids, request.images)


def _written(request: Request) -> str | None:
    from ..prompt import TextPart

    place = f"{PICTURE[0]}{PICTURE[2]}{PICTURE[1]}"
    if request.prompt is not None and PICTURE[0] in request.prompt:
        return re.sub(r"<img>.*?</img>", place, request.prompt, flags=re.DOTALL)
    if request.prompt is None and not request.listed:
        return None  # a chat, which cannot be written down
    text, pictures = "", 0
    for part in request.messages[0].content:
        pictures += not isinstance(part, TextPart)
        text += part.text if isinstance(part, TextPart) else f"Picture {pictures}: {place}\n"
    return text


def _encode_roles_apart(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """`make_context` encodes a role, the end of its line, and what was said one by one; where that begins with ends of lines,
    a tokenizer of the whole makes one word of them all."""
    backend, out, place = tokenizer.backend, [], 0
    added = backend.get_added_tokens_decoder()
    while place < len(ids):
        out.append(ids[place])
        place += 1
        if out[-1] != backend.token_to_id(START):
            continue
        stop = next((i for i in range(place, len(ids)) if ids[i] in added), len(ids))
        role, line, said = tokenizer.decode(ids[place:stop]).partition("\n")
        words = backend.pre_tokenizer.pre_tokenize_str(line + said)
        if line and (length := words[0][1][1]) > 1:
            head = role + line + said[: length - 1]
            place = next(i for i in range(place, stop + 1) if tokenizer.decode(ids[place:i]) == head)
            out += [i for piece in (role, line, said[: length - 1]) for i in tokenizer.encode(piece)]
    return out


def encode_image(run: RunPart, manifest: Manifest, pixel_values: np.ndarray) -> np.ndarray:
    features = run("resampler", run("vision_encoder", {"pixel_values": pixel_values}))["image_features"]
    return features.reshape(-1, features.shape[-1])


# ---------------------------------------------------------------------------------------- the reference


def load_reference(folder: Path) -> Any:
    """The model in float32, from safetensors. Raises WeightsError where a weight is missing or misshapen."""
    import torch
    from safetensors import safe_open

    model = build_model(folder).eval()
    model.tie_weights()
    missing = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in model.all_tied_weights_keys:
        missing.pop(name)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys() & missing.keys():
                tensor, shape = file.get_tensor(name).to(torch.float32), missing.pop(name)
                if tensor.shape != shape:
                    raise WeightsError(
                        f"The weight {name!r} has the shape {list(tensor.shape)}; config.json asks for {list(shape)}."
                    )
                model.load_state_dict({name: tensor}, strict=False)
    if missing:
        raise WeightsError(f"{folder} lacks {len(missing)} weights, {next(iter(missing))!r} among them. Convert it again.")
    return model


def load_processor(folder: Path) -> Any:
    """The published tokenizer class does both; its pictures go through torchvision, which resizes with Pillow."""
    from tokenizers import Tokenizer as Backend

    config = _read(folder / "config.json")
    text = build_tokenizer(folder) if (folder / "qwen.tiktoken").is_file() else (folder / "tokenizer.json").read_text("utf-8")
    return SimpleNamespace(
        tokenizer=Backend.from_str(text),
        image_processor=SimpleNamespace(image_std=IMAGE_STD, size=config["visual"]["image_size"]),
        places=read_config(config).visual.places,
    )


def process(processor: Any, request: Request, text: str) -> Mapping[str, np.ndarray]:
    from PIL import Image

    written = text.replace(PICTURE[2], PICTURE[2] * processor.places)
    made = {"input_ids": np.array(processor.tokenizer.encode(written).ids)}
    if not request.images:
        return made
    side = (processor.image_processor.size,) * 2
    pictures: list[Any] = list(request.images)
    pixels: Any = np.stack([np.asarray(p.convert("RGB").resize(side, Image.Resampling.BICUBIC), np.float32) for p in pictures])
    pixels = (pixels / 255 - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    return made | {"pixel_values": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))}


def reference_inputs(model: Any, prompt: Prompt, pixel_values: np.ndarray) -> Mapping[str, Any]:
    import torch

    pixels = {"pixel_values": torch.from_numpy(pixel_values)} if len(pixel_values) else {}
    return {"input_ids": torch.tensor([prompt.ids]), **pixels}
