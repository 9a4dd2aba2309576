"""Scores a finished folder on held-out questions: transformers' own processor, model and greedy `generate`, in float32.

Nothing of the training code is used, so a prompt that was trained in another form than the processor builds would show.
Where a processor needs torchvision, its image processor and its chat template are used, and the places of a picture are
counted as the model's documentation says. The first Qwen-VL is none of transformers' models: there it is this project's
modules and the tokenizer and the template that an export makes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from edgevlm.evaluation.scene_scores import worked_examples
from edgevlm.scenes import KINDS, Question, Scene, heldout_questions, render_scene

CAMERA = 224
LONGEST = 48  # tokens of an answer
Example = tuple[Scene, Question]
#: Examples to be asked, and for each the worked examples before it, to answers.
Answer = Callable[[list[Example], list[list[Example]]], list[str]]


def with_processor(folder: str, name: str) -> Answer:
    """LLaVA, BLIP-2 and Flamingo, whose processors can be built anywhere."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def inputs(batch: list[Example], examples: list[list[Example]]) -> Any:
        pictures = [render_scene(scene, CAMERA) for scene, _ in batch]
        if name == "flamingo":
            prompts = []
            for (_, question), picture, before in zip(batch, pictures, examples, strict=True):
                prompt: list[Any] = ["USER:"]
                for scene, shown in before:
                    prompt += [render_scene(scene, CAMERA), f"\n{shown.text} ASSISTANT: {shown.answer}<end_of_utterance>USER:"]
                prompts.append([*prompt, picture, f"\n{question.text} ASSISTANT:"])
            return processor(text=prompts, return_tensors="pt")
        form = {"llava": "USER: <image>\n{} ASSISTANT:", "blip2": "Question: {} Answer:"}[name]
        texts = [form.format(question.text) for _, question in batch]
        return processor(images=pictures, text=texts, padding=True, return_tensors="pt")

    def answer(batch: list[Example], examples: list[list[Example]]) -> list[str]:
        given = inputs(batch, examples)
        tokens = model.generate(**given, max_new_tokens=LONGEST, do_sample=False)
        return list(processor.batch_decode(tokens[:, given["input_ids"].shape[1] :], skip_special_tokens=True))

    return answer


def turns(question: Question) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]


def with_places(folder: str, name: str) -> Answer:
    """InternVL and Qwen2-VL: the template's one token of a picture becomes as many as the picture has places."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    if name == "internvl":
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil as ImageProcessor

        token, (before, after) = "<IMG_CONTEXT>", ("<img>", "</img>")
    else:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as ImageProcessor

        token, (before, after) = "<|image_pad|>", ("", "")
    images = ImageProcessor.from_pretrained(folder)

    def answer(batch: list[Example], examples: list[list[Example]]) -> list[str]:
        seen = images([render_scene(scene, CAMERA) for scene, _ in batch], return_tensors="pt")
        if name == "internvl":
            places = [int(tiles) * model.config.image_seq_length for tiles in seen.pop("num_patches")]
        else:
            places = [int(grid.prod()) // images.merge_size**2 for grid in seen["image_grid_thw"]]
        texts = []
        for (_, question), count in zip(batch, places, strict=True):
            text = tokenizer.apply_chat_template(turns(question), tokenize=False, add_generation_prompt=True)
            texts.append(text.replace(token, before + token * count + after))
        given = tokenizer(texts, padding=True, return_tensors="pt")
        if name == "qwen2-vl":
            given["mm_token_type_ids"] = (given["input_ids"] == model.config.image_token_id).int()
        tokens = model.generate(**given, **seen, max_new_tokens=LONGEST, do_sample=False)
        return list(tokenizer.batch_decode(tokens[:, given["input_ids"].shape[1] :], skip_special_tokens=True))

    return answer


def with_modules(folder: str, name: str) -> Answer:
    """The first Qwen-VL."""
    import numpy as np
    from PIL import Image
    from safetensors.torch import load_file

    from edgevlm.models import qwen_vl

    tokenizer = Tokenizer.from_str(qwen_vl.build_tokenizer(Path(folder)))
    model = qwen_vl.build_model(Path(folder)).eval()
    model.load_state_dict({key: value.float() for key, value in load_file(Path(folder) / "model.safetensors").items()})
    template = Environment().from_string(qwen_vl.CHAT_TEMPLATE)
    visual = model.config.visual
    ends = {tokenizer.token_to_id(token) for token in (qwen_vl.END, qwen_vl.START, qwen_vl.END_OF_TEXT)}

    def answer(batch: list[Example], examples: list[list[Example]]) -> list[str]:
        pixels = []
        for scene, _ in batch:
            picture = render_scene(scene, CAMERA).resize((visual.image_size, visual.image_size), Image.Resampling.BICUBIC)
            pixels.append((np.asarray(picture, np.float32) / 255 - qwen_vl.IMAGE_MEAN) / qwen_vl.IMAGE_STD)
        features = model.encode_images(torch.from_numpy(np.stack(pixels)).float().permute(0, 3, 1, 2))
        texts = [template.render(messages=turns(question), add_generation_prompt=True) for _, question in batch]
        rows = [tokenizer.encode(text.replace("<imgpad>", "<imgpad>" * visual.places)).ids for text in texts]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        said: list[list[int]] = [[] for _ in rows]
        running, states = set(range(len(rows))), model.embed(ids, features)
        while running and max(map(len, said)) < LONGEST:
            logits = model(inputs_embeds=states, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
            chosen = logits[:, -1].argmax(-1)
            states = torch.cat([states, model.transformer.wte(chosen)[:, None]], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            for row in list(running):
                if int(chosen[row]) in ends:
                    running.remove(row)
                else:
                    said[row].append(int(chosen[row]))
        return list(tokenizer.decode_batch(said))

    return answer


FORMS = {"internvl": with_places, "qwen2-vl": with_places, "qwen-vl": with_modules}


@torch.inference_mode()
def score(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.processes)
    answer = FORMS.get(arguments.model, with_processor)(arguments.output, arguments.model)
    columns = {}
    for aspect in arguments.aspect:
        questions = list(heldout_questions(arguments.questions, arguments.split, aspect))
        # Neighbours are of nearly the same length anyway; captions are so much longer that they go together.
        order = sorted(range(len(questions)), key=lambda i: (questions[i][1].kind == "caption", i))
        for shots in arguments.shots:
            began, right = time.monotonic(), {kind: [0, 0] for kind in KINDS}
            for first in range(0, len(order), 50):
                chosen = order[first : first + 50]
                batch = [questions[i] for i in chosen]
                answers = answer(batch, [worked_examples(i, shots) for i in chosen])
                for (_, question), given in zip(batch, answers, strict=True):
                    right[question.kind][0] += given.strip() == question.answer
                    right[question.kind][1] += 1
            scores = {kind: 100 * hits / count for kind, (hits, count) in right.items() if count}
            scores["all"] = 100 * sum(hits for hits, _ in right.values()) / len(questions)
            name = f"{shots} shots" if len(arguments.shots) > 1 else aspect
            columns[name] = scores
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    print("exact match %".ljust(14) + "".join(name.rjust(10) for name in columns))
    for kind in (*KINDS, "all"):
        print(kind.ljust(14) + "".join(f"{scores.get(kind, float('nan')):10.1f}" for scores in columns.values()))
