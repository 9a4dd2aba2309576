"""InternVL: tiles as its processor cuts them, places around a picture, and a limit to what a picture may cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import Runs, picture
from PIL import Image
from tinies import Tiny
from tiny import INTERNVLS

pytest.importorskip("torch")

from edgevlm.bundle import Bundle
from edgevlm.errors import InputError, UnsupportedModelError
from edgevlm.export.export import export_bundle
from edgevlm.models import internvl
from edgevlm.verify import TOKENS, verify_bundle
from edgevlm.vlm import VLM

pytestmark = pytest.mark.usefixtures("traced_once")

NAME = "internvl-qwen2"


@pytest.mark.parametrize(
    "name",
    [t.name if t.name in (NAME, "internvl-llama-rms") else pytest.param(t.name, marks=pytest.mark.slow) for t in INTERNVLS],
)
def test_a_float_bundle_is_the_model(tiny: Callable[[str], Tiny], name: str, tmp_path: Path) -> None:
    one = tiny(name)
    report = verify_bundle(Path(shutil.copytree(one.bundle, tmp_path / "bundle")), str(one.checkpoint))
    assert (report.failures, report.notes) == ([], [])
    assert {"wide picture", "two pictures", "no picture", "interleaved"} <= {case.case for case in report.sequences}
    assert all((case.same_tokens, case.max_abs < 1e-3) == (TOKENS, True) for case in report.sequences)
    assert all(part.max_abs < 1e-4 for part in report.parts)


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_a_quantized_bundle_answers(tiny: Callable[[str], Tiny], recipe: str) -> None:
    reply = VLM.load(tiny(NAME).export(recipe=recipe)).generate("How many?", images=[picture(1, 90, 40)], max_new_tokens=8)
    assert len(reply.tokens) == 8


@pytest.mark.parametrize(("fewest", "most", "side"), [(1, 12, 28), (2, 6, 30), (1, 4, 16), (1, 1, 28)])
def test_tiles_are_those_of_the_processor(fewest: int, most: int, side: int) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    from edgevlm.images import ImageProcessor

    theirs = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side}, crop_to_patches=True, min_patches=fewest, max_patches=most
    )
    ours = ImageProcessor.from_config(theirs.to_dict())
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(2, 260, (40, 2)).tolist(), [28, 28], [56, 28], [28, 56], [84, 56], [3, 500], [500, 3]]
    for height, width in sizes:
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        batch = theirs(image, return_tensors="np")
        assert ours.count_tiles(height, width) == batch["num_patches"][0] == theirs.get_number_of_image_patches(height, width)
        np.testing.assert_array_equal(ours.cut(image), np.asarray(batch["pixel_values"]))


def test_a_picture_costs_its_tiles(tiny: Callable[[str], Tiny]) -> None:
    bundle = tiny(NAME).bundle
    places = Bundle.open(bundle).manifest.image.places
    vlm, wide = VLM.load(bundle), picture(2, 120, 30)
    whole = vlm.generate("What?", images=[wide], max_new_tokens=1).timings.prompt_tokens
    fewer = VLM.load(bundle, max_tiles=2).generate("What?", images=[wide], max_new_tokens=1).timings.prompt_tokens
    one = VLM.load(bundle, max_tiles=1).generate("What?", images=[wide], max_new_tokens=1).timings.prompt_tokens
    assert (whole - one, fewer - one) == (4 * places, 2 * places)  # 4 tiles and the whole, 2 and the whole, the whole alone
    for budget, tiles in ((places, 1), (2 * places, 1), (3 * places, 3), (5 * places + 1, 5)):
        limited = VLM.load(bundle, visual_tokens=budget).generate("What?", images=[wide], max_new_tokens=1)
        assert limited.timings.prompt_tokens - one == (tiles - 1) * places, budget


def test_all_tiles_run_at_once_and_once(tiny: Callable[[str], Tiny]) -> None:
    vlm = VLM.load(tiny(NAME).bundle)
    runs = Runs(vlm)
    vlm.generate("What?", images=[picture(2, 120, 30)], max_new_tokens=2)
    assert runs() == {"vision_encoder": 1, "projector": 1, "embed_tokens": 2, "decoder": 2}
    vlm.generate("And?", images=[picture(2, 120, 30)], max_new_tokens=2)
    assert runs() == {"embed_tokens": 2, "decoder": 2}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"max_tiles": 0, "visual_tokens": 100}, "max_tiles is 0"),
        ({"visual_tokens": 1}, "takes 4"),
    ],
)
def test_limits_that_cannot_be_met(tiny: Callable[[str], Tiny], option: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        VLM.load(tiny(NAME).bundle, **option)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["text_config"].update(model_type="opt"), "decoder 'opt' is not supported"),
        (lambda c: c.update(vision_feature_layer=[-1, -2]), "one layer is"),
        (lambda c: c.update(vision_feature_layer=4, vision_config={"num_hidden_layers": 3}), "has 3 layers: -4 to 3"),
        (lambda c: c["text_config"].update(rope_scaling={"type": "longrope"}), "'longrope' is not supported"),
    ],
)
def test_what_is_not_covered(change: Callable[[dict[str, Any]], None], said: str) -> None:
    config: dict[str, Any] = {"text_config": {}}
    change(config)
    with pytest.raises(UnsupportedModelError, match=said):
        internvl.check_config(config)


def test_the_rotary_scaling_of_the_published_files(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Dynamic scaling changes angles beyond the context length only, and no sequence in a bundle is longer."""
    checkpoint = Path(shutil.copytree(tiny(NAME).checkpoint, tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["rope_parameters"].update(rope_type="dynamic", factor=2.0)
    config["text_config"]["max_position_embeddings"] = 512
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    bundle = export_bundle(str(checkpoint), tmp_path / "bundle")
    for part in bundle.manifest.parts:
        graphs = [(folder / "onnx" / f"{part}.onnx").read_bytes() for folder in (bundle.folder, tiny(NAME).bundle)]
        assert graphs[0] == graphs[1], part
    with pytest.raises(InputError, match="512, this model's context length"):
        VLM.load(bundle.folder, capacity=513)
    prompt = "Where is the large green ball? " * 14
    reply = VLM.load(bundle.folder).generate(prompt, images=[picture(1)], max_new_tokens=500)
    assert reply.finish_reason == "capacity"
    reference = internvl.load_reference(checkpoint).eval()
    assert reference.model.language_model.rotary_emb.rope_type == "dynamic"
    vlm = VLM.load(bundle.folder)
    vlm._stop = frozenset()
    ids = vlm._builder.tokenizer.encode("Is there a red cube? " * 20)
    found = vlm.generate("Is there a red cube? " * 20, max_new_tokens=8).tokens
    assert len(ids) > 100
    assert found == greedy(reference, vlm, "Is there a red cube? " * 20, 8)


def greedy(model: Any, vlm: VLM, prompt: str, tokens: int) -> list[int]:
    import torch

    from edgevlm.prompt import normalize_request

    built = internvl.build_prompt(vlm._builder, vlm.bundle.manifest, normalize_request(prompt))
    ids = torch.tensor([built.ids])
    for _ in range(tokens):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(built.ids) :].tolist()


def test_places_that_do_not_fit(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny(NAME).checkpoint, tmp_path / "checkpoint"))
    (checkpoint / "processor_config.json").write_text(json.dumps({"image_seq_length": 5}), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="5 places; the model makes 4"):
        export_bundle(str(checkpoint), tmp_path / "bundle")
