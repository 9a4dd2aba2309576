"""OpenFlamingo's modules against plain formulas and against transformers' language models; its prompts; its bundles.

That they are the published model's was measured apart, against the published code (github.com/mlfoundations/open_flamingo,
2.0.1, with the tower of open_clip 2.20) on tiny random Llama and MPT models with none to three pictures: logits of whole
prompts and of cached generation agree within 2e-6, and so do those of a bundle made from its state dict.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_open_flamingo import OPEN_FLAMINGOS, SIDE, make_open_flamingo, tiny_config, tiny_model

from edgevlm.errors import CheckpointError, PromptError, UnsupportedModelError, WeightsError
from edgevlm.models import family_for_config, open_flamingo
from edgevlm.prompt import Prompt, PromptBuilder, Tokenizer, normalize_request

torch = pytest.importorskip("torch")

LLAMA, MPT, MOSAIC, HALF = OPEN_FLAMINGOS
IMAGE, END = 49, 48  # of a vocabulary of 50
PICTURES = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (20 + 9 * n, 31, 3), np.uint8)) for n in range(3)]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The converted folder of a configuration, or its bundle, made once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "open-flamingo"

    def make(tiny: Any, bundle: str = "") -> Path:
        from edgevlm.export.convert_open_flamingo import convert_open_flamingo
        from edgevlm.export.export import export_bundle

        folder = shared / tiny.name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            out = folder / "converted"
            if not out.exists():
                paths = make_open_flamingo(folder / "published", tiny)
                convert_open_flamingo(paths["weights"], str(paths["vision"]), str(paths["language"]), out)
            if bundle and not (folder / bundle).exists():
                export_bundle(str(out), folder / bundle, dtype=bundle)
        return folder / bundle if bundle else out

    return make


def pictures(count: int, seed: int = 5) -> Any:
    """Pixel values `[count, 3, H, W]`, None for none."""
    values = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return values if count else None


def logits(model: Any, ids: list[int], pixels: Any = None) -> np.ndarray:
    """`[S, vocabulary]`."""
    with torch.no_grad():
        return model(torch.tensor([ids]), pixels)[0].numpy()


# -------------------------------------------------------------------------------------------- plain formulas


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def feed_forward(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    return gelu(norm(x, weights, f"{name}.0") @ weights[f"{name}.1.weight"].T) @ weights[f"{name}.3.weight"].T


def read(query: np.ndarray, rows: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    """One query row over key rows, head by head of 64."""
    inner = len(weights[f"{name}.to_q.weight"])
    q, kv = weights[f"{name}.to_q.weight"] @ query, rows @ weights[f"{name}.to_kv.weight"].T
    key, value = kv[:, :inner], kv[:, inner:]
    out = np.zeros(inner)
    for head in range(0, inner, 64):
        part = slice(head, head + 64)
        out[part] = softmax(key[:, part] @ q[part] / 8) @ value[:, part]
    return weights[f"{name}.to_out.weight"] @ out


def arrays(module: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}


def test_the_resampler_is_a_loop_over_latents() -> None:
    model = tiny_model(LLAMA)
    features = torch.randn(2, 16, 32)
    with torch.no_grad():
        got = model.perceiver(features).numpy()
    weights = arrays(model.perceiver)
    for picture, rows in enumerate(features.double().numpy()):
        latents = weights["latents"]
        for layer in range(LLAMA.depth):
            name = f"layers.{layer}.0"
            normed = norm(latents, weights, f"{name}.norm_latents")
            keys = np.concatenate([norm(rows, weights, f"{name}.norm_media"), normed])
            latents = latents + np.stack([read(row, keys, weights, name) for row in normed])
            latents = latents + feed_forward(latents, weights, f"layers.{layer}.1")
        np.testing.assert_allclose(got[picture], norm(latents, weights, "norm"), atol=1e-5)


@pytest.mark.parametrize("sees", [[-1, 0, 0, 1, 2, 2], [-1, -1, -1, -1, -1, -1], [2, 2, 0, 1, 1, -1]])
def test_a_gated_layer_reads_one_picture(sees: list[int]) -> None:
    """Each row on its own: it reads the latents of its picture, or nothing, which is 0 and not a mean."""
    model = tiny_model(LLAMA)
    block = model.gated_cross_attn_layers["1"]
    torch.manual_seed(3)
    hidden, latents = torch.randn(1, 6, 64), torch.randn(3, 5, 32)
    mask = torch.tensor(sees)[:, None] == torch.arange(3).repeat_interleave(5)
    with torch.no_grad():
        key, value = block.attn.keys_values(latents.flatten(0, 1)[None])
        look = open_flamingo._torch().Look(mask[None, None])
        got = block(hidden, key, value, look)[0].numpy()
        attended = block.attn(hidden, key, value, look)[0].numpy()
    weights = arrays(block)
    for row, picture in enumerate(sees):
        x = hidden[0, row].double().numpy()
        expected = np.zeros(64)
        if picture >= 0:
            expected = read(norm(x, weights, "attn.norm"), latents[picture].double().numpy(), weights, "attn")
        else:
            assert not attended[row].any()  # exactly
        y = expected * np.tanh(weights["attn_gate"]) + x
        y = feed_forward(y, weights, "ff") * np.tanh(weights["ff_gate"]) + y
        np.testing.assert_allclose(got[row], y, atol=1e-5)


def test_which_layers_are_gated() -> None:
    for layers, every, expected in (
        (4, 1, [0, 1, 2, 3]),
        (4, 2, [1, 3]),
        (5, 2, [1, 3]),
        (4, 4, [3]),
        (32, 4, list(range(3, 32, 4))),
    ):
        config = tiny_config(replace(LLAMA, layers=layers, every=every), 50)
        assert open_flamingo.read_config(config).gated_layers == expected


@pytest.mark.parametrize(("heads", "largest"), [(4, 8), (8, 8), (6, 8), (12, 6), (1, 8)])
def test_alibi_slopes(heads: int, largest: int) -> None:
    """For a power of two a geometric series from 2^(−largest/n) down to 2^−largest; else as transformers has them."""
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    slopes = open_flamingo.alibi_slopes(heads, largest)
    if heads & (heads - 1) == 0:
        np.testing.assert_allclose(slopes, [2 ** (-largest * (head + 1) / heads) for head in range(heads)])
    theirs = build_mpt_alibi_tensor(heads, 3, largest)  # slope · (−2, −1, 0)
    np.testing.assert_allclose(slopes, -theirs[:, 0, 1].numpy(), rtol=1e-6)


def test_mpt_attention_in_loops() -> None:
    """Norms of query and key over all heads, the clip, the scale, the bias of the distance, and no look ahead."""
    model = tiny_model(MOSAIC).language_model
    attention, config = model.transformer.blocks[1].attn, model.transformer.blocks[1].attn
    torch.manual_seed(4)
    hidden = torch.randn(1, 7, 60) * 2
    distance = torch.arange(7) - torch.arange(7)[:, None]

    def plain(index: int, query: Any, key: Any, value: Any, scale: float) -> Any:
        assert (index, scale) == (1, 0.3)
        bias = model.alibi(distance[None, None], distance <= 0, torch.float32)
        return (query @ key.transpose(-1, -2) * scale + bias).softmax(-1) @ value

    with torch.no_grad():
        got = attention(hidden, plain)[0].numpy()
    weights, x = arrays(config), hidden[0].double().numpy()
    q, k, v = np.split(np.clip(x @ weights["Wqkv.weight"].T, -0.9, 0.9), 3, -1)
    q, k = norm(q, weights, "q_ln"), norm(k, weights, "k_ln")
    out = np.zeros((7, 60))
    for head, slope in enumerate(open_flamingo.alibi_slopes(6, 6)):
        part = slice(10 * head, 10 * head + 10)
        for row in range(7):
            scores = [q[row, part] @ k[j, part] * 0.3 - slope * (row - j) for j in range(row + 1)]
            out[row, part] = softmax(np.array(scores)) @ v[: row + 1, part]
    np.testing.assert_allclose(got, out @ weights["out_proj.weight"].T, atol=1e-5)


def test_the_logit_scale() -> None:
    plain, scaled, halved = (tiny_model(replace(MOSAIC, text={"logit_scale": s})) for s in (None, "inv_sqrt_d_model", 0.5))
    expected = logits(plain, [3, 4, 5])
    np.testing.assert_allclose(logits(scaled, [3, 4, 5]), expected / math.sqrt(60), rtol=1e-5)
    np.testing.assert_allclose(logits(halved, [3, 4, 5]), expected / 2, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("tiny", [LLAMA, MPT, HALF, replace(MPT, name="six heads", hidden=60, heads=6)], ids=lambda t: t.name)
def test_with_closed_gates_it_is_the_language_model(tiny: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, MptConfig, MptForCausalLM

    model = tiny_model(tiny)
    text = {name: value for name, value in tiny_config(tiny, 50)["text_config"].items() if name != "model_type"}
    plain = LlamaForCausalLM(LlamaConfig(**text)) if tiny.language == "llama" else MptForCausalLM(MptConfig(**text))
    plain.load_state_dict(model.language_model.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.zero_()
    ids = [3, IMAGE, 5, 6, END, IMAGE, 7, 8]
    with torch.no_grad():
        theirs = plain.eval()(input_ids=torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits(model, ids, pictures(2)), theirs, atol=2e-5)


@pytest.mark.parametrize("tiny", [LLAMA, MPT], ids=lambda tiny: tiny.name)
def test_pictures_are_seen_from_their_token_on(tiny: Any) -> None:
    model = tiny_model(tiny)
    ids = [3, 4, IMAGE, 5, 6, IMAGE, 7]
    one = logits(model, ids, pictures(2))
    first, second = pictures(2), pictures(2)
    first[0] += 1
    second[1] += 1
    changed = [np.abs(logits(model, ids, other) - one).max(-1) for other in (first, second)]
    assert not changed[0][:2].any()
    assert (changed[0][2:] > 1e-3).all()
    assert not changed[1][:5].any()
    assert (changed[1][5:] > 1e-3).all()
    # Text before the first picture is as without any.
    np.testing.assert_allclose(one[:2], logits(model, ids[:2]), atol=1e-5)


def test_only_the_last_picture_is_read() -> None:
    """With the only gate before the first layer, what is behind the second picture cannot see the first."""
    model = tiny_model(replace(LLAMA, layers=1, every=1))
    for projection in ("k_proj", "v_proj"):  # no self-attention, which would hand the first on
        getattr(model.language_model.model.layers[0].self_attn, projection).weight.data.zero_()
    both, first = pictures(2), pictures(2)
    first[0] += 1
    changed = np.abs(logits(model, [3, IMAGE, 5, IMAGE, 7, 8], both) - logits(model, [3, IMAGE, 5, IMAGE, 7, 8], first)).max(-1)
    assert (changed > 1e-3).tolist() == [False, True, True, False, False, False]


def test_pictures_and_places_must_match() -> None:
    model = tiny_model(LLAMA)
    for ids, count in (([3, IMAGE], 0), ([3, IMAGE], 2), ([3], 1)):
        with pytest.raises(ValueError, match=f"<image> tokens, {count} pictures"):
            logits(model, ids, pictures(count))


@pytest.mark.parametrize("tiny", [LLAMA, MOSAIC], ids=lambda tiny: tiny.name)
def test_an_answer_reads_the_last_picture_whatever_it_says(tiny: Any) -> None:
    model = tiny_model(tiny)
    prompt = torch.tensor([[3, IMAGE, 5, IMAGE, 7]])
    done = model.generate(input_ids=prompt, pixel_values=pictures(2), max_new_tokens=5)
    assert done.sequences.shape == (1, 10)
    assert torch.equal(torch.cat(done.logits).argmax(-1), done.sequences[0, 5:])
    said = torch.cat([prompt, torch.tensor([[IMAGE, 9]])], 1)  # an image token of its own begins no picture
    with torch.no_grad():
        got = model.read(said, model.encode_images(pictures(2)), 5)
        assert torch.isfinite(got).all()
        np.testing.assert_allclose(got[0, :5], model(prompt, pictures(2))[0], atol=1e-5)


def test_the_last_norm_of_the_tower_is_a_choice() -> None:
    config = tiny_config(LLAMA, 50)
    plain, normed = (
        open_flamingo.model_from_config({**config, "vision_post_layernorm": flag}).eval() for flag in (False, True)
    )
    normed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        tower = plain.vision_tower(pictures(1)).last_hidden_state
        assert torch.equal(plain.vision_encoder()(pictures(1)), tower[:, 1:])
        assert torch.equal(normed.vision_encoder()(pictures(1)), plain.vision_tower.post_layernorm(tower[:, 1:]))


# --------------------------------------------------------------------------------------------- configuration


def test_it_is_found_by_its_architecture() -> None:
    config = {"architectures": ["OpenFlamingoForConditionalGeneration"], **tiny_config(MPT, 50)}
    assert family_for_config(config) == ("open_flamingo", open_flamingo)


@pytest.mark.parametrize(
    ("where", "value", "expected"),
    [
        ("vision_config", {"model_type": "siglip_vision_model"}, "vision tower 'siglip_vision_model'"),
        ("text_config", {"model_type": "gpt_neox"}, "language model 'gpt_neox' is not supported; supported: llama, mpt"),
        ("text_config", {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'"),
        (
            "text_config",
            {"model_type": "mpt", "attn_config": {"alibi": False, "prefix_lm": True}},
            "no ALiBi and a prefix mask",
        ),
    ],
)
def test_what_is_not_covered(where: str, value: dict[str, Any], expected: str) -> None:
    with pytest.raises(UnsupportedModelError, match=expected):
        open_flamingo.check_config({**tiny_config(MPT, 50), where: value})


def test_an_incomplete_configuration() -> None:
    config = tiny_config(MPT, 50)
    del config["resampler"]["depth"]
    with pytest.raises(CheckpointError, match=r"lacks what OpenFlamingo needs \(KeyError: 'depth'\)"):
        open_flamingo.read_config(config)


def test_the_reference_wants_every_weight(tmp_path: Path, converted: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = converted(LLAMA)
    weights = load_file(folder / "model.safetensors")
    model = open_flamingo.load_reference(folder)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    latents = weights.pop("perceiver.latents")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lacks 1 weights, 'perceiver\.latents' among them"):
        open_flamingo.load_reference(tmp_path)
    save_file({**weights, "perceiver.latents": latents[:3]}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"has the shape \[3, 32\]; config.json asks for \[5, 32\]"):
        open_flamingo.load_reference(tmp_path)


# --------------------------------------------------------------------------------------------------- prompts


@pytest.fixture(scope="session")
def write(converted: Callable[..., Path]) -> Callable[..., Prompt]:
    """A request as a prompt."""
    folder = converted(LLAMA)
    config = json.loads((folder / "config.json").read_text())
    model = open_flamingo.read_config(config)
    manifest = open_flamingo.describe(folder, model, "float32")
    image = manifest.image
    builder = PromptBuilder(Tokenizer.from_folder(folder), None, image.token, image.token_id, lambda _: (1, 1, image.places))
    return lambda *args, **kwargs: open_flamingo.build_prompt(builder, manifest, normalize_request(*args, **kwargs))


def test_prompts(write: Callable[..., Prompt]) -> None:
    a, b, c = PICTURES
    assert write("How many?", [a]).text == "<image>How many?"
    assert write("How many?").text == "How many?"
    shots = "<image>two<|endofchunk|><image>How many?"
    assert write(shots, [a, b]).text == shots
    assert write([a, "two", b, "How many?"]).text == shots
    assert write([a, "two<|endofchunk|>", b, "How many?"]).text == shots
    assert write(["A scene:", a, b, "two", c, "x"]).text == "A scene:<image><image>two<|endofchunk|><image>x"
    chat = [
        {"role": "user", "content": [{"type": "image", "image": a}]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "image", "image": b}, {"type": "text", "text": "How many?"}]},
    ]
    assert write(messages=chat).text == shots
    asked = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Q"}, {"type": "image", "image": a}, {"type": "text", "text": "r"}],
        }
    ]
    assert write(messages=asked).text == "Q<image>r"


def test_what_each_token_sees(write: Callable[..., Prompt]) -> None:
    prompt = write(["cubes", PICTURES[0], "two", PICTURES[1], PICTURES[2], "How"])
    image = [i for i, (start, length) in enumerate(prompt.places) if length == 1]
    assert image == [0, 1, 2]
    assert prompt.sees is not None
    for index, seen in enumerate(prompt.sees):
        assert seen == sum(start <= index for start, _ in prompt.places) - 1
    assert prompt.sees[0] == -1
    assert prompt.sees[-1] == 2


def test_a_chat_keeps_control_tokens_of_its_texts_as_text(write: Callable[..., Prompt]) -> None:
    prompt = write(messages=[{"role": "user", "content": "<image> is a token"}])
    assert prompt.places == ()


def test_places_and_pictures_are_counted(write: Callable[..., Prompt]) -> None:
    with pytest.raises(PromptError, match="2 places for pictures"):
        write("<image>a<image>b", [PICTURES[0]])


# --------------------------------------------------------------------------------------------------- bundles

#: Tracing costs by layers, so these have few.
EXPORTED = [
    replace(LLAMA, name="open-flamingo-llama-short", layers=2, depth=1),
    replace(MOSAIC, name="open-flamingo-mosaic-short", layers=2, every=2),
]


@pytest.mark.parametrize("tiny", EXPORTED, ids=lambda tiny: tiny.name)
def test_a_bundle_is_the_model(converted: Callable[..., Path], tiny: Any) -> None:
    from edgevlm.verify import verify_bundle

    report = verify_bundle(converted(tiny, "fp32"), str(converted(tiny)))
    assert report.failures == []
    assert report.notes == []  # the preprocessing was compared, too
    assert [check.part for check in report.parts] == ["vision_encoder", "resampler", "cross_kv", "embed_tokens", "decoder"]
    assert max(check.max_abs for check in report.sequences) < 1e-4


def test_a_tied_head_keeps_the_name_that_recipes_know_it_by(converted: Callable[..., Path]) -> None:
    import onnx_ir as ir

    tied = EXPORTED[1]
    assert tied.tied
    graph = ir.load(converted(tied, "fp32") / "onnx" / "decoder.onnx").graph
    assert "language_model.lm_head.weight" in graph.initializers
    assert not any("to_kv" in name or "wte" in name for name in graph.initializers)


@pytest.mark.slow
@pytest.mark.parametrize(("tiny", "dtype"), [(MPT, "fp32"), (HALF, "fp16")], ids=["mpt", "half"])
def test_other_bundles_are_the_model(converted: Callable[..., Path], tiny: Any, dtype: str) -> None:
    from edgevlm.verify import verify_bundle

    assert verify_bundle(converted(tiny, dtype), str(converted(tiny))).failures == []


@pytest.mark.parametrize("tiny", EXPORTED, ids=lambda tiny: tiny.name)
def test_a_row_that_sees_nothing_in_a_graph(converted: Callable[..., Path], tiny: Any) -> None:
    """Whatever lies in the memory of the cross-attention."""
    from edgevlm.bundle import Bundle
    from edgevlm.runtimes import open_part

    bundle = Bundle.open(converted(tiny, "fp32"), check_files=False)
    part = bundle.manifest.parts["decoder"]
    session, _ = open_part(bundle.part_path("decoder"), "decoder", part, backend="cpu", threads=1)
    rng = np.random.default_rng(0)
    dims = {"batch_size": 1, "sequence_length": 4, "capacity": 6, "cross_length": 5}
    feeds = {}
    for name, info in part.inputs.items():
        shape = [dims[d] if isinstance(d, str) else d for d in info.shape]
        feeds[name] = rng.standard_normal(shape).astype(np.float32) if info.dtype == "float32" else np.zeros(shape, info.dtype)
    feeds |= {"position_ids": np.arange(4)[None], "last_token_index": np.array([3])}
    blind = session.run(feeds)["logits"]
    other = {name: 3 * array + 1 if name.startswith("cross_key_values") else array for name, array in feeds.items()}
    assert np.isfinite(blind).all()
    np.testing.assert_array_equal(session.run(other)["logits"], blind)
    feeds["cross_attention_mask"] = np.ones((1, 4, 5), bool)
    assert np.abs(session.run(feeds)["logits"] - blind).max() > 1e-2


@pytest.mark.parametrize("tiny", EXPORTED, ids=lambda tiny: tiny.name)
def test_the_runtime_answers_few_shots(converted: Callable[..., Path], tiny: Any) -> None:
    from edgevlm import VLM

    vlm = VLM.load(converted(tiny, "fp32"), backend="cpu")
    model = open_flamingo.load_reference(converted(tiny))
    items = ["First a text.", PICTURES[0], "two", PICTURES[1], "How many"]
    reply = vlm.generate(items, max_new_tokens=12)
    built = open_flamingo.build_prompt(vlm._builder, vlm.bundle.manifest, normalize_request(items))
    pixels = torch.from_numpy(np.stack([vlm._processor(picture) for picture in PICTURES[:2]]))
    answer = model.generate(torch.tensor([built.ids]), pixels, max_new_tokens=12).sequences[0, len(built.ids) :].tolist()
    stop = next((i for i, token in enumerate(answer) if token in vlm._stop), len(answer))
    assert reply.tokens == answer[:stop]
    again = vlm.generate([*items[:4], "Describe"], max_new_tokens=2)
    assert again.timings.reused_images == 2 or again.timings.reused_tokens > 0
