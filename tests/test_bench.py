"""`edgevlm bench`: what it reports is what happened."""

import json
from pathlib import Path

import pytest

from edgevlm import VLM
from edgevlm.bench import COLUMNS, Foreign, Spread, measure_bundle, noise_picture
from edgevlm.cli import main
from edgevlm.errors import CapacityError, InputError
from edgevlm.quant.quantize import quantize_bundle


@pytest.fixture(scope="module")
def bundle(shipped, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "int4"
    quantize_bundle(shipped("llava"), folder, "int4-rtn")
    return folder


def test_record(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    generate = VLM.generate
    monkeypatch.setattr(VLM, "generate", lambda self, *a, **k: asked.append((a, k)) or generate(self, *a, **k))
    made = measure_bundle(bundle, prompt_tokens=100, new_tokens=7, images=2, rounds=2)
    assert made.prompt_tokens >= 100
    assert (made.images, made.new_tokens) == (2, 7)
    assert set(made.times) == set(COLUMNS)
    assert all(0 < s.least <= s.median <= s.most for s in made.times.values())
    assert made.memory > 50e6
    assert 0 < made.shares["decode_of_bandwidth"] < 1
    assert made.load > 0
    assert made.disk >= sum(file.stat().st_size for file in (bundle / "onnx").iterdir())
    # Every round has new pictures, and its second question the same ones.
    pictures = [tuple(picture.tobytes() for picture in kwargs["images"]) for _, kwargs in asked]
    assert pictures[0::2] == pictures[1::2]
    assert len({picture for both in pictures[0::2] for picture in both}) == 2 * len(pictures[0::2])
    assert len(pictures) >= 6
    json.dumps(made.to_dict())


def test_answers_go_on_past_their_end(bundle: Path) -> None:
    with VLM.load(bundle) as vlm:
        picture = noise_picture(0, (84, 84))
        ended = vlm.generate("How many cubes?", images=[picture], max_new_tokens=60)
        assert ended.finish_reason == "stop"
        longer = vlm.generate("How many cubes?", images=[picture], max_new_tokens=60, ignore_stop=True)
        assert longer.finish_reason == "length"
        assert longer.tokens[: len(ended.tokens)] == ended.tokens
        assert vlm.count_tokens("How many cubes?", images=[picture]) == ended.timings.prompt_tokens


def test_command(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(bundle), "--rounds", "1", "--new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "first token" in out
    assert "GB/s" in out
    kept = json.loads((bundle / "reports" / "bench.json").read_text(encoding="utf-8"))
    assert kept["new_tokens"] == 4
    assert main(["bench", str(bundle), "--rounds", "1", "--new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["decoder"] == "cpu"


@pytest.mark.parametrize(
    ("flag", "value"), [("--rounds", "0"), ("--new-tokens", "1"), ("--images", "-1"), ("--resolution", "x")]
)
def test_bad_numbers(bundle: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str) -> None:
    assert main(["bench", str(bundle), flag, value]) == 2
    assert value in capsys.readouterr().err


def test_a_prompt_beyond_the_context(bundle: Path) -> None:
    with pytest.raises(InputError):
        measure_bundle(bundle, prompt_tokens=0)
    with pytest.raises(CapacityError):
        measure_bundle(bundle, prompt_tokens=100_000)


def test_spread_and_foreign() -> None:
    assert Spread.of([3, 1, 2]) == Spread(2, 1, 3)
    assert 0 <= Foreign().share() <= 1
