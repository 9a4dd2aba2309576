"""BLIP-2's and InstructBLIP's prompts against their processors, and T5's buckets against transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from asking import image_part, picture, prompts_of, text_part, user
from tinies import Tiny

from edgevlm.errors import PromptError, UnsupportedModelError
from edgevlm.models import blip2

pytest.importorskip("torch")
import torch

A, B = picture(1), picture(2, 30, 64)
NAMES = ["blip2-opt", "blip2-t5-tied", "instructblip-llama"]  # each with another tokenizer
TEXTS = [
    "", " ", "How many cubes are there?", "  in front and behind  ", "a\n\nb\n", "\tx", "Où est l'étoile — 左? 🤖",
    "e\u0301 \u00e9 \u00a0 \u2003 \ufeff \u200b", "UPPER lower MiXeD", "a</s>b", "x<s><unk><pad>", "x</s></s>", 
    "<extra_id_0> [SEP][CLS] [DEC]",
    "Question: how many? Answer:", "word " * 10,
]  # fmt: skip


@lru_cache(maxsize=4)
def processor_of(checkpoint: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_processors(tiny: Callable[[str], Tiny], name: str, text: str) -> None:
    checkpoint = tiny(name).checkpoint
    theirs = processor_of(checkpoint)(text=text, images=[A], return_tensors="np")
    build, queries = prompts_of(checkpoint), tiny(name).tiny.queries
    asked = [build(text, [A]), build([A, text])]
    if text:
        asked += [build([text, A]), build([text[:3], A, text[3:]])]  # the picture is in front wherever it was given
    for prompt in asked:
        assert prompt.ids == theirs["input_ids"][0].tolist()
        assert prompt.places == ((0, queries),)
        assert prompt.sees is None
        assert list(prompt.instruction) == theirs.get("qformer_input_ids", [[]])[0].tolist() if "instruct" in name else True
        assert bool(prompt.instruction) == ("instruct" in name)


@pytest.mark.parametrize(("name", "bos"), [("blip2-opt", "</s>"), ("instructblip-llama", "<s>")])
def test_a_text_that_begins_with_its_bos_gets_no_second_one(tiny: Callable[[str], Tiny], name: str, bos: str) -> None:
    build = prompts_of(tiny(name).checkpoint)
    assert build(f"{bos}How many?", [A]).ids.count(build("", [A]).ids[-1]) == 1


@pytest.mark.parametrize("name", ["blip2-opt", "instructblip-llama"])
def test_checkpoints_without_an_image_token_have_the_same_places(tiny: Callable[[str], Tiny], name: str) -> None:
    new, old = (prompts_of(tiny(form).checkpoint) for form in (name, f"{name}-published"))
    queries = tiny(name).tiny.queries
    for text in TEXTS:
        ours, theirs = old(text, [A]), new(text, [A])
        assert ours.places == theirs.places == ((0, queries),)
        assert ours.ids == [-1] * queries + theirs.ids[queries:]
        assert ours.instruction == theirs.instruction
    assert old("what is <image>?", [A]).ids[queries:], "where there is no such token, it is text"


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-opt-published", "instructblip-llama"])
@pytest.mark.parametrize("images", [[], [A, B], [A, A, A]], ids=len)
def test_there_is_one_picture(tiny: Callable[[str], Tiny], name: str, images: list[Any]) -> None:
    build = prompts_of(tiny(name).checkpoint)
    for asked in ({"prompt": "How many?", "images": images}, {"prompt": [*images, "How many?"]}):
        with pytest.raises(PromptError, match=f"one picture.*; {len(images)} were given"):
            build(**asked)


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5-tied", "instructblip-llama"])
@pytest.mark.parametrize("text", ["<image>", "what is <image>?", "a<image>b<image>"])
def test_an_image_token_in_the_text_is_refused(tiny: Callable[[str], Tiny], name: str, text: str) -> None:
    with pytest.raises(PromptError, match=r"image token <image>.*leave the token out"):
        prompts_of(tiny(name).checkpoint)(text, [A])


def test_a_chat_needs_a_template(tiny: Callable[[str], Tiny]) -> None:
    chat = [user(image_part(A), text_part("How many?"))]
    checkpoint = tiny("blip2-opt").checkpoint
    assistant = {"role": "assistant", "content": "two"}
    for more in ([*chat, assistant], [*chat, assistant, user(text_part("Sure?"))], [{"role": "system", "content": "x"}, *chat]):
        with pytest.raises(PromptError, match="no chat template"):
            prompts_of(checkpoint)(messages=more)
    assert prompts_of(checkpoint)(messages=chat) == prompts_of(checkpoint)("How many?", [A]), "a single turn is no chat"
    template = "{% for m in messages %}Question: {% for p in m.content %}{{ p.text }}{% endfor %} Answer:{% endfor %}"
    templated, plain = prompts_of(checkpoint, template), prompts_of(checkpoint)
    wanted = plain("Question: How many? Answer:", [A])
    assert templated(messages=chat) == templated("How many?", [A]) == templated([A, "How many?"]) == wanted


def test_the_instruction_may_be_as_long_as_the_qformer_reads(tiny: Callable[[str], Tiny]) -> None:
    build = prompts_of(tiny("instructblip-llama").checkpoint)
    most = 64
    words = most - len(build("", [A]).instruction)
    assert len(build("cubes " * words, [A]).instruction) == most
    with pytest.raises(PromptError, match=f"{most + 1} tokens for the Q-Former, which reads {most}"):
        build("cubes " * (words + 1), [A])


# ----------------------------------------------------------------------------------------------- buckets


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 8), (7, 9), (32, 20), (6, 100), (64, 1000)])
def test_buckets_from_a_table_are_transformers_own(decoder: bool, buckets: int, longest: int) -> None:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        d_model=8, d_kv=2, num_heads=4, relative_attention_num_buckets=buckets, relative_attention_max_distance=longest,
        is_decoder=decoder,
    )  # fmt: skip
    attention: Any = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    reach = 20 * longest + 3
    distances = torch.arange(-reach, reach + 1)
    options = {"bidirectional": not decoder, "num_buckets": buckets, "max_distance": longest}
    wanted = attention._relative_position_bucket(distances, **options)
    for _ in range(2):  # a second time changes nothing
        blip2._fix_buckets(attention)
        assert torch.equal(attention._relative_position_bucket(distances, **options), wanted)
        square = distances[:36].view(6, 6)
        assert torch.equal(attention._relative_position_bucket(square, **options), wanted[:36].view(6, 6))
    assert int(wanted.max()) < buckets
    assert "edgevlm_buckets" not in attention.state_dict()


# ------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_config": {"model_type": "gpt2"}}, "'gpt2'.*opt, t5"),
        ({"text_config": {"model_type": "opt", "word_embed_proj_dim": 64, "hidden_size": 56}}, "64 wide"),
        ({"text_config": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}}, "dynamic"),
        ({"num_query_tokens": 0}, "num_query_tokens = 0"),
        ({"num_query_tokens": "many"}, "num_query_tokens = 'many'"),
    ],
)
def test_configurations_that_are_not_covered(change: dict[str, Any], said: str) -> None:
    for model_type in ("opt", "t5", "llama", "mistral", "qwen2"):
        blip2.check_config({"text_config": {"model_type": model_type}})
    blip2.check_config({})
    with pytest.raises(UnsupportedModelError, match=said):
        blip2.check_config(change)
