"""The training tool at a tiny scale: it runs, its folders load, their prompts are the trained ones, a stop costs nothing."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import itertools
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jinja2
import numpy as np
import pytest

from edgevlm.scenes import COLOURS, SHAPES, SIZES, ask_all, render_scene, sample_scene

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
LLAVA = ROOT / "edgevlm/assets/demo/llava"
CLASSES = {
    "llava": "Llava", "blip2": "Blip2", "flamingo": "Flamingo", "internvl": "InternVL", "qwen2_vl": "Qwen2VL",
    "qwen_vl": "QwenVLTrainer",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _subnormal_numbers() -> Iterator[None]:
    """Training takes them as zeros, in the whole process; the next tests want them back."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    """The tool's modules, and twenty-four drawn pictures. One thread: beside other tests, two wait for each other."""
    names = ("common", "slots", "views", "grids", "chatml", "score", *CLASSES)
    threads, count = torch.get_num_threads(), os.cpu_count
    os.cpu_count = lambda: 1
    sys.path.insert(0, str(ROOT / "tools/train_demo"))
    try:
        modules = {name: importlib.import_module(name) for name in names}
        work = tmp_path_factory.mktemp("pictures")
        drawn = argparse.Namespace(work=str(work), pictures=24, views=24, validation=8, processes=1)
        modules["internvl"].InternVL.draw_pictures(drawn)
        modules["qwen2_vl"].Qwen2VL.draw_pictures(drawn)
        modules["llava"].build_tokenizer = functools.cache(modules["llava"].build_tokenizer)  # three trainings, one tokenizer
        yield SimpleNamespace(work=work, **modules)
    finally:
        sys.path.remove(str(ROOT / "tools/train_demo"))
        for name in names:
            sys.modules.pop(name, None)
        os.cpu_count = count
        torch.set_num_threads(threads)


def train(tool, model: str, folder: Path, scale: float = 1e-4, kind: type | None = None, internvl: Path | None = None) -> Path:
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    for path in tool.work.glob("*.npy"):
        if not (work / path.name).exists():
            (work / path.name).symlink_to(path)
    arguments = argparse.Namespace(
        model=model, work=str(work), output=str(folder / "out"), llava=str(LLAVA), internvl=str(internvl), pictures=24,
        views=24, validation=8, processes=1, seed=0, scale=scale,
    )  # fmt: skip
    tool.common.worker(0, kind or getattr(getattr(tool, model), CLASSES[model]), arguments)
    return folder / "out"


@pytest.fixture(scope="module")
def blip2(tool, tmp_path_factory):
    return train(tool, "blip2", tmp_path_factory.mktemp("blip2"))


@pytest.fixture(scope="module")
def flamingo(tool, tmp_path_factory):
    return train(tool, "flamingo", tmp_path_factory.mktemp("flamingo"))


def load(folder: Path):
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoProcessor.from_pretrained(folder)


def test_a_stopped_training_goes_on_where_it_was(tool, tmp_path):
    class Llava(tool.llava.Llava):
        keep = 2
        stages = tuple(dataclasses.replace(stage, batch=4) for stage in tool.llava.Llava.stages)

        def score(self):
            return {}

    class Stopped(Llava):
        def loss(self, stage, step):
            if (stage.name, step) == ("tune", 5):
                raise KeyboardInterrupt
            return super().loss(stage, step)

    whole = train(tool, "llava", tmp_path / "whole", 1e-3, Llava)
    with pytest.raises(KeyboardInterrupt):
        train(tool, "llava", tmp_path / "stopped", 1e-3, Stopped)
    assert not (tmp_path / "stopped/out").exists()
    resumed = train(tool, "llava", tmp_path / "stopped", 1e-3, Llava)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    log = (tmp_path / "stopped" / "work" / "llava" / "log.txt").read_text()
    assert log.count("vision 3/3") == 1  # stages that were done are not done again


