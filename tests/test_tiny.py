"""The tiny checkpoints are what they say: Transformers loads each and answers, and the answer depends on the picture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tinies import Tiny
from tiny import BLIP2S, FLAMINGOS, INSTRUCTBLIPS, LLAVAS, TinyFlamingo, TinyLlava, load_tiny
from traces import remembering

pytest.importorskip("transformers")

EVERY = [*LLAVAS, *BLIP2S, *INSTRUCTBLIPS, *FLAMINGOS]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))
RED = Image.new("RGB", (40, 33), (200, 30, 10))
QUESTION = "How many cubes are there? Answer:"


def asked(tiny: Any, processor: Any, *images: Image.Image) -> Any:
    """The inputs of the model for a question after `images`."""
    if isinstance(tiny, TinyFlamingo):
        return processor(text=[[*images, QUESTION]], return_tensors="pt")
    places = "<image>" * len(images) if isinstance(tiny, TinyLlava) else ""
    return processor(images=list(images), text=places + QUESTION, return_tensors="pt")


def logits_of(model: Any, inputs: Any) -> np.ndarray:
    """[8, vocabulary], greedy."""
    tokens = {"max_new_tokens": 8, "min_new_tokens": 8}
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    done = model.generate(**inputs.to(model.dtype), do_sample=False, **tokens, **wanted)
    return np.stack([step[0].float().numpy() for step in done.logits])


@pytest.mark.parametrize("name", [one.name for one in EVERY])
def test_transformers_loads_it_and_the_answer_depends_on_the_picture(tiny: Callable[[str], Tiny], name: str) -> None:
    one = tiny(name)
    assert sum(path.stat().st_size for path in one.checkpoint.rglob("*.safetensors")) < 1_000_000
    model, processor = load_tiny(one.checkpoint)
    noise, red = (logits_of(model, asked(one.tiny, processor, image)) for image in (NOISE, RED))
    assert noise.shape == red.shape
    assert len(noise) == 8
    assert np.isfinite(noise).all()
    assert np.abs(noise[0] - red[0]).max() > 0.3


@pytest.mark.parametrize("name", ["blip2-opt", "instructblip-llama"])
def test_the_published_form_means_the_same(tiny: Callable[[str], Tiny], name: str) -> None:
    new, old = (load_tiny(tiny(form).checkpoint) for form in (name, f"{name}-published"))
    np.testing.assert_array_equal(*(logits_of(model, asked(None, processor, RED)) for model, processor in (new, old)))


@pytest.mark.parametrize("name", ["blip2-t5", "blip2-t5-tied"])
def test_t5_reaches_its_last_buckets(tiny: Callable[[str], Tiny], name: str) -> None:
    import torch

    model, processor = load_tiny(tiny(name).checkpoint)
    inputs = asked(None, processor, NOISE)
    plain = logits_of(model, inputs)
    for side in ("encoder", "decoder"):
        bias = getattr(model.language_model, side).block[0].layer[0].SelfAttention.relative_attention_bias.weight
        kept = bias.detach().clone()
        half = len(bias) // 2  # one for each direction in the encoder, so an odd last one is not used there
        for bucket in (half - 1, 2 * half - 1) if side == "encoder" else (len(bias) - 1,):
            with torch.no_grad():
                bias[bucket] += 3
            changed = logits_of(model, inputs)
            assert np.abs(changed - plain).max() > 1e-3, (side, bucket)
            with torch.no_grad():
                bias.copy_(kept)


@pytest.mark.parametrize(("name", "tied"), [("blip2-t5", False), ("blip2-t5-published", False), ("blip2-t5-tied", True)])
def test_heads_of_t5(tiny: Callable[[str], Tiny], name: str, tied: bool) -> None:
    model = load_tiny(tiny(name).checkpoint)[0].language_model
    assert (model.lm_head.weight is model.shared.weight) is tied
    assert model.config.scale_decoder_outputs is tied


@pytest.mark.parametrize("name", [one.name for one in FLAMINGOS])
def test_each_picture_of_flamingo_counts(tiny: Callable[[str], Tiny], name: str) -> None:
    model, processor = load_tiny(tiny(name).checkpoint)
    prompts = [["USER:", first, "and", second, QUESTION] for first, second in [(RED, NOISE), (NOISE, NOISE), (RED, RED)]]
    both = [processor(text=[prompt], return_tensors="pt") for prompt in prompts]
    assert (both[0]["image_attention_mask"][0].sum(1).unique() == both[0]["image_attention_mask"].new([0, 1])).all()
    kept, first, second = (model(**inputs.to(model.dtype)).logits[0].detach().float().numpy() for inputs in both)
    place = both[0]["image_attention_mask"][0].argmax(1).numpy()
    seen = both[0]["image_attention_mask"][0].any(1).numpy()
    np.testing.assert_array_equal(kept[~seen], first[~seen])
    np.testing.assert_array_equal(kept[place == 0], second[place == 0])
    assert np.abs(kept - first).max() > 0.1
    assert np.abs(kept - second).max() > 0.1


def test_a_trace_that_is_kept_is_the_trace(
    tiny: Callable[[str], Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one of another model is none: the last export has another epsilon, which is in no shape and no weight."""
    from edgevlm.export import trace
    from edgevlm.export.export import export_bundle

    made: list[str] = []
    real = trace.trace_part
    monkeypatch.setattr(trace, "trace_part", remembering(lambda fake, spec: made.append(spec.name) or real(fake, spec)))
    checkpoint = Path(shutil.copytree(tiny("clip-llama").checkpoint, tmp_path / "checkpoint"))
    wanted = {path.name: path.read_bytes() for path in (tiny("clip-llama").bundle / "onnx").iterdir()}
    for _ in range(2):
        export_bundle(str(checkpoint), tmp_path / "bundle", force=True)
        assert {path.name: path.read_bytes() for path in (tmp_path / "bundle" / "onnx").iterdir()} == wanted
        before, made[:] = set(made), []
    assert before == set()
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["rms_norm_eps"] = 0.01
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    export_bundle(str(checkpoint), tmp_path / "other")
    assert "decoder" in made
