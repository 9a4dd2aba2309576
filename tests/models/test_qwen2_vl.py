"""Qwen2-VL and Qwen2.5-VL: patches, windows and positions as transformers counts them, films, and what is kept of them."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from asking import Runs, image_part, load, logits_of, picture, text_part, user, watch
from tinies import Tiny
from tiny_qwen2_vl import QWEN2_VLS, TinyQwen2VL

pytest.importorskip("torch")
import onnx
import torch

from edgevlm import Seen, Video
from edgevlm import generate as generate_module
from edgevlm.bundle import Bundle, PatchGrid, seal
from edgevlm.errors import CapacityError, ImageError, InputError, ManifestError, PromptError, UnsupportedModelError
from edgevlm.export.export import export_bundle
from edgevlm.generate import Decoder
from edgevlm.models import qwen2_vl
from edgevlm.prompt import Prompt, normalize_request
from edgevlm.vlm import VLM

pytestmark = pytest.mark.usefixtures("one_thread", "traced_once")

OLD, NEW = "qwen2-vl", "qwen2.5-vl"
NAMES = [tiny.name for tiny in QWEN2_VLS if tiny.generation < 3]
#: Those that have every mechanism once run always.
ALWAYS = (OLD, "qwen2-vl-odd", "qwen2.5-vl-windows")
EACH = pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
PAIR = pytest.mark.parametrize("name", [OLD, NEW])
A, B, WIDE = picture(1), picture(2, 30, 64), picture(3, 120, 31)


def film(seed: int, frames: int, fps: float = 2.0, width: int = 45, height: int = 37) -> Video:
    return Video([picture(seed + i, width, height) for i in range(frames)], fps)


def video_part(video: Video) -> dict[str, Any]:
    return {"type": "video", "video": video}


def prompt_of(vlm: VLM, *asked: Any, **more: Any) -> Prompt:
    """What the decoder would be given."""
    request = normalize_request(*asked, **more)
    request = request.with_images([vlm._load(image) for image in request.images])
    return qwen2_vl.build_prompt(vlm._builder, vlm.bundle.manifest, request)


class Theirs:
    """The checkpoint in transformers, from the outside: its template, tokenizer, image processor, positions and `generate`."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config = GenerationConfig(pad_token_id=0)  # greedy, and without an end
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.images = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def patches(self, item: Any) -> tuple[np.ndarray, list[int]]:
        """Of a film: those of its frames as pictures, each of which holds its frame as often as a layer has frames."""
        if not isinstance(item, Video):
            batch = self.images(item, return_tensors="np")
            return batch["pixel_values"], batch["image_grid_thw"][0].tolist()
        frames = [self.patches(frame) for frame in item.frames]
        size, deep = self.images.patch_size, self.images.temporal_patch_size
        alone = [rows.reshape(len(rows), 3, deep, size, size)[:, :, 0] for rows, _ in frames]
        alone += alone[-1:] * (-len(alone) % deep)
        layers = [np.stack(alone[i : i + deep], 2).reshape(len(alone[0]), -1) for i in range(0, len(alone), deep)]
        return np.concatenate(layers), [len(layers), *frames[0][1][1:]]

    def inputs(self, messages: list[dict[str, Any]], ids: list[int] | None = None) -> dict[str, Any]:
        config = self.model.config
        found = [part[part["type"]] for message in messages for part in message["content"] if part["type"] != "text"]
        kinds: dict[bool, list[Any]] = {False: [], True: []}
        for item in found:
            kinds[isinstance(item, Video)].append((item, *self.patches(item)))
        if ids is None:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for seen, token in ((kinds[False], "<|image_pad|>"), (kinds[True], "<|video_pad|>")):
                first, *pieces = text.split(token)
                counts = [np.prod(grid) // self.images.merge_size**2 for _, _, grid in seen]
                text = first + "".join(token * int(n) + piece for n, piece in zip(counts, pieces, strict=True))
            ids = self.tokenizer(text)["input_ids"]
        asked = torch.tensor([ids])
        out = {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
        out["mm_token_type_ids"] = (asked == config.image_token_id).int() + 2 * (asked == config.video_token_id).int()
        for seen, pixels, grids in ((kinds[False], "pixel_values", "image"), (kinds[True], "pixel_values_videos", "video")):
            if seen:
                out[pixels] = torch.from_numpy(np.concatenate([rows for _, rows, _ in seen]))
                out[f"{grids}_grid_thw"] = torch.tensor([grid for _, _, grid in seen])
        if kinds[True] and hasattr(config.vision_config, "tokens_per_second"):
            out["second_per_grid_ts"] = torch.tensor([self.images.temporal_patch_size / v.fps for v, _, _ in kinds[True]])
        return out

    def answer(self, messages: list[dict[str, Any]], tokens: int, ids: list[int] | None = None) -> tuple[int, np.ndarray]:
        """Length of the prompt, and the logits before each greedy token."""
        batch = self.inputs(messages, ids)
        self.model.model.rope_deltas = None
        with torch.no_grad():
            out = self.model.generate(
                **batch, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        return batch["input_ids"].shape[1], torch.stack(out.logits)[:, 0].numpy()


@pytest.fixture(scope="module")
def theirs(tiny: Callable[[str], Tiny]) -> Callable[[str], Theirs]:
    known: dict[str, Theirs] = {}
    return lambda name: known.setdefault(name, Theirs(tiny(name).checkpoint)) if name not in known else known[name]


# ------------------------------------------------------------------------------------- the same answers

SYSTEM = {"role": "system", "content": [text_part("Answer in one word.")]}
SAID = {"role": "assistant", "content": [text_part("A scene — une scène 左 🤖")]}
CHATS: dict[str, list[dict[str, Any]]] = {
    "no picture": [user(text_part("Is there a red cube?"))],
    "one picture": [user(image_part(A), text_part("How many cubes are there?"))],
    "a picture behind the text": [user(text_part("Où est l'étoile — 左? 🤖"), image_part(WIDE))],
    "two pictures, one tiny": [user(image_part(B), image_part(picture(4, 2, 3)), text_part("What changed?"))],
    "a picture in a later turn": [SYSTEM, user(text_part("Hello.")), SAID, user(image_part(B), text_part("And here?"))],
    "a film of one frame": [user(video_part(film(5, 1)), text_part("What happens?"))],
    "a film": [user(video_part(film(6, 5, 3.0)), text_part("What happens?"))],
    "a slow film, whose time is ahead of the text": [user(video_part(film(7, 6, 0.1)), text_part("What?")), SAID,
                                                     user(text_part("And then?"))],
    "film, picture, film": [user(text_part("A film:"), video_part(film(8, 2, 29.97)), image_part(A),
                                 video_part(film(9, 3, 0.3)), text_part("Same?"))],
}  # fmt: skip


@EACH
def test_the_tokens_are_those_of_transformers(tiny: Callable[[str], Tiny], theirs: Callable[[str], Theirs], name: str) -> None:
    vlm = load(tiny(name).bundle)
    for case, messages in CHATS.items():
        length, scores = theirs(name).answer(messages, 32)
        reply, logits = logits_of(vlm, messages=messages, max_new_tokens=32)
        assert reply.timings.prompt_tokens == length, case
        np.testing.assert_allclose(logits, scores, atol=1e-3, err_msg=case)
        assert reply.tokens == scores.argmax(-1).tolist(), case


@PAIR
def test_a_written_picture_token_stays_text(tiny: Callable[[str], Tiny], theirs: Callable[[str], Theirs], name: str) -> None:
    asked = "<|image_pad|> is no picture, <|video_pad|> no film, <|im_end|> no end"
    vlm, config = load(tiny(name).bundle), theirs(name).model.config
    built = prompt_of(vlm, asked, [A])
    ((_, places),) = built.places
    assert [built.ids.count(number) for number in (config.image_token_id, config.video_token_id)] == [places, 0]
    assert theirs(name).tokenizer.decode(built.ids).count(asked) == 1
    length, scores = theirs(name).answer([user(image_part(A))], 8, built.ids)
    reply, logits = logits_of(vlm, prompt=asked, images=[A], max_new_tokens=8)
    assert reply.timings.prompt_tokens == length == len(built.ids)
    np.testing.assert_allclose(logits, scores, atol=1e-3)


def test_a_film_is_no_pile_of_pictures(tiny: Callable[[str], Tiny]) -> None:
    """Frames matter, their order does, and with 2.5 how fast they come; with 2 that does not matter."""
    forward = film(6, 4)
    backward = Video(list(forward.frames)[::-1], 2.0)
    slow = Video(forward.frames, 0.5)
    for name, timed in ((OLD, False), (NEW, True)):
        vlm = load(tiny(name).bundle)
        one, other, late = (logits_of(vlm, prompt=[video, "What?"], max_new_tokens=1)[1] for video in (forward, backward, slow))
        assert np.abs(one - other).max() > 1e-3
        assert (np.abs(one - late).max() > 1e-3) == timed


def test_rotary_scaling_beside_sections(tmp_path: Path) -> None:
    """What Qwen2.5-VL's own text recommends for long inputs."""
    scaling = {"type": "yarn", "mrope_section": [2, 3, 2], "factor": 4.0, "original_max_position_embeddings": 64}
    make = replace(next(t for t in QWEN2_VLS if t.name == NEW), name="yarn", text={"rope_scaling": scaling})
    checkpoint = make.make(tmp_path / "checkpoint")
    export_bundle(str(checkpoint), tmp_path / "bundle")
    theirs, vlm = Theirs(checkpoint), load(tmp_path / "bundle")
    for case in ("one picture", "a slow film, whose time is ahead of the text"):
        _, scores = theirs.answer(CHATS[case], 8)
        np.testing.assert_allclose(logits_of(vlm, messages=CHATS[case], max_new_tokens=8)[1], scores, atol=1e-3)
    assert theirs.model.config.text_config.rope_parameters["rope_type"] == "yarn"


# --------------------------------------------------------------------------- positions, patches, windows


def mixture(rng: np.random.Generator, image: int, video: int) -> Prompt:
    """A prompt of texts, pictures and films; two of them never touch, since transformers takes them for one then."""
    ids: list[int] = []
    places, grids, rates = [], [], []
    for number in range(int(rng.integers(0, 5))):
        ids += [1] * int(rng.integers(0 if number == 0 else 1, 6))
        filmed = rng.random() < 0.5
        grid = (int(rng.integers(1, 9)) if filmed else 1, int(rng.integers(1, 7)), int(rng.integers(1, 7)))
        speeds = [0.1, 0.3, 1 / 3, 0.7, 1, 1.5, 3, 7.5, 23.976, 29.97, 60, 120, rng.uniform(0.05, 100)]
        places.append((len(ids), grid[0] * grid[1] * grid[2]))
        grids.append(grid)
        rates.append(float(rng.choice(speeds)) if filmed else None)
        ids += [video if filmed else image] * places[-1][1]
    ids += [1] * int(rng.integers(0 if ids else 1, 6))
    return Prompt(ids, tuple(places), "", grids=tuple(grids), rates=tuple(rates))


@pytest.mark.parametrize("name", [OLD, "qwen2-vl-odd", NEW, "qwen2.5-vl-windows"])
def test_positions_are_those_of_transformers(theirs: Callable[[str], Theirs], name: str) -> None:
    body, config = theirs(name).model.model, theirs(name).model.config
    grid, merge = qwen2_vl._patch_grid(config.vision_config), config.vision_config.spatial_merge_size
    rng = np.random.default_rng(0)
    ahead = 0
    for _ in range(150):
        prompt = mixture(rng, config.image_token_id, config.video_token_id)
        ids = torch.tensor([prompt.ids])
        types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        sizes: dict[bool, list[list[int]]] = {False: [], True: []}
        for (layers, rows, columns), rate in zip(prompt.grids, prompt.rates, strict=True):
            sizes[rate is not None].append([layers, rows * merge, columns * merge])
        grids = [torch.tensor(sizes[filmed]) if sizes[filmed] else None for filmed in (False, True)]
        seconds = torch.tensor([config.vision_config.temporal_patch_size / rate for rate in prompt.rates if rate])
        timed = {"second_per_grid_ts": seconds} if hasattr(config.vision_config, "tokens_per_second") else {}
        wanted, _ = body.get_rope_index(ids, types, *grids, attention_mask=torch.ones_like(ids), **timed)
        ours = qwen2_vl.rope_positions(prompt, SimpleNamespace(patches=grid))
        np.testing.assert_array_equal(ours, wanted[:, 0].numpy(), err_msg=str((prompt.grids, prompt.rates)))
        ahead += ours.max() > ours[:, -1].max()
    assert ahead > 3  # films whose time is ahead of the text behind them


def test_patches_are_counted_block_by_block() -> None:
    from transformers.vision_utils import get_vision_position_ids

    for merge, rows, columns in itertools.product((1, 2, 3), range(1, 6), range(1, 8)):
        wanted = get_vision_position_ids(torch.tensor([[1, rows * merge, columns * merge]]), merge).numpy()
        ours = qwen2_vl.patch_positions(rows * merge, columns * merge, merge)
        assert ours.shape == (rows * columns, merge * merge, 2)
        np.testing.assert_array_equal(ours.reshape(-1, 2), wanted)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 20])
def test_windows_are_those_of_transformers(window: int) -> None:
    from transformers.vision_utils import get_vision_window_index

    for merge, rows, columns in itertools.product((1, 2, 3), range(1, 8), range(1, 8)):
        square, grid = merge * merge, PatchGrid(7, 2, merge, window)
        size = torch.tensor([[1, rows * merge, columns * merge]])
        order, ends = get_vision_window_index(size, merge, window * merge * 7, 7)
        wanted = np.split((order.numpy()[:, None] * square + np.arange(square)).ravel(), ends.numpy()[1:-1])
        tables = qwen2_vl.window_tables(rows, columns, grid)
        index, place = tables["window_index"], tables["window_place"]
        assert index.shape[1:] == (window * window * square,)
        assert place.shape == (rows * columns, square)
        assert [row[row >= 0].tolist() for row in index] == [w.tolist() for w in wanted]
        np.testing.assert_array_equal(index.ravel()[place.ravel()], np.arange(rows * columns * square))


def test_cut_patches_by_hand() -> None:
    """Every number of every patch, for frames that do not fill the last layer."""
    grid = PatchGrid(size=3, temporal=2, merge=2)
    frames = np.arange(3 * 3 * 12 * 18, dtype=np.float32).reshape(3, 3, 12, 18)
    cut = qwen2_vl.cut_patches(frames, grid)
    assert cut.shape == (2, 6, 4, 3 * 2 * 9)
    cut = cut.reshape(2, 2, 3, 2, 2, 3, 2, 3, 3)
    for layer, row, column, down, right, channel, frame in itertools.product(
        range(2), range(2), range(3), range(2), range(2), range(3), range(2)
    ):
        top, left = 3 * (2 * row + down), 3 * (2 * column + right)
        wanted = frames[min(2 * layer + frame, 2), channel, top : top + 3, left : left + 3]
        np.testing.assert_array_equal(cut[layer, row, column, down, right, channel, frame], wanted)


# ---------------------------------------------------------------------------------------- vision encoder

GRIDS = [(1, 1), (1, 2), (1, 7), (5, 1), (2, 2), (3, 5), (4, 4), (7, 9), (1, 33), (17, 2)]


@EACH
def test_the_encoder_is_the_tower_on_any_grid(tiny: Callable[[str], Tiny], theirs: Callable[[str], Theirs], name: str) -> None:
    """One place and many, less patches than there are blocks of rows, windows larger than the picture, films."""
    vlm, tower = load(tiny(name).bundle), theirs(name).model.model.visual
    manifest = vlm.bundle.manifest
    assert manifest.patches is not None
    side, deep = manifest.patches.size * manifest.patches.merge, manifest.patches.temporal
    rng = np.random.default_rng(0)
    for number, (rows, columns) in enumerate(GRIDS):
        frames = (1, 2, 3, 5)[number % 4]
        pixels = rng.normal(size=(frames, 3, rows * side, columns * side)).astype(np.float32)
        ours = qwen2_vl.encode_image(vlm._run, manifest, pixels)
        layers = -(-frames // deep)
        patches = qwen2_vl.cut_patches(pixels, manifest.patches).reshape(-1, 3 * deep * manifest.patches.size**2)
        grid = torch.tensor([[layers, rows * manifest.patches.merge, columns * manifest.patches.merge]])
        with torch.no_grad():
            wanted = tower(torch.from_numpy(patches), grid_thw=grid).pooler_output.numpy()
        assert ours.shape == (layers * rows * columns, manifest.hidden_size)
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(ours, wanted, atol=1e-4, err_msg=f"{frames} frames of {rows} x {columns}")


@EACH
def test_the_vision_graph_does_not_depend_on_data(tiny: Callable[[str], Tiny], name: str) -> None:
    bundle = Bundle.open(tiny(name).bundle, check_files=False)
    graph = onnx.load(bundle.part_path("vision_encoder"), load_external_data=False).graph
    part, grid = bundle.manifest.parts["vision_encoder"], bundle.manifest.patches
    assert grid is not None
    made = Counter(node.op_type for node in graph.node)
    assert not set(made) & {"NonZero", "Unique", "Loop", "If", "Scan", "Where", "SequenceAt", "Compress", "TopK", "ScatterND"}
    assert all(not attribute.HasField("g") for node in graph.node for attribute in node.attribute)
    windows = {"window_index", "window_place"} if grid.window else set()
    assert [entry.name for entry in graph.input] == list(part.inputs)
    assert set(part.inputs) == {"pixel_values", "position_ids"} | windows
    assert part.inputs["pixel_values"].shape[:2] == ("frames", "places")
    config = json.loads((tiny(name).checkpoint / "config.json").read_text(encoding="utf-8"))["vision_config"]
    depth = config["depth"]
    whole = [n for n in range(depth) if n in config.get("fullatt_block_indexes", range(depth))]
    attention = [len([i for i in node.input if i]) for node in graph.node if node.op_type == "Attention"]
    # Whole frames in blocks of rows and without a mask; windows at once, with one.
    assert Counter(attention) == Counter({3: len(whole) * qwen2_vl.ROW_BLOCKS, 4: depth - len(whole)})
    assert bool(depth - len(whole)) == bool(windows)
    # No table for one size of picture.
    constants = [a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.HasField("t")]
    constants += [i for i in graph.initializer if "weight" not in i.name and "bias" not in i.name]
    assert all(np.prod(tensor.dims) <= 64 for tensor in constants)


def test_frames_of_a_film_run_one_layer_at_a_time(tiny: Callable[[str], Tiny]) -> None:
    vlm = load(tiny(NEW).bundle)
    runs = watch(vlm, "vision_encoder")
    vlm.generate([film(1, 5), "What?"], max_new_tokens=1)
    assert [run["pixel_values"].shape[0] for run in runs] == [1, 1, 1]
    assert runs[0]["pixel_values"].shape == runs[2]["pixel_values"].shape


# ------------------------------------------------------------------------------- what is kept, and not


def fresh(bundle: Path, **asked: Any) -> tuple[list[int], np.ndarray]:
    reply, logits = logits_of(load(bundle), **asked)
    return reply.tokens, logits


def assert_as_new(vlm: VLM, bundle: Path, **asked: Any) -> Any:
    """The reply of a warm model, which must be that of a new one."""
    reply, logits = logits_of(vlm, **asked)
    tokens, wanted = fresh(bundle, **asked)
    assert reply.tokens == tokens
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    return reply


@PAIR
def test_a_second_question_about_a_picture(tiny: Callable[[str], Tiny], name: str) -> None:
    bundle = tiny(name).bundle
    vlm = load(bundle)
    runs = Runs(vlm)
    vlm.generate("How many cubes are there?", images=[A], max_new_tokens=4)
    assert runs()["vision_encoder"] == 1
    reply = assert_as_new(vlm, bundle, prompt="How large is it?", images=[A], max_new_tokens=8)
    assert "vision_encoder" not in runs()
    places = reply.pictures[0].tokens
    assert reply.timings.reused_images == 1
    assert places < reply.timings.reused_tokens < reply.timings.prompt_tokens
    other = assert_as_new(vlm, bundle, prompt="How large is it?", images=[B], max_new_tokens=8)
    assert other.timings.reused_images == 0
    assert other.timings.reused_tokens == prompt_of(vlm, "", [B]).places[0][0]  # what stands before the picture


@PAIR
def test_a_conversation_goes_on_where_it_was(tiny: Callable[[str], Tiny], name: str) -> None:
    bundle = tiny(name).bundle
    vlm = load(bundle)
    messages = [user(image_part(WIDE), text_part("Describe the scene."))]
    for question in ("And left of it?", "Why?"):
        reply = assert_as_new(vlm, bundle, messages=messages, max_new_tokens=6)
        before = reply.timings.prompt_tokens
        messages += [{"role": "assistant", "content": [text_part(reply.text)]}, user(text_part(question))]
        reply = assert_as_new(vlm, bundle, messages=messages, max_new_tokens=6)
        assert reply.timings.reused_tokens >= before


@PAIR
def test_an_answer_behind_a_slow_film_is_reused_where_it_stands(tiny: Callable[[str], Tiny], name: str) -> None:
    """Its tokens count on from the text behind the film, so that they stand where they were in the next prompt."""
    bundle = tiny(name).bundle
    vlm = load(bundle)
    asked = prompt_of(vlm, [film(1, 6, 0.1), "What happens?"])
    assert asked.positions is not None
    first = assert_as_new(vlm, bundle, prompt=[film(1, 6, 0.1), "What happens?"], max_new_tokens=3)
    assert (asked.positions.max() > asked.positions[:, -1].max() + 10) == (name == NEW)
    kept = list(vlm._cache.keys)
    assert len(kept) == first.timings.prompt_tokens + 2
    said = {"role": "assistant", "content": [text_part("It turns.")]}
    turned = user(video_part(film(1, 6, 0.1)), text_part("What happens?"))
    vlm.generate(messages=[turned, said, user(text_part("And then?"))], max_new_tokens=1)
    last = len(asked.ids)
    assert [key[1:] for key in vlm._cache.keys[:last]] == [key[1:] for key in kept[:last]]
    assert [key[1:] for key in kept[last:]] == [key[1:] for key in vlm._cache.keys[last : last + 2]]


def test_answers_that_begin_behind_a_picture(plain: VLM, theirs: Callable[[str], Theirs]) -> None:
    """The prompt's last place is the picture's lower right corner: time, row and column go on from there, each for itself."""
    for prompt, images in (
        ("What? <|vision_start|><|image_pad|>", [WIDE]),
        ("<|image_pad|>", [B]),
        ("<|video_pad|>", [film(1, 5)]),
    ):
        messages = [user(*(video_part(i) if isinstance(i, Video) else image_part(i) for i in images))]
        ids = prompt_of(plain, prompt, images).ids
        length, scores = theirs(OLD).answer(messages, 12, ids)
        reply, logits = logits_of(plain, prompt=prompt, images=images, max_new_tokens=12)
        assert reply.timings.prompt_tokens == length
        np.testing.assert_allclose(logits, scores, atol=1e-3, err_msg=prompt)
        warm, again = logits_of(plain, prompt=prompt, images=images, max_new_tokens=12)
        assert warm.timings.reused_tokens == length - 1
        np.testing.assert_allclose(again, scores, atol=1e-3, err_msg=prompt)


def test_the_speed_of_a_film_moves_what_is_behind_it(tiny: Callable[[str], Tiny]) -> None:
    vlm, frames = load(tiny(NEW).bundle), film(1, 4).frames
    vlm.generate([Video(frames, 1.0), "What?"], max_new_tokens=4)
    reply = assert_as_new(vlm, tiny(NEW).bundle, prompt=[Video(frames, 0.5), "What?"], max_new_tokens=4)
    assert reply.timings.reused_images == 1  # what is seen is the same, when it is seen is not
    layer = reply.pictures[0].tokens // 2
    assert layer < reply.timings.reused_tokens < 2 * layer + 20
    assert vlm.generate([Video(frames, 0.5), "What?"], max_new_tokens=1).timings.reused_tokens > 2 * layer


def test_a_picture_and_a_film_of_it_are_two_things(tiny: Callable[[str], Tiny]) -> None:
    vlm = load(tiny(OLD).bundle)
    vlm.generate(["Look:", A, "What?"], max_new_tokens=2)
    reply = assert_as_new(vlm, tiny(OLD).bundle, prompt=["Look:", Video([A]), "What?"], max_new_tokens=2)
    assert reply.timings.reused_images == 0


@PAIR
def test_chunks_change_nothing(tiny: Callable[[str], Tiny], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"prompt": ["A film:", film(3, 9, 0.7), "and", WIDE, "How many? " * 9], "max_new_tokens": 8}
    bundle = tiny(name).bundle
    tokens, wanted = fresh(bundle, **asked)
    vlm = load(bundle)
    runs = watch(vlm, "decoder")
    vlm.generate(**asked)
    assert len(runs) == 2 + 7  # longer than one chunk
    for chunk in (7, 64, 4096):
        monkeypatch.setattr(generate_module, "CHUNK", chunk)
        again, logits = fresh(bundle, **asked)
        assert again == tokens
        np.testing.assert_allclose(logits, wanted, atol=1e-4, err_msg=str(chunk))


@PAIR
def test_a_ragged_batch_answers_as_its_parts(tiny: Callable[[str], Tiny], name: str) -> None:
    """Through the decoder itself, with rotary positions that are not places in the cache."""
    vlm = load(tiny(name).bundle)
    manifest, rng = vlm.bundle.manifest, np.random.default_rng(0)
    rows = [rng.normal(size=(n, manifest.hidden_size)).astype(np.float32) for n in (9, 4)]
    turns = [np.sort(rng.integers(0, 60, (3, len(r))), 1) for r in rows]
    step = rng.normal(size=(2, 1, manifest.hidden_size)).astype(np.float32)
    step_turns = np.array([[70, 31], [65, 30], [64, 33]])[..., None]

    def decoder(batch: int) -> Decoder:
        return Decoder(vlm._sessions["decoder"], manifest.kv_cache, 32, batch)

    padded, padded_turns = np.zeros((2, 9, manifest.hidden_size), np.float32), np.zeros((3, 2, 9), np.int64)
    for n, (row, turn) in enumerate(zip(rows, turns, strict=True)):
        padded[n, : len(row)], padded_turns[:, n, : len(row)] = row, turn
    both = decoder(2)
    together = [both.forward(padded, np.array([0, 0]), np.array([8, 3]), turns=padded_turns)]
    together.append(both.forward(step, np.array([9, 4]), np.array([0, 0]), turns=step_turns))
    for n, (row, turn) in enumerate(zip(rows, turns, strict=True)):
        alone = decoder(1)
        first = alone.forward(row[None], np.array([0]), np.array([len(row) - 1]), turns=turn[:, None])
        second = alone.forward(step[n : n + 1], np.array([len(row)]), np.array([0]), turns=step_turns[:, n : n + 1])
        np.testing.assert_allclose(together[0][n], first[0], atol=1e-5)
        np.testing.assert_allclose(together[1][n], second[0], atol=1e-5)
    moved = decoder(1).forward(rows[1][None], np.array([0]), np.array([3]), turns=turns[1][::-1, None].copy())
    assert np.abs(moved[0] - together[0][1]).max() > 1e-3


# -------------------------------------------------------------------------------------------- checkpoints


def parts_of(bundle: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (bundle / "onnx").iterdir()}


@pytest.mark.parametrize("name", [OLD, pytest.param(NEW, marks=pytest.mark.slow)])
def test_older_layouts_give_the_same_graphs(tiny: Callable[[str], Tiny], name: str, tmp_path: Path) -> None:
    """A flat config.json, `visual.` beside `model.`, and several files."""
    made: TinyQwen2VL = replace(next(t for t in QWEN2_VLS if t.name == name), flat=True, max_shard="60KB")
    checkpoint = made.make(tmp_path / "checkpoint")
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    assert any(key.startswith("visual.blocks.0") for key in index)
    assert any(key.startswith("model.layers.0") for key in index)
    assert "text_config" not in json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    export_bundle(str(checkpoint), tmp_path / "bundle")
    assert parts_of(tmp_path / "bundle") == parts_of(tiny(name).bundle)
    ours, other = (Bundle.open(folder).manifest for folder in (tmp_path / "bundle", tiny(name).bundle))
    for entry in ("kv_cache", "context_length", "hidden_size", "vocab_size", "image", "video", "patches"):
        assert getattr(ours, entry) == getattr(other, entry), entry


@pytest.mark.slow
def test_a_checkpoint_of_bfloat16_is_its_values(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    half = tiny("qwen2-vl-flat-tied").checkpoint
    checkpoint = Path(shutil.copytree(half, tmp_path / "checkpoint"))
    for file in checkpoint.glob("*.safetensors"):
        weights = load_file(file)
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        save_file({key: tensor.float() for key, tensor in weights.items()}, file, metadata={"format": "pt"})
    export_bundle(str(checkpoint), tmp_path / "bundle")
    assert parts_of(tmp_path / "bundle") == parts_of(tiny("qwen2-vl-flat-tied").bundle)


def test_what_the_manifest_says_of_patches(tiny: Callable[[str], Tiny]) -> None:
    from transformers import AutoConfig

    said = {}
    for name in (*ALWAYS, "qwen2.5-vl-whole"):
        checkpoint = tiny(name).checkpoint
        manifest = qwen2_vl.describe(checkpoint, AutoConfig.from_pretrained(checkpoint), "float32")
        said[name] = manifest.patches
        assert (manifest.image.token, manifest.video and manifest.video.token) == ("<|image_pad|>", "<|video_pad|>")
    assert said == {
        OLD: PatchGrid(4, 2, 2),
        "qwen2-vl-odd": PatchGrid(3, 3, 3),
        "qwen2.5-vl-windows": PatchGrid(5, 2, 2, window=3, tokens_per_second=4.0),
        "qwen2.5-vl-whole": PatchGrid(4, 2, 1, window=0, tokens_per_second=2.0),  # every layer sees the whole frame
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_config": {"patch_size": [14, 14]}}, r"patch_size = \[14, 14\] is not supported; one whole number is"),
        ({"vision_config": {"spatial_merge_size": 2.0}}, "spatial_merge_size = 2.0 is not supported"),
        ({"vision_config": {"temporal_patch_size": None}}, "temporal_patch_size = None is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "Rotary scaling 'dynamic' is not supported"),
        ({"text_config": {"rope_parameters": {"rope_type": "longrope"}}}, "Rotary scaling 'longrope' is not supported"),
    ],
)
def test_what_is_not_covered(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        qwen2_vl.check_config(change)


@pytest.mark.parametrize(
    "rope", [{"type": "mrope"}, {"rope_type": "default", "type": "mrope"}, {"rope_type": "default"}, {"type": "yarn"}, None]
)
def test_what_is_covered(rope: dict[str, Any] | None) -> None:
    qwen2_vl.check_config({"rope_scaling": rope, "vision_config": {"patch_size": 14}})
    qwen2_vl.check_config({"text_config": {"rope_scaling": rope}})


# ---------------------------------------------------------------------------------------------- bad input


def changed(bundle: Path, folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a bundle with a changed JSON file, sealed anew."""
    shutil.copytree(bundle, folder)
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    change(content)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    seal(folder, Bundle.open(bundle, check_files=False).manifest)
    return folder


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda c: c.update(patch_size=8), ManifestError, r"multiples of 16 pixels; a place of this model is 4 x 2 pixels"),
        (lambda c: c.update(merge_size=1), ManifestError, "multiples of 4 pixels"),
        (
            lambda c: c.update(image_processor_type="ViTImageProcessor", size={"height": 28, "width": 28}),
            ManifestError,
            "another kind of size",
        ),
        (lambda c: c.update(patch_size="4"), UnsupportedModelError, "patch_size = '4'.*positive whole numbers"),
        (lambda c: c.update(size={"shortest_edge": 8}), UnsupportedModelError, "size = .*needed: positive whole numbers"),
        (lambda c: c.update(do_resize=False), UnsupportedModelError, "do_resize = False; needed: true, for whole patches"),
    ],
)
def test_a_preprocessor_of_another_model(
    tiny: Callable[[str], Tiny], tmp_path: Path, change: Callable[[dict[str, Any]], object], error: type[Exception], said: str
) -> None:
    folder = changed(tiny(OLD).bundle, tmp_path / "bundle", "preprocessor_config.json", change)
    with pytest.raises(error, match=said):
        VLM.load(folder)


def test_films_that_are_refused(tiny: Callable[[str], Tiny], bundle: Path) -> None:
    vlm = load(tiny(OLD).bundle)
    runs = Runs(vlm)
    for frames, error, said in (
        ([picture(1, 40, 30), picture(2, 40, 31), picture(3, 40, 30)], ImageError,
         r"frames of the video have different sizes \(width x height\): 40 x 30, 40 x 31; bring them to one size"),
        ([picture(1), b"no picture"], ImageError, "picture in 10 bytes is no picture"),
        ([picture(1), None], ImageError, "NoneType is no picture"),
        ([picture(1, 402, 2)], ImageError, "an aspect ratio of 201.0; accepted are at most 200"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            vlm.generate([Video(frames), "What?"])
    with pytest.raises(PromptError, match=r"a video was given, but a llava model takes pictures only; give some of its frames"):
        load(bundle).generate([film(1, 2), "What?"])
    with pytest.raises(PromptError, match=r"images\[0\] is a list, not a picture; .*as edgevlm\.Video\(frames, fps\)"):
        vlm.generate("What?", images=[[A, A]])
    for content, said in (
        ({"type": "video", "video": []}, r"messages\[0\]\.content\[0\]: the video has no frame"),
        ({"type": "video"}, "the frames of a video are None; expected a list of pictures"),
        ({"type": "video", "video": [A], "fps": 0}, "the video's fps is 0; expected a number above 0"),
    ):
        with pytest.raises(PromptError, match=said):
            vlm.generate(messages=[user(content)])
    assert runs() == {}


@pytest.fixture(scope="module")
def plain(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """A model without a chat template: the prompt is used as it stands."""
    bundle = Path(shutil.copytree(tiny(OLD).bundle, tmp_path_factory.mktemp("plain") / "bundle"))
    (bundle / "chat_template.jinja").unlink()
    seal(bundle, Bundle.open(tiny(OLD).bundle, check_files=False).manifest)
    return load(bundle)


def test_places_in_a_plain_prompt(plain: VLM) -> None:
    two = "<|vision_start|><|image_pad|><|vision_end|> and <|vision_start|><|video_pad|><|vision_end|> alike?"
    reply = plain.generate(two, images=[A, film(1, 3)], max_new_tokens=2)
    assert [seen.frames for seen in reply.pictures] == [1, 3]
    for pictures, said in (
        ([film(1, 3), A], r"place 1 of the prompt is <\|image_pad\|>; a video was given for it"),
        ([A, A], r"place 2 of the prompt is <\|video_pad\|>; a picture was given for it"),
        ([A], r"has 2 places for pictures \(<\|image_pad\|>, <\|video_pad\|>\), 1 pictures were given"),
    ):
        with pytest.raises(PromptError, match=said):
            plain.generate(two, images=pictures)
    with pytest.raises(PromptError, match=r"1 places for pictures .* 0 pictures"):
        plain.generate("<|image_pad|> what?")
    before = plain.generate("What?", images=[film(1, 1)], max_new_tokens=1)  # a film without a place goes before the text
    assert before.timings.prompt_tokens > before.pictures[0].tokens


def test_a_picture_too_large_for_the_capacity(tiny: Callable[[str], Tiny]) -> None:
    vlm = load(tiny(OLD).bundle, capacity=80)
    runs = Runs(vlm)
    with pytest.raises(CapacityError, match=r"capacity of 80"):
        vlm.generate("What?", images=[picture(1, 90, 80)])
    assert runs() == {}
    few = load(tiny(OLD).bundle, capacity=80, visual_tokens=4)
    assert few.generate("?", images=[picture(1, 90, 80)], max_new_tokens=1).pictures[0].tokens <= 4


def test_a_film_beyond_the_budget(tiny: Callable[[str], Tiny]) -> None:
    vlm = load(tiny(OLD).bundle, visual_tokens=2)
    assert vlm.generate([film(1, 4), "?"], max_new_tokens=1).pictures[0].tokens == 2
    with pytest.raises(InputError, match=r"visual_tokens is 2; .* of 5 frames takes 3\. Give fewer frames, or more tokens"):
        vlm.generate([film(1, 5), "?"], max_new_tokens=1)


# ------------------------------------------------------------------------------------------ what was seen


def test_what_was_seen(tiny: Callable[[str], Tiny]) -> None:
    """8 pixels a place, 256 to 4,096 pixels a picture."""
    vlm = load(tiny(OLD).bundle)
    exact, large, small = picture(1, 64, 64), picture(2, 200, 100), picture(3, 8, 4)
    reply = vlm.generate([exact, large, small, Video([large] * 3), "?"], max_new_tokens=1)
    assert reply.pictures == (
        Seen(64, 64, 64, 64, 64),
        Seen(200, 100, 88, 40, 55, limited=True),
        Seen(8, 4, 24, 16, 6),
        Seen(200, 100, 88, 40, 110, frames=3, limited=True),
    )
    other = vlm.generate([A, A, A, Video([A]), "?"], max_new_tokens=1)
    texts = [r.timings.prompt_tokens - sum(seen.tokens for seen in r.pictures) for r in (reply, other)]
    assert texts[0] == texts[1]  # what a prompt grows by is what its pictures take
    few = load(tiny(OLD).bundle, visual_tokens=10).generate([exact, small, "?"], max_new_tokens=1)
    assert few.pictures == (Seen(64, 64, 24, 24, 9, limited=True), Seen(8, 4, 24, 16, 6))
    assert vlm.generate("?", max_new_tokens=1).pictures == ()
    stream = vlm.stream([large, "?"], max_new_tokens=3)
    next(stream)
    stream.close()
    assert stream.reply.pictures == reply.pictures[1:2]