def test_blip2_is_published_with_the_prompt_it_was_trained_on(tool, blip2):
    model, processor = load(blip2)
    assert type(model).__name__ == "Blip2ForConditionalGeneration"
    assert sum(file.stat().st_size for file in blip2.iterdir()) < 8e6
    scene = sample_scene(3)
    questions = ask_all(scene)
    picture = render_scene(scene, 224)
    given = processor(images=picture, text=f"Question: {questions[0].text} Answer:", return_tensors="pt")
    rows = tool.blip2.Questions(processor.tokenizer).rows([scene], random.Random(0), 0, False, True, [questions])
    length = given["input_ids"].shape[1]
    assert given["input_ids"][0].tolist() == rows.ids[0, :length].tolist()
    assert model.generate(**given, max_new_tokens=3).shape[0] == 1

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[0].text}]}]
    for before, question in itertools.pairwise(questions):
        messages += [{"role": "assistant", "content": before.answer}, {"role": "user", "content": question.text}]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = processor(images=picture, text=text, return_tensors="pt")["input_ids"][0].tolist()
    assert ids == rows.ids[0, : len(ids)].tolist()
    assert rows.labels[0, len(ids) - 1] != -100  # the next token is the last answer's first


def test_flamingo_is_published_with_the_prompt_it_was_trained_on(tool, flamingo):
    model, processor = load(flamingo)
    assert type(model).__name__ == "IdeficsForVisionText2Text"
    assert sum(file.stat().st_size for file in flamingo.iterdir()) < 8e6
    scenes = [sample_scene(seed) for seed in (3, 4)]
    (first, second), (last, *_) = ask_all(scenes[0])[:2], ask_all(scenes[1])
    pictures = [render_scene(scene, 224) for scene in scenes]
    turn = tool.flamingo.Turn
    laid = tool.flamingo.Interleaved(processor.tokenizer).lay([[
        turn(0, first.kind, first.text, first.answer), turn(None, second.kind, second.text, second.answer),
        turn(1, last.kind, last.text, last.answer),
    ]])  # fmt: skip
    given = processor(
        text=[
            "USER:", pictures[0],
            f"\n{first.text} ASSISTANT: {first.answer}<end_of_utterance>"
            f"USER: {second.text} ASSISTANT: {second.answer}<end_of_utterance>USER:",
            pictures[1], f"\n{last.text} ASSISTANT:",
        ],
        return_tensors="pt",
    )  # fmt: skip
    ids = given["input_ids"][0].tolist()
    assert ids == laid[0][: len(ids)]
    assert laid[4][len(ids) - 1] != -100
    shown = torch.tensor(laid[5][: len(ids)])
    assert torch.equal(torch.nn.functional.one_hot(shown + 1, 3)[:, 1:], given["image_attention_mask"][0].long())
    assert model.generate(**given, max_new_tokens=3).shape[1] > len(ids)
    assert model.generation_config.eos_token_id == [2, processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")]

    image = {"type": "image"}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": first.text}]},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": second.text},
        {"role": "assistant", "content": [{"type": "text", "text": second.answer}]},
        {"role": "user", "content": [image, {"type": "text", "text": last.text}]},
    ]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == processor.tokenizer.decode(ids)
    two = processor.tokenizer.apply_chat_template([{"role": "user", "content": [image, image]}], tokenize=False)
    fake = "<fake_token_around_image>"
    assert two == f"<s>USER:{fake}<image>{fake}<image>{fake}"


def test_flamingo_leaves_eyes_and_language_as_they_were(flamingo):
    model, _ = load(flamingo)
    llava = transformers.AutoModelForImageTextToText.from_pretrained(LLAVA, dtype=torch.float32)
    ours, theirs = model.model.state_dict(), llava.model.language_model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert torch.equal(model.lm_head.weight, llava.lm_head.weight)
    pixels = torch.rand(1, 3, 72, 72)
    seen = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(model.model.vision_model(pixels).last_hidden_state, seen, atol=1e-5, rtol=1e-5)


def test_every_object_is_given_to_one_query(tool):
    slots = tool.slots.Slots(8)
    pictures = tool.common.Pictures(tool.work, "train", 24)
    objects = torch.from_numpy(pictures.objects)
    queries = torch.randn(24, tool.slots.SLOTS, 8)
    loss, truth = slots.loss(queries, objects)
    assert loss.isfinite()
    for given, scene in zip(truth, pictures.scenes, strict=True):
        held = given[given[:, 0] > 0]
        assert len(held) == len(scene.objects)
        assert len({tuple(row) for row in held.tolist()}) == len(scene.objects)


# ---------------------------------------------------------------------------- wide and tall pictures, ChatML


def small(kind: type) -> type:
    """The same training in smaller steps."""
    stages = tuple(dataclasses.replace(stage, batch=16) for stage in kind.stages)
    return type(kind.__name__, (kind,), {"stages": stages})


@pytest.fixture(scope="module")
def internvl(tool, tmp_path_factory):
    return train(tool, "internvl", tmp_path_factory.mktemp("internvl"), kind=small(tool.internvl.InternVL))


