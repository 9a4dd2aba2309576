"""Scores a finished folder on held-out questions: transformers' own processor, model and greedy `generate`, in float32.

Nothing of the training code is used, so a prompt that was trained in another form than the processor builds would show.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from edgevlm.evaluate import worked_examples
from edgevlm.scenes import KINDS, Question, Scene, heldout_questions, render_scene

CAMERA = 224
Example = tuple[Scene, Question]


def inputs(model: str, processor: Any, batch: list[Example], examples: list[list[Example]]) -> Any:
    pictures = [render_scene(scene, CAMERA) for scene, _ in batch]
    if model == "flamingo":
        prompts = []
        for (_, question), picture, before in zip(batch, pictures, examples, strict=True):
            prompt: list[Any] = ["USER:"]
            for scene, shown in before:
                prompt += [render_scene(scene, CAMERA), f"\n{shown.text} ASSISTANT: {shown.answer}<end_of_utterance>USER:"]
            prompts.append([*prompt, picture, f"\n{question.text} ASSISTANT:"])
        return processor(text=prompts, return_tensors="pt")
    form = {"llava": "USER: <image>\n{} ASSISTANT:", "blip2": "Question: {} Answer:"}[model]
    texts = [form.format(question.text) for _, question in batch]
    return processor(images=pictures, text=texts, padding=True, return_tensors="pt")


@torch.inference_mode()
def score(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.processes)
    processor = AutoProcessor.from_pretrained(arguments.output)
    model = AutoModelForImageTextToText.from_pretrained(arguments.output, dtype=torch.float32).eval()
    questions = list(heldout_questions(arguments.questions, arguments.split))
    # Neighbours are of nearly the same length anyway; captions are so much longer that they go together.
    order = sorted(range(len(questions)), key=lambda i: (questions[i][1].kind == "caption", i))
    columns = {}
    for shots in arguments.shots:
        began, right = time.monotonic(), {kind: [0, 0] for kind in KINDS}
        for first in range(0, len(order), 50):
            chosen = order[first : first + 50]
            batch = [questions[i] for i in chosen]
            given = inputs(arguments.model, processor, batch, [worked_examples(i, shots) for i in chosen])
            tokens = model.generate(**given, max_new_tokens=48, do_sample=False)
            tokens = tokens[:, given["input_ids"].shape[1] :]
            for (_, question), answer in zip(batch, processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
                right[question.kind][0] += answer.strip() == question.answer
                right[question.kind][1] += 1
        scores = {kind: 100 * hits / count for kind, (hits, count) in right.items() if count}
        scores["all"] = 100 * sum(hits for hits, _ in right.values()) / len(questions)
        columns[shots] = scores
        print(f"{shots} shots: {time.monotonic() - began:.0f} s", flush=True)
    print("exact match %".ljust(14) + "".join(f"{shots} shots".rjust(10) for shots in columns))
    for kind in (*KINDS, "all"):
        print(kind.ljust(14) + "".join(f"{scores.get(kind, float('nan')):10.1f}" for scores in columns.values()))
