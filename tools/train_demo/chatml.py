"""What the models of the Qwen kind share: a byte-level tokenizer, ChatML, and demo/llava's decoder to begin with.

A new language model needs thousands of steps before it compares where two things are. demo/llava's can do that, and
its decoder is Qwen2's without biases: layer by layer and word by word it is carried over, and only the frame of the
dialogue, and the eyes in front of it, are new to it.
"""

from __future__ import annotations

import json
import random
from typing import Any

import torch
from common import NOUNS, Dialogue
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from edgevlm.scenes import Scene, ask_all, sample_scene

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SYSTEM = "You are a helpful assistant."


def corpus(scenes: int = 3000) -> list[str]:
    """All that the models will read, so that every word becomes one token."""
    lines = [SYSTEM, "system", "user", "assistant", "Picture"] * 20
    for seed in range(scenes):
        for question in ask_all(sample_scene(seed)):
            lines += [question.text, question.text[0].lower() + question.text[1:], question.answer, f" {question.answer}"]
    return lines


def learn_words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE: 256 bytes, then every word. Qwen cuts text as Qwen2 does."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    return learnt["vocab"], [tuple(pair) for pair in learnt["merges"]]


def build_tokenizer(extra: list[str], named: dict[str, str]) -> Qwen2Tokenizer:
    """Qwen2's tokenizer with a small vocabulary: bytes, words, ChatML's three tokens, and `extra` behind them. `named`:
    those of them that have a name in the tokenizer's configuration."""
    vocabulary, merges = learn_words()
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, unk_token=None, bos_token=None, eos_token=END, pad_token=END_OF_TEXT,
        add_prefix_space=False, extra_special_tokens=named, clean_up_tokenization_spaces=False, padding_side="left",
        model_max_length=2048,
    )  # fmt: skip
    special = [AddedToken(token, special=True, normalized=False) for token in (END_OF_TEXT, START, END, *extra)]
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


class Conversation(Dialogue):
    """A picture and a question in ChatML. `before`: what stands in front of the picture; `after`: behind it.

    `places` is how many places the picture takes, and may be set anew before every batch.
    """

    def __init__(self, tokenizer: Any, before: str, image: str, after: str) -> None:
        super().__init__(tokenizer)
        self.image = tokenizer.convert_tokens_to_ids(image)
        self.open, self.close = self.encode(before), self.encode(after)
        self.nouns = {tokenizer.convert_tokens_to_ids(f"Ġ{noun}") for noun in NOUNS}
        self.places = 0

    @staticmethod
    def _encode(tokenizer: Any, text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def prefix(self, scene: Scene, rng: random.Random, written: bool) -> list[int]:
        return [*self.open, *[self.image] * self.places, *self.close]

    def head(self, text: str, later: bool) -> list[int]:
        begin = f"\n{START}user\n" if later else ""
        return self.encode(f"{begin}{text}{END}\n{START}assistant\n")

    def tail(self, answer: str) -> tuple[list[int], list[int]]:
        tokens = self.encode(answer + END)
        return tokens, tokens

    def insert(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """`[B, S, D]` with the picture's features `[B, places, D]` in their places."""
        start = len(self.open)
        return torch.cat([embeddings[:, :start], features, embeddings[:, start + features.shape[1] :]], 1)


def counterparts(tokenizer: Any, llava: Any, spaced: bool) -> dict[int, int]:
    """Which token of demo/llava's says the same. `spaced`: as where an answer begins, which there has a blank before it."""
    theirs = llava.get_vocab()
    frame = {START: "<s>", END: "</s>", "user": "▁USER", "assistant": "▁ASSISTANT", "Ċ": "\n"}
    found = {}
    for token, number in tokenizer.get_vocab().items():
        word = token.removeprefix("Ġ")
        forms = ["▁" + word, word] if spaced or token != word else [word, "▁" + word]
        same = next((form for form in [frame.get(token, ""), *forms] if form in theirs), None)
        if same is not None:
            found[number] = theirs[same]
    return found


@torch.no_grad()
def borrow_words(tokenizer: Any, llava: Any, source: Any, embeddings: nn.Embedding, head: nn.Linear) -> None:
    """Rows of the embeddings and of the head, word by word. What has no counterpart starts small."""
    for spaced, ours, theirs in (
        (False, embeddings.weight, source.model.language_model.embed_tokens.weight),
        (True, head.weight, source.lm_head.weight),
    ):
        ours.normal_(0, float(theirs.std()) * 0.5)
        pairs = counterparts(tokenizer, llava, spaced)
        ours[list(pairs)] = theirs[list(pairs.values())]


@torch.no_grad()
def borrow_layers(ours: Any, theirs: Any) -> None:
    """demo/llava's decoder, whose layers have the same names; the biases of queries, keys and values start at zero."""
    for parameter in (p for name, p in ours.named_parameters() if name.endswith("bias")):
        parameter.zero_()
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("embed_tokens")}
    lost = ours.load_state_dict(state, strict=False)
    missing = [name for name in lost.missing_keys if not name.endswith("bias") and not name.startswith("embed_tokens")]
    if missing or lost.unexpected_keys:
        raise ValueError(f"this is not the decoder of demo/llava: {missing or lost.unexpected_keys}")


@torch.no_grad()
def borrow_tokens(tokenizer: Any, theirs: Any, renamed: dict[str, str], *tables: tuple[Tensor, Tensor]) -> None:
    """Rows of our and their tables (embeddings and heads), of models that have been taught the same vocabulary; `renamed`:
    what a token is called there. What it has no token for starts small."""
    known = theirs.get_vocab()
    pairs = {n: known[renamed.get(name, name)] for name, n in tokenizer.get_vocab().items() if renamed.get(name, name) in known}
    for ours, weight in tables:
        ours.normal_(0, float(weight.std()) * 0.5)
        ours[list(pairs)] = weight[list(pairs.values())]