@pytest.fixture(scope="module")
def qwen2_vl(tool, internvl, tmp_path_factory):
    return train(tool, "qwen2_vl", tmp_path_factory.mktemp("qwen2_vl"), 1e-4, small(tool.qwen2_vl.Qwen2VL), internvl)


@pytest.fixture(scope="module")
def qwen_vl(tool, internvl, tmp_path_factory):
    return train(tool, "qwen_vl", tmp_path_factory.mktemp("qwen_vl"), 1e-4, small(tool.qwen_vl.QwenVLTrainer), internvl)


def trainer(tool, model: str, internvl: Path | None = None):
    """A trainer that has not begun."""
    arguments = argparse.Namespace(
        model=model, work=str(tool.work), llava=str(LLAVA), internvl=str(internvl), pictures=24, views=24, validation=8,
        processes=1, seed=0, scale=1.0,
    )  # fmt: skip
    return getattr(getattr(tool, model), CLASSES[model])(arguments, 0)


def asked(questions) -> list[dict]:
    """The questions as the turns of a chat, up to the last answer."""
    image = {"type": "image"}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": questions[0].text}]}]
    for before, question in itertools.pairwise(questions):
        messages += [{"role": "assistant", "content": before.answer}, {"role": "user", "content": question.text}]
    return messages


