"""InternVL in the layout of its own code: the same bundle as from transformers' layout, and what the published code does."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import picture
from PIL import Image
from tinies import Tiny
from tiny_internvl_chat import INTERNVL_CHATS

pytest.importorskip("torch")
import torch
import torch.nn.functional as F

from edgevlm.bundle import Bundle
from edgevlm.errors import CheckpointError, UnsupportedModelError, WeightsError
from edgevlm.export.export import export_bundle
from edgevlm.images import ImageProcessor
from edgevlm.models import family_for_config, internvl, internvl_chat
from edgevlm.prompt import ChatTemplate, ImagePart, Message, TextPart
from edgevlm.verify import TOKENS, verify_bundle
from edgevlm.vlm import VLM

pytestmark = pytest.mark.usefixtures("one_thread", "traced_once")

QWEN2, HALF, RMS, INTERNLM2 = (tiny.name for tiny in INTERNVL_CHATS)
SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"


def edited(folder: Path, checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the checkpoint with another config.json."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def weights_of(checkpoint: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor.float() for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}


# ------------------------------------------------------------------------------------------- the bundle


@pytest.mark.parametrize("name", [QWEN2, INTERNLM2, *(pytest.param(name, marks=pytest.mark.slow) for name in (HALF, RMS))])
def test_the_bundle_is_that_of_transformers_layout(tiny: Callable[[str], Tiny], name: str, tmp_path: Path) -> None:
    one = tiny(name)
    twin = export_bundle(str(one.tiny.make_twin(tmp_path / "twin")), tmp_path / "same")  # type: ignore[union-attr]
    graphs = [{p.name: p.read_bytes() for p in (folder / "onnx").iterdir()} for folder in (one.bundle, twin.folder)]
    assert graphs[0].keys() == graphs[1].keys()
    assert [file for file in graphs[0] if graphs[0][file] != graphs[1][file]] == []
    ours = Bundle.open(one.bundle).manifest
    assert (ours.family, ours.parts, ours.kv_cache) == ("internvl", twin.manifest.parts, twin.manifest.kv_cache)
    assert (ours.context_length, ours.image.places) == (twin.manifest.context_length, twin.manifest.image.places)
    assert ours.provenance["architecture"] == "InternVLChatModel"

    report = verify_bundle(Path(shutil.copytree(one.bundle, tmp_path / "bundle")), str(one.checkpoint))
    assert (report.failures, report.notes) == ([], [])
    assert {"wide picture", "two pictures", "no picture", "interleaved"} <= {case.case for case in report.sequences}
    assert all((case.same_tokens, case.max_abs < 1e-3) == (TOKENS, True) for case in report.sequences)
    assert all(part.max_abs < 1e-4 for part in report.parts)


@pytest.mark.parametrize(("dtype", "recipe"), [("fp16", None), pytest.param("fp32", "int4-rtn", marks=pytest.mark.slow)])
def test_half_precision_and_quantized_are_the_same_too(
    tiny: Callable[[str], Tiny], dtype: str, recipe: str | None, tmp_path: Path
) -> None:
    one = tiny(QWEN2)
    twin = one.tiny.make_twin(tmp_path / "twin")  # type: ignore[union-attr]
    same = export_bundle(str(twin), tmp_path / "same", dtype=dtype, recipe=recipe).folder
    for file in sorted((same / "onnx").iterdir()):
        assert file.read_bytes() == (one.export(dtype, recipe) / "onnx" / file.name).read_bytes(), file.name


def test_it_answers_and_stops_where_the_published_code_does(tiny: Callable[[str], Tiny]) -> None:
    bundle = tiny(QWEN2).bundle
    vlm = VLM.load(bundle)
    reply = vlm.generate(["Before:", picture(1, 90, 40), "after:", picture(2), "¿Qué cambió?"], max_new_tokens=4)
    assert len(reply.tokens) <= 4
    (end,) = internvl_chat.token_numbers(bundle, "<|im_end|>")
    assert json.loads((bundle / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == end
    assert vlm._stop == {end}


# ------------------------------------------------------------- the published code, written down once more


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def published_features(w: Mapping[str, Any], config: Mapping[str, Any], pixels: Any) -> Any:
    """modeling_intern_vit.py and `extract_feature` of modeling_internvl_chat.py."""
    vision = config["vision_config"]
    heads, eps, width = vision["num_attention_heads"], vision["layer_norm_eps"], vision["hidden_size"]

    def norm(x: Any, name: str) -> Any:
        if vision["norm_type"] == "rms_norm":
            return rms_norm(x, w[f"{name}.weight"], eps)
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    at = "vision_model.embeddings."
    patches = F.conv2d(pixels, w[f"{at}patch_embedding.weight"], w[f"{at}patch_embedding.bias"], stride=vision["patch_size"])
    x = torch.cat([w[f"{at}class_embedding"].expand(len(pixels), 1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + w[f"{at}position_embedding"]
    states = [x]
    for layer in range(vision["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{layer}."
        rows, count, _ = x.shape
        qkv = linear(norm(x, f"{at}norm1"), f"{at}attn.qkv").reshape(rows, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        if vision["qk_normalization"]:
            query, key = (
                rms_norm(part.transpose(1, 2).flatten(-2), w[f"{at}attn.{which}_norm.weight"], eps)
                .view(rows, count, heads, -1).transpose(1, 2)
                for part, which in ((query, "q"), (key, "k"))
            )  # fmt: skip
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        read = (scores.softmax(-1) @ value).transpose(1, 2).reshape(rows, count, -1)
        x = x + linear(read, f"{at}attn.proj") * w[f"{at}ls1"]
        x = x + linear(F.gelu(linear(norm(x, f"{at}norm2"), f"{at}mlp.fc1")), f"{at}mlp.fc2") * w[f"{at}ls2"]
        states.append(x)
    x = states[config["select_layer"]][:, 1:]
    tiles, side = len(x), int(x.shape[1] ** 0.5)
    x = x.view(tiles, side, side // 2, 2 * width).permute(0, 2, 1, 3).contiguous()
    x = x.view(tiles, side // 2, side // 2, 4 * width).permute(0, 2, 1, 3).reshape(tiles, -1, 4 * width)
    x = F.layer_norm(x, (4 * width,), w["mlp1.0.weight"], w["mlp1.0.bias"])
    return linear(F.gelu(linear(x, "mlp1.1")), "mlp1.3")


def published_logits(w: Mapping[str, Any], language: Mapping[str, Any], ids: Any) -> Any:
    """modeling_internlm2.py, within the context length, where dynamic scaling of the rotary angles does nothing."""
    heads, groups, eps = language["num_attention_heads"], language["num_key_value_heads"], language["rms_norm_eps"]
    depth, at = language["hidden_size"] // heads, "language_model.model."

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def turned(x: Any) -> Any:
        angles = torch.arange(x.shape[2])[:, None] * language["rope_theta"] ** (-torch.arange(0, depth, 2) / depth)
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        return x * cos + torch.cat([-x[..., depth // 2 :], x[..., : depth // 2]], -1) * sin

    x = F.embedding(ids, w[f"{at}tok_embeddings.weight"])
    rows, count, _ = x.shape
    for layer in range(language["num_hidden_layers"]):
        name = f"{at}layers.{layer}."
        qkv = linear(rms_norm(x, w[f"{name}attention_norm.weight"], eps), f"{name}attention.wqkv")
        qkv = qkv.view(rows, count, groups, heads // groups + 2, depth)
        query = turned(qkv[..., :-2, :].reshape(rows, count, heads, depth).transpose(1, 2))
        key, value = (qkv[..., which, :].transpose(1, 2).repeat_interleave(heads // groups, 1) for which in (-2, -1))
        mask = torch.full((count, count), -torch.inf).triu(1)
        read = (query @ turned(key).transpose(-1, -2) * depth**-0.5 + mask).softmax(-1) @ value
        x = x + linear(read.transpose(1, 2).reshape(rows, count, -1), f"{name}attention.wo")
        h = rms_norm(x, w[f"{name}ffn_norm.weight"], eps)
        gated = F.silu(linear(h, f"{name}feed_forward.w1")) * linear(h, f"{name}feed_forward.w3")
        x = x + linear(gated, f"{name}feed_forward.w2")
    return linear(rms_norm(x, w[f"{at}norm.weight"], eps), "language_model.output")


@pytest.mark.parametrize("name", [QWEN2, HALF, RMS, INTERNLM2])
@pytest.mark.parametrize("change", [{}, {"select_layer": -1}, {"select_layer": 1}, {"layer_norm_eps": 1e-2}])
def test_the_reference_sees_what_the_published_code_sees(
    tiny: Callable[[str], Tiny], name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    def alter(config: dict[str, Any]) -> None:
        config["vision_config"].update({k: v for k, v in change.items() if k in config["vision_config"]})
        config.update({k: v for k, v in change.items() if k in config})

    checkpoint = edited(tmp_path / "checkpoint", tiny(name).checkpoint, alter)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    side = config["vision_config"]["image_size"]
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = published_features(weights_of(checkpoint), config, pixels)
        ours = internvl.load_reference(checkpoint).eval().get_image_features(pixels).pooler_output
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_internlm2_is_llama(tiny: Callable[[str], Tiny]) -> None:
    checkpoint = tiny(INTERNLM2).checkpoint
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    assert config["llm_config"]["num_key_value_heads"] < config["llm_config"]["num_attention_heads"]
    ids = torch.tensor([[5, 9, 200, 17, 3, 88, 88, 1, 250, 31], [7, 7, 7, 100, 101, 102, 0, 1, 2, 3]])
    with torch.no_grad():
        theirs = published_logits(weights_of(checkpoint), config["llm_config"], ids)
        ours = internvl.load_reference(checkpoint).eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_towers_epsilon_reaches_the_bundle(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    checkpoint = edited(tmp_path / "checkpoint", tiny(RMS).checkpoint, lambda c: c["vision_config"].update(layer_norm_eps=0.01))
    bundle = export_bundle(str(checkpoint), tmp_path / "bundle")
    pixels = np.random.default_rng(0).standard_normal((2, 3, 42, 42), np.float32)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    theirs = published_features(weights_of(checkpoint), config, torch.from_numpy(pixels)).numpy()
    ours = internvl.encode_image(VLM.load(bundle.folder)._run, bundle.manifest, pixels)
    np.testing.assert_allclose(ours, theirs.reshape(ours.shape), atol=1e-4)


# --------------------------------------------------------------------------------------------- pictures


def published_grid(fewest: int, most: int, width: int, height: int, side: int) -> tuple[int, int]:
    """`dynamic_preprocess` and `find_closest_aspect_ratio`: columns and rows."""
    ratios = {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if fewest <= i * j <= most}
    best, nearest = (1, 1), float("inf")
    for ratio in sorted(ratios, key=lambda r: r[0] * r[1]):
        distance = abs(width / height - ratio[0] / ratio[1])
        if distance < nearest:
            best, nearest = ratio, distance
        elif distance == nearest and width * height > 0.5 * side * side * ratio[0] * ratio[1]:
            best = ratio
    return best


def published_pixels(image: Image.Image, fewest: int, most: int, side: int) -> Any:
    columns, rows = published_grid(fewest, most, image.width, image.height, side)
    canvas = image.resize((side * columns, side * rows))
    boxes = [(c * side, r * side, (c + 1) * side, (r + 1) * side) for r in range(rows) for c in range(columns)]
    tiles = [canvas.crop(box) for box in boxes] + ([image.resize((side, side))] if len(boxes) > 1 else [])
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    return np.stack([((np.asarray(tile, np.float32) / 255 - mean) / std).transpose(2, 0, 1) for tile in tiles])


@pytest.mark.parametrize(("fewest", "most", "side"), [(1, 12, 28), (1, 6, 28), (3, 12, 42), (1, 1, 28), (1, 24, 448)])
def test_grids_are_the_published_ones(fewest: int, most: int, side: int) -> None:
    config = {"dynamic_image_size": True, "min_dynamic_patch": fewest, "max_dynamic_patch": most}
    ours = ImageProcessor.from_config(internvl_chat.image_processor({**config, "vision_config": {"image_size": side}}))
    known = range(1, most + 1)
    ratios = sorted({Fraction(i, j) for i in known for j in known if fewest <= i * j <= most})
    middles = [(a + b) / 2 for a, b in itertools.pairwise(ratios)]  # as near to one as to the other
    sizes = [(r.numerator * k, r.denominator * k) for r in ratios + middles for k in (1, 7, 30, 100, 448)]
    sizes += [(width, height) for width in range(2, 260, 11) for height in range(2, 260, 13)]
    for width, height in sizes:
        assert ours.tile_grid(height, width)[::-1] == published_grid(fewest, most, width, height, side), (width, height)


def test_pixels_are_the_published_ones(tiny: Callable[[str], Tiny]) -> None:
    rng = np.random.default_rng(0)
    for name in (QWEN2, HALF, RMS, INTERNLM2):
        config = json.loads((tiny(name).checkpoint / "config.json").read_text(encoding="utf-8"))
        written = json.loads((tiny(name).bundle / "preprocessor_config.json").read_text(encoding="utf-8"))
        ours = ImageProcessor.from_config({**written, **Bundle.open(tiny(name).bundle).manifest.image_options})
        most = config["max_dynamic_patch"] if config["dynamic_image_size"] else 1
        for height, width in [*rng.integers(2, 200, (20, 2)).tolist(), [28, 84], [3, 500], [99, 99]]:
            image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
            theirs = published_pixels(image, 1, most, config["vision_config"]["image_size"])
            np.testing.assert_allclose(ours.cut(image), theirs, atol=2e-6)


# ------------------------------------------------------------------------------------------------- text

PICTURE = "<IMG_CONTEXT>\n"


def conversation(config: dict[str, Any], *messages: Message) -> str:
    template = internvl_chat.chat_template({"template": "internvl2_5", **config})
    assert template is not None
    return ChatTemplate(template).render(messages)


def test_conversations_are_the_published_ones() -> None:
    def said(role: str, *content: str, plain: bool = False) -> Message:
        parts = tuple(ImagePart(None) if text == PICTURE else TextPart(text) for text in content)
        return Message(role, parts, plain)

    first = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    asked, begun = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert conversation({}, said("user", PICTURE, "How many?")) == f"{first}{asked}{PICTURE}How many?{begun}"
    assert conversation({}, said("user", "Hi.", plain=True)) == f"{first}{asked}Hi.{begun}"
    turns = said("user", PICTURE, PICTURE, "Two?"), said("assistant", "Yes."), said("user", "Why?", plain=True)
    history = f"{first}{asked}{PICTURE}{PICTURE}Two?{begun}Yes.<|im_end|>\n{asked}Why?{begun}"
    assert conversation({}, *turns) == history
    told = said("system", "Be brief."), said("user", "Hi.")
    assert conversation({}, *told) == f"<|im_start|>system\nBe brief.<|im_end|>\n{asked}Hi.{begun}"
    quoted = 'Say "yes" or \\n {{ 7 * 7 }} {% raw %} 好'
    assert conversation({"system_message": quoted}, said("user", "Hi.")).startswith(f"<|im_start|>system\n{quoted}<|im_end|>\n")
    assert conversation({"system_message": ""}, said("user", "Hi.")).startswith("<|im_start|>system\n<|im_end|>\n")
    older = conversation({"template": "Hermes-2"}, said("user", PICTURE, "Hi."))
    assert older.endswith(f"人工智能助手。<|im_end|>{asked}{PICTURE}Hi.<|im_end|><|im_start|>assistant\n")


def test_the_tokenizer_is_made_of_qwen2s_files(tiny: Callable[[str], Tiny]) -> None:
    from tokenizers import Tokenizer
    from transformers import Qwen2Tokenizer

    one = tiny(QWEN2)
    assert not (one.checkpoint / "tokenizer.json").exists()
    theirs, ours = Qwen2Tokenizer.from_pretrained(one.checkpoint), Tokenizer.from_file(str(one.bundle / "tokenizer.json"))
    texts = ["How many cubes? 123", "<img><IMG_CONTEXT></img>\n<|im_end|>", "¿Dónde está  la\n\nestrella? 书生·万象 🤖"]
    for text in [*texts, "<tool_call>"]:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
    image = Bundle.open(one.bundle).manifest.image
    wanted = theirs.convert_tokens_to_ids(["<IMG_CONTEXT>", "<img>", "</img>"])
    assert [image.token_id, *image.before, *image.after] == wanted


def test_a_tokenizer_that_is_there_is_taken(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny(INTERNLM2).checkpoint, tmp_path / "checkpoint"))
    shutil.copyfile(tiny(INTERNLM2).bundle / "tokenizer.json", checkpoint / "tokenizer.json")
    for file in ("vocab.json", "merges.txt", "added_tokens.json"):
        (checkpoint / file).unlink()
    bundle = export_bundle(str(checkpoint), tmp_path / "bundle")
    assert bundle.manifest.image == Bundle.open(tiny(INTERNLM2).bundle).manifest.image
    assert verify_bundle(bundle.folder, str(checkpoint)).failures == []


def test_without_a_named_conversation_the_tokenizers_is_used(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    checkpoint = edited(tmp_path / "checkpoint", tiny(QWEN2).checkpoint, lambda config: config.pop("template"))
    bundle = export_bundle(str(checkpoint), tmp_path / "bundle")
    assert not (bundle.folder / "chat_template.jinja").exists()
    prompts = [
        VLM.load(folder).generate("Hi.", images=[picture(1, 30, 30)] * pictures, max_new_tokens=1).timings.prompt_tokens
        for folder in (bundle.folder, tiny(QWEN2).bundle) for pictures in (0, 2)
    ]  # fmt: skip
    assert prompts[1] - prompts[0] == prompts[3] - prompts[2] == 2 * (bundle.manifest.image.places + 3)
    assert prompts[0] < prompts[2]  # its system message is shorter


# ------------------------------------------------------------------------------------- what is not covered


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["llm_config"].update(architectures=["Phi3ForCausalLM"]), "decoder 'Phi3ForCausalLM' is not supported"),
        (lambda c: c["llm_config"].update(architectures=["Qwen3MoeForCausalLM"]), "Qwen2ForCausalLM, Qwen3ForCausalLM, Llama"),
        (lambda c: c.update(ps_version="v1"), r"ps_version 'v1' \(supported: 'v2'\)"),
        (lambda c: c.pop("ps_version"), "ps_version 'v1'"),
        (lambda c: c.update(pad2square=True), "pad2square"),
        (lambda c: c.update(force_image_size=224), "force_image_size 224 and positions for image_size 28"),
        (lambda c: c.update(use_thumbnail=False), "use_thumbnail true"),
        (lambda c: c.update(use_llm_lora=16), "LoRA"),
        (
            lambda c: c["llm_config"].update(quantization_config={"quant_method": "awq"}),
            r"already quantized \(awq\), .* no weight",
        ),
        (lambda c: c.update(select_layer=-5), "select_layer = -5, and the vision tower has 3 layers: -4 to 3"),
        (lambda c: c.update(select_layer=[-1, -2]), "one layer is"),
        (lambda c: c.update(template="my_own"), "'my_own', which is code of the checkpoint; known here are internvl2_5, "),
        (lambda c: c["llm_config"].update(rope_scaling={"type": "longrope", "factor": 2.0}), "'longrope' is not supported"),
        (lambda c: c["llm_config"].update(rope_pos_id_version="v2pe"), "v2pe"),
        (lambda c: c["vision_config"].update(use_moe=True), "mixture of experts"),
    ],
)  # fmt: skip
def test_refused_by_its_configuration(
    tiny: Callable[[str], Tiny], change: Callable[[dict[str, Any]], object], said: str, tmp_path: Path
) -> None:
    checkpoint = edited(tmp_path / "checkpoint", tiny(QWEN2).checkpoint, change)
    with pytest.raises(UnsupportedModelError, match=said):
        export_bundle(str(checkpoint), tmp_path / "bundle")


def test_one_tile_needs_no_thumbnail(tiny: Callable[[str], Tiny]) -> None:
    config = json.loads((tiny(QWEN2).checkpoint / "config.json").read_text(encoding="utf-8"))
    for change in ({"dynamic_image_size": False}, {"max_dynamic_patch": 1}):
        assert family_for_config({**config, "use_thumbnail": False, **change})[0] == "internvl"


def test_what_a_configuration_leaves_out_is_the_published_default(tiny: Callable[[str], Tiny]) -> None:
    checkpoint = tiny(QWEN2).checkpoint
    llm = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 2}
    config = internvl_chat.read_config(checkpoint, {"llm_config": llm, "ps_version": "v2", "vision_config": {}})
    vision = config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size) == (
        3200, 48, 25, 12800,
    )  # fmt: skip
    assert (vision.use_qk_norm, vision.attention_bias, vision.norm_type, vision.image_size) == (
        True,
        False,
        "rms_norm",
        (224, 224),
    )
    assert (config.vision_feature_layer, config.downsample_ratio, config.image_seq_length) == (-1, 0.5, 64)
    assert (config.tie_word_embeddings, config.text_config.tie_word_embeddings) == (False, False)
    pictures = internvl_chat.image_processor({"vision_config": {}, "dynamic_image_size": True})
    assert (pictures["min_patches"], pictures["max_patches"], pictures["size"]["height"]) == (1, 6, 224)


def test_files_that_are_missing(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    def refused(kind: type[Exception]) -> str:
        with pytest.raises(kind) as caught:
            export_bundle(str(checkpoint), tmp_path / "bundle")
        return str(caught.value)

    checkpoint = Path(shutil.copytree(tiny(QWEN2).checkpoint, tmp_path / "checkpoint"))
    merges = (checkpoint / "merges.txt").read_bytes()
    (checkpoint / "merges.txt").unlink()
    assert "neither tokenizer.json nor vocab.json and merges.txt" in refused(CheckpointError)
    (checkpoint / "merges.txt").write_bytes(merges)
    vocabulary = (checkpoint / "vocab.json").read_bytes()
    (checkpoint / "vocab.json").write_bytes(vocabulary[:100])
    assert "The tokenizer in" in refused(CheckpointError)
    (checkpoint / "vocab.json").write_bytes(vocabulary)
    added = json.loads((checkpoint / "added_tokens.json").read_text(encoding="utf-8"))
    about = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    del about["added_tokens_decoder"]
    for token in ("<IMG_CONTEXT>", "</img>", "<|im_end|>"):
        left = {text: number for text, number in added.items() if text != token}
        (checkpoint / "added_tokens.json").write_text(json.dumps(left), encoding="utf-8")
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
        assert f"adds no token {token!r}" in refused(UnsupportedModelError)
    (checkpoint / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    export_bundle(str(checkpoint), tmp_path / "without-table")
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert "pickled weights only" in refused(WeightsError)
    assert not (tmp_path / "bundle").exists()


def test_weights_that_do_not_fit(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = Path(shutil.copytree(tiny(QWEN2).checkpoint, tmp_path / "checkpoint"))
    file, name = checkpoint / "model.safetensors", "vision_model.encoder.layers.1.attn.qkv.weight"
    stored = load_file(file)
    for change, said in (
        ({name: stored[name][:-1].contiguous()}, rf"{name}' has the shape \[95, 32\]; config.json asks for 96 rows"),
        ({name: None}, "no weight 'vision_tower.encoder.layer.1.attention.q_proj.weight'"),
        ({name: stored[name][:, :-1].contiguous()}, r"q_proj.weight' has the shape"),
    ):
        changed = {k: v for k, v in {**stored, **change}.items() if v is not None}
        save_file(changed, file)
        with pytest.raises(WeightsError, match=said):
            export_bundle(str(checkpoint), tmp_path / "bundle")
    save_file({k: v for k, v in stored.items() if "mlp1.3" not in k}, file)
    with pytest.raises(WeightsError, match=r"lacks 2 weights, 'multi_modal_projector.linear_2"):
        internvl.load_reference(checkpoint)
