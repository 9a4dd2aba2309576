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
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgevlm.scenes import ask_all, render_scene, sample_scene

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
LLAVA = ROOT / "edgevlm/assets/demo/llava"
CLASSES = {"llava": "Llava", "blip2": "Blip2", "flamingo": "Flamingo"}


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    """The tool's modules, and twenty-four drawn pictures. One thread: beside other tests, two wait for each other."""
    names = ("common", "slots", "score", *CLASSES)
    threads, count = torch.get_num_threads(), os.cpu_count
    os.cpu_count = lambda: 1
    sys.path.insert(0, str(ROOT / "tools/train_demo"))
    try:
        modules = {name: importlib.import_module(name) for name in names}
        work = tmp_path_factory.mktemp("pictures")
        for split, number in (("train", 24), ("validation", 8)):
            modules["common"].Pictures.draw(work, split, number, 1)
        modules["llava"].build_tokenizer = functools.cache(modules["llava"].build_tokenizer)  # three trainings, one tokenizer
        yield SimpleNamespace(work=work, **modules)
    finally:
        sys.path.remove(str(ROOT / "tools/train_demo"))
        for name in names:
            sys.modules.pop(name, None)
        os.cpu_count = count
        torch.set_num_threads(threads)


def train(tool, model: str, folder: Path, scale: float = 1e-4, kind: type | None = None) -> Path:
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    for path in tool.work.glob("*.npy"):
        if not (work / path.name).exists():
            (work / path.name).symlink_to(path)
    arguments = argparse.Namespace(
        model=model, work=str(work), output=str(folder / "out"), llava=str(LLAVA), pictures=24, validation=8, processes=1,
        seed=0, scale=scale,
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