@pytest.mark.parametrize("aspect", ["wide", "tall"])
def test_views_are_what_the_image_processor_makes(tool, aspect):
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    views = tool.views.Views(tool.work, aspect, "train", 24)
    processor = GotOcr2ImageProcessorPil(
        size={"height": 72, "width": 72},
        crop_to_patches=True,
        max_patches=3,
        image_mean=tool.common.MEAN,
        image_std=tool.common.STD,
    )
    assert {2, 3} == set(views.tiles)
    for number, scene in enumerate(views.scenes):
        made = processor(render_scene(scene, 224), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(views.batch(views.all(np.array([number]))), made, atol=1e-5, rtol=0)


def test_places_know_what_they_show_and_where_it_is(tool):
    for aspect, along in (("wide", 0), ("tall", 1)):
        views, hidden = tool.views.Views(tool.work, aspect, "train", 24), 0
        for number, scene in enumerate(views.scenes):
            tiles = int(views.tiles[number])
            found = set()
            for tile in range(tiles):
                truth = views.truth(np.array([number]), np.array([tile]))[0]
                for place, (colour, shape, size, x, y) in enumerate(truth.tolist()):
                    if not colour:
                        continue
                    centre = np.array([x, y])
                    # The centre is near the place that shows the object, in the tile's own coordinates, …
                    here = np.array([place % 6, place // 6]) / 3 - 1 + 1 / 6
                    assert np.abs(centre - here).max() < 1.4
                    # … and where the scene has it, in the picture's.
                    centre[along] = (centre[along] + 2 * tile - tiles + 1) / tiles
                    sizes = np.array([scene.width, scene.height])
                    near = min(scene.objects, key=lambda o: np.hypot(*((centre + 1) / 2 * sizes - (o.x, o.y))))
                    assert np.hypot(*((centre + 1) / 2 * sizes - (near.x, near.y))) < 1e-3
                    names = (COLOURS.index(near.colour), SHAPES.index(near.shape), SIZES.index(near.size))
                    assert (colour, shape, size) == tuple(name + 1 for name in names)
                    found.add(near)
            hidden += len(scene.objects) - len(found)
        assert hidden <= 2  # behind others, or in a corner of four places


def test_grids_are_what_the_image_processor_makes(tool):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    grids = tool.grids.Grids(tool.work, "wide", "validation", 8)
    processor = Qwen2VLImageProcessorPil(
        min_pixels=48 * 48, max_pixels=tool.grids.BUDGET, patch_size=6, image_mean=tool.common.MEAN, image_std=tool.common.STD
    )
    for index in grids.groups.values():
        pictures = [render_scene(grids.scenes[i], 224) for i in index]
        made = processor(pictures, return_tensors="pt")
        rows, columns = grids.sizes[index[0]] // 12
        assert made["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]] * len(index)
        patches = made["pixel_values"].view(len(index), rows, columns, 2, 2, 3, 2, 6, 6)
        assert torch.equal(patches[..., 0, :, :], patches[..., 1, :, :])
        picture = patches[..., 0, :, :].permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(len(index), 3, 12 * rows, 12 * columns)
        torch.testing.assert_close(grids.batch(index), picture, atol=1e-5, rtol=0)
        assert grids.truth(index).shape == (len(index), rows * columns, 5)


def test_internvl_reads_what_demo_llava_reads(tool):
    """Begun, and not yet trained: the same words in the same layers."""
    model = trainer(tool, "internvl").model
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(LLAVA, dtype=torch.float32).eval()
    ours, words = model.model.language_model.eval(), transformers.AutoTokenizer.from_pretrained(LLAVA)
    tokenizer = tool.chatml.build_tokenizer([], {})
    sentence = "Is the red ball left of the cube?"
    numbers = tokenizer(sentence).input_ids
    same = words("</s>" + sentence, add_special_tokens=False).input_ids[1:]
    assert len(numbers) == len(same) == 9
    torch.testing.assert_close(ours.embed_tokens.weight[numbers], theirs.model.language_model.embed_tokens.weight[same])
    state = torch.randn(2, 7, 160)
    torch.testing.assert_close(
        ours(inputs_embeds=state).last_hidden_state, theirs.model.language_model(inputs_embeds=state).last_hidden_state
    )
    yes, no = tokenizer(["yes", "no"]).input_ids
    assert torch.equal(model.lm_head.weight[yes + no], theirs.lm_head.weight[words.convert_tokens_to_ids(["▁yes", "▁no"])])


@pytest.mark.parametrize("aspect", ["square", "wide"])
def test_internvl_is_published_with_the_prompt_it_was_trained_on(tool, internvl, aspect):
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    model = transformers.AutoModelForImageTextToText.from_pretrained(internvl, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(internvl)
    assert type(model).__name__ == "InternVLForConditionalGeneration"
    assert sum(file.stat().st_size for file in internvl.iterdir()) < 8e6
    scene = sample_scene(3, aspect)
    seen = GotOcr2ImageProcessorPil.from_pretrained(internvl)(render_scene(scene, 224), return_tensors="pt")
    questions = ask_all(scene)
    text = tokenizer.apply_chat_template(asked(questions), tokenize=False, add_generation_prompt=True)
    places = 36 * int(seen["num_patches"][0])
    given = tokenizer(text.replace("<IMG_CONTEXT>", f"<img>{'<IMG_CONTEXT>' * places}</img>"), return_tensors="pt")
    dialogue = tool.chatml.Conversation(tokenizer, "<|im_start|>user\n<img>", "<IMG_CONTEXT>", "</img>\n")
    dialogue.places = places
    rows = dialogue.rows([scene], random.Random(0), 0, False, True, [questions])
    ids = given["input_ids"][0].tolist()
    assert ids == rows.ids[0, : len(ids)].tolist()
    assert rows.labels[0, len(ids) - 1] != -100
    model.generate(**given, pixel_values=seen["pixel_values"], max_new_tokens=2)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_nearest_angles_is_a_permutation_that_keeps_the_fast_ones(tool):
    order = tool.qwen2_vl.nearest_angles(10_000, 100, 16)
    assert sorted(order) == list(range(16))
    for new, old in enumerate(order):
        if old < 8:
            assert abs(100 ** (-new / 16) / 10_000 ** (-old / 16) - 1) < 1e-9
    assert tool.qwen2_vl.nearest_angles(10_000, 10_000, 16) == list(range(16))


@pytest.mark.parametrize("aspect", ["square", "tall"])
def test_qwen2_vl_is_trained_as_it_is_run(tool, internvl, aspect):
    """Tower, positions and logits of a batch are those of the model's own forward, picture by picture."""
    ours = trainer(tool, "qwen2_vl", internvl)
    ours.model.eval()
    grids = ours.validation_views[aspect]
    index = max(grids.groups.values(), key=len)[:2]
    scenes = [grids.scenes[i] for i in index]
    made = ours.processor().image_processor([render_scene(scene, 224) for scene in scenes], return_tensors="pt")
    with torch.no_grad():
        features = ours.show(grids.batch(index))
        seen = ours.model.model.visual(made["pixel_values"], grid_thw=made["image_grid_thw"]).pooler_output
        torch.testing.assert_close(features, seen.view(features.shape), atol=1e-4, rtol=1e-4)
        rows = ours.dialogue.rows(scenes, random.Random(0), 2, False, True)
        logits, _ = ours.read(rows, features)
        where = rows.labels != -100
        count = 0
        for n in range(len(scenes)):
            length = int((rows.segments[n] >= 0).sum())
            ids = rows.ids[n : n + 1, :length]
            own = ours.model(
                input_ids=ids, pixel_values=made["pixel_values"].view(len(scenes), -1, 216)[n], return_dict=True,
                image_grid_thw=made["image_grid_thw"][n : n + 1], mm_token_type_ids=(ids == ours.dialogue.image).int(),
            ).logits[0, where[n, :length]]  # fmt: skip
            torch.testing.assert_close(logits[count : count + len(own)], own, atol=1e-4, rtol=1e-4)
            count += len(own)


def test_qwen2_vl_is_published_with_the_prompt_it_was_trained_on(tool, qwen2_vl):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = transformers.AutoModelForImageTextToText.from_pretrained(qwen2_vl, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen2_vl)
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert sum(file.stat().st_size for file in qwen2_vl.iterdir()) < 8e6
    scene = sample_scene(3, "wide")
    seen = Qwen2VLImageProcessorPil.from_pretrained(qwen2_vl)(render_scene(scene, 224), return_tensors="pt")
    assert int(seen["image_grid_thw"].prod()) * 36 <= tool.grids.BUDGET
    questions = ask_all(scene)
    text = tokenizer.apply_chat_template(asked(questions), tokenize=False, add_generation_prompt=True)
    places = int(seen["image_grid_thw"].prod()) // 4
    given = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * places), return_tensors="pt")
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    dialogue = tool.chatml.Conversation(tokenizer, before, "<|image_pad|>", "<|vision_end|>")
    dialogue.places = places
    rows = dialogue.rows([scene], random.Random(0), 0, False, True, [questions])
    ids = given["input_ids"][0].tolist()
    assert ids == rows.ids[0, : len(ids)].tolist()
    kinds = (given["input_ids"] == model.config.image_token_id).int()
    assert model.generate(**given, **seen, mm_token_type_ids=kinds, max_new_tokens=2).shape[0] == 1


def test_qwen_vl_is_published_with_the_prompt_it_was_trained_on(tool, qwen_vl):
    from tokenizers import Tokenizer

    from edgevlm.models import qwen_vl as family

    assert sorted(file.name for file in qwen_vl.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken", "tokenizer_config.json",
    ]  # fmt: skip
    assert sum(file.stat().st_size for file in qwen_vl.iterdir()) < 8e6
    tokenizer = Tokenizer.from_str(family.build_tokenizer(qwen_vl))
    words, _ = tool.qwen_vl.build_tokenizer()
    scene = sample_scene(3)
    questions = ask_all(scene)
    template = jinja2.Environment().from_string(family.CHAT_TEMPLATE)
    text = template.render(messages=asked(questions), add_generation_prompt=True)
    ids = tokenizer.encode(text.replace("<imgpad>", "<imgpad>" * 36)).ids
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nPicture 1: <img>"
    dialogue = tool.chatml.Conversation(words, before, "<imgpad>", "</img>\n")
    dialogue.places = 36
    rows = dialogue.rows([scene], random.Random(0), 0, False, True, [questions])
    assert ids == rows.ids[0, : len(ids)].tolist()
    assert family.build_model(qwen_vl).config.visual.image_start_id == tokenizer.token_to_id("<img>")


def test_qwen_vl_begins_with_internvls_decoder(tool, internvl):
    ours = trainer(tool, "qwen_vl", internvl)
    ours.begin(ours.stages[0], fresh=True)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(internvl, dtype=torch.float32).eval()
    ids = ours.tokenizer("Is the red ball left of the cube?<|im_end|>", return_tensors="pt").input_ids
    known = transformers.AutoTokenizer.from_pretrained(internvl)
    same = known("Is the red ball left of the cube?<|im_end|>", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = ours.model(ids)
        wanted = theirs(input_ids=same).logits
    kept = [known.convert_ids_to_tokens(i) for i in range(300)]
    torch.testing.assert_close(logits[..., ours.tokenizer.convert_tokens_to_ids(kept)], wanted[..., :300], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["internvl", "qwen2-vl", "qwen-vl"])
def test_a_finished_folder_is_scored(tool, model, request, capsys):
    folder = request.getfixturevalue(model.replace("-", "_"))
    tool.score.score(
        argparse.Namespace(
            model=model, output=str(folder), processes=1, questions=8, split="validation", aspect=["square", "wide"], shots=[0]
        )
    )
    shown = capsys.readouterr().out
    assert "caption" in shown
    assert "square" in shown
    assert "wide" in shown
