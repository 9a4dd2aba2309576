"""Bundles on disk: what is damaged is named, what leads out is refused, what is written appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm import bundle as bundles
from edgevlm.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    Bundle,
    CrossAttention,
    ImageTokens,
    KVCache,
    Manifest,
    Part,
    PatchGrid,
    TensorInfo,
    check_output,
    publish_bundle,
    seal,
)
from edgevlm.errors import BundleError, IntegrityError, ManifestError, OutputError

PART = Part(
    "onnx/decoder.onnx",
    12,
    {"x": TensorInfo("float32", ("batch_size", 3))},
    {"y": TensorInfo("int64", ())},
    {"float32": 120, "int8": 3},
)
BARE = Manifest(
    family="llava", dtype="float32", kv_cache=KVCache(2, 4, 16, "float32"), context_length=64, hidden_size=32, vocab_size=100,
    image=ImageTokens("<image>", 4, 16), parts={"decoder": PART}, recipe={"name": "int8", "rules": [{"method": "int8"}]},
    provenance={"checkpoint": "tiny"},
)  # fmt: skip


def fill(folder: Path) -> Manifest:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "decoder.onnx").write_bytes(b"graph")
    (folder / "onnx" / "decoder.onnx_data").write_bytes(bytes(range(256)))
    (folder / "config.json").write_text("{}")
    return seal(folder, BARE)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A bundle of three little files."""
    with publish_bundle(tmp_path / "small") as folder:
        fill(folder)
    return tmp_path / "small"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


# ------------------------------------------------------------------------------------------- manifest


def test_round_trip(small: Path) -> None:
    assert Manifest.from_json(BARE.to_json()) == BARE
    cross = CrossAttention(2, 4, 16, "float32", "images", 64)
    whole = replace(
        BARE, cross_attention=cross, decoder_start_id=0, instruction_length=512, image_options={"crop_to_patches": True},
        video=ImageTokens("<video>", 5, 0, (1, 2), (3,)), patches=PatchGrid(14, 2, 2, 4, 2.0),
    )  # fmt: skip
    assert Manifest.from_json(whole.to_json()) == whole
    manifest = Bundle.open(small).manifest
    assert replace(manifest, files={}) == BARE
    assert sorted(manifest.files) == ["config.json", "onnx/decoder.onnx", "onnx/decoder.onnx_data"]
    assert manifest.files["onnx/decoder.onnx_data"].size == 256
    assert PART.size == 123
    assert BARE.kv_cache.bytes_per_token() == 2 * 2 * 4 * 16 * 4
    assert replace(BARE.kv_cache, dtype="float16").bytes_per_token() == 2 * 2 * 4 * 16 * 2


@pytest.mark.parametrize("content", ["", "{", "no json", "[" * 100_000, '{"schema_version": 1'])
def test_manifest_that_is_not_json(small: Path, content: str) -> None:
    (small / MANIFEST).write_text(content)
    with pytest.raises(ManifestError, match="is not JSON"):
        Bundle.open(small)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"schema_version": "1"}', '{"schema_version": null}', "1"])
def test_manifest_without_a_schema(small: Path, content: str) -> None:
    (small / MANIFEST).write_text(content)
    with pytest.raises(ManifestError, match="schema_version"):
        Bundle.open(small)


def test_manifest_of_bytes(small: Path) -> None:
    (small / MANIFEST).write_bytes(b"\xff\xfe{}")
    with pytest.raises(ManifestError, match="cannot be read"):
        Bundle.open(small)


@pytest.mark.parametrize(
    ("version", "remedy"), [(SCHEMA_VERSION + 1, "Update EdgeVLM"), (SCHEMA_VERSION - 1, "Export the checkpoint again")]
)
def test_other_schemas(small: Path, version: int, remedy: str) -> None:
    # A newer schema may have keys unknown here; the version is what is said.
    edit(small, lambda m: m.update(schema_version=version, novelty={}))
    with pytest.raises(ManifestError, match=f"schema version {version}.*{remedy}"):
        Bundle.open(small)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("family"), "lacks family"),
        (lambda m: m.pop("image"), "lacks image"),
        (lambda m: m["kv_cache"].pop("heads"), "kv_cache lacks heads"),
        (lambda m: m["files"]["config.json"].pop("size"), "files: config.json lacks size"),
        (lambda m: m.update(colour="red"), "has unknown colour"),
        (lambda m: m.update(cross_attention={"layers": 2}), "cross_attention is .*expected CrossAttention or NoneType"),
        (lambda m: m.update(decoder_start_id="0"), "decoder_start_id is '0'; expected int or NoneType"),
        (lambda m: m.update(instruction_length=True), "instruction_length is True; expected int or NoneType"),
        (lambda m: m.update(patches={"size": 14, "temporal": 2}), "patches is .*expected PatchGrid or NoneType"),
        (lambda m: m.update(patches={"size": 14.0, "temporal": 2, "merge": 2}), "patches is .*expected PatchGrid or NoneType"),
        (lambda m: m.update(video="<video>"), "video is '<video>'; expected ImageTokens or NoneType"),
        (lambda m: m["parts"]["decoder"].update(colour="red"), "parts: decoder has unknown colour"),
        (lambda m: m.update(hidden_size="32"), "hidden_size is '32'; expected int"),
        (lambda m: m.update(hidden_size=True), "hidden_size is True; expected int"),
        (lambda m: m.update(hidden_size=32.0), "hidden_size is 32.0; expected int"),
        (lambda m: m.update(family=None), "family is None; expected str"),
        (lambda m: m.update(parts=[]), "parts is list; expected an object"),
        (lambda m: m.update(image="<image>"), "image is str; expected an object"),
        (lambda m: m.update(recipe=5), "recipe is 5; expected dict or NoneType"),
        (lambda m: m.update(schema_version=True), "schema_version is True; expected int"),
        (lambda m: m["parts"]["decoder"]["inputs"]["x"].update(shape="B3"), "inputs: x: shape is str; expected a list"),
        (lambda m: m["parts"]["decoder"]["inputs"]["x"].update(shape=["B", 3.5]), r"shape\[1\] is 3.5; expected int or str"),
        (lambda m: m["parts"]["decoder"]["weights"].update(int8=None), "weights: int8 is None; expected int"),
    ],
)
def test_the_wrong_place_is_named(small: Path, change: Callable[[dict[str, Any]], object], said: str) -> None:
    edit(small, change)
    with pytest.raises(ManifestError, match=said) as caught:
        Bundle.open(small)
    assert str(small / MANIFEST) in str(caught.value)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["../x", "/etc/passwd", "\0", "\ud800", "a" * 300]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.sampled_from(["\0", "../x", "x" * 5000]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_manifest_loads_or_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        with publish_bundle(folder) as staging:
            fill(staging)
        shutil.copy(folder / MANIFEST, folder.parent / "sound.json")
    manifest = json.loads((folder.parent / "sound.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(manifest))))
        value = data.draw(JSON)
        if not path:
            manifest = value
            break
        target = manifest
        for key in path[:-1]:
            target = target[key]
        rename = data.draw(st.booleans())
        if rename and isinstance(target, dict):
            target[data.draw(st.text() | st.sampled_from(["..", "\0", "y" * 5000]))] = target.pop(path[-1])
        else:
            target[path[-1]] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))
    try:
        bundle = Bundle.open(folder)
        bundle.part_path(next(iter(bundle.manifest.parts))) if bundle.manifest.parts else None
    except (ManifestError, IntegrityError):
        pass


# ---------------------------------------------------------------------------------------------- files


def test_no_bundle(tmp_path: Path, small: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="is no bundle"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="does not exist"):
        Bundle.open(small / "config.json")


@pytest.mark.parametrize("name", ["onnx/decoder.onnx", "onnx/decoder.onnx_data", "config.json"])
def test_damaged_files_are_refused_by_name(small: Path, name: str) -> None:
    path = small / name
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(IntegrityError, match=f"{name} was changed"):
        Bundle.open(small)
    Bundle.open(small, check_files=False)
    path.write_bytes(content[:-1])
    for check in (True, False):
        with pytest.raises(IntegrityError, match=f"{name} has {len(content) - 1} bytes; the manifest says {len(content)}"):
            Bundle.open(small, check_files=check)
    path.unlink()
    for check in (True, False):
        with pytest.raises(IntegrityError, match=f"{name} is missing"):
            Bundle.open(small, check_files=check)
    path.write_bytes(content)
    Bundle.open(small)


@pytest.mark.parametrize("large", [0, 1 << 30])
def test_damaged_while_something_else_is_done(small: Path, monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    """What is large is compared meanwhile, and what it breaks is not what is told."""
    monkeypatch.setattr(bundles, "_LARGE", large)
    bundle, done = Bundle.open(small), []
    with bundle.comparing_hashes():
        done.append("fine")
    with pytest.raises(KeyError), bundle.comparing_hashes():
        raise KeyError("of the block")
    path = small / "onnx" / "decoder.onnx_data"
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])

    def break_something() -> None:
        with bundle.comparing_hashes():
            done.append("begun")
            raise KeyError("of the block")

    with pytest.raises(IntegrityError, match=r"decoder\.onnx_data was changed"):
        break_something()
    assert done == ["fine", "begun"][: 1 + (not large)]
    with pytest.raises(IntegrityError, match=r"decoder\.onnx_data was changed"), bundle.comparing_hashes():
        pass


def test_hashes_are_not_computed_when_not_asked_for(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "sha256_of", lambda path: pytest.fail("hashed"))
    Bundle.open(small, check_files=False)


def test_unreadable_file(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(bundles, "sha256_of", refuse)
    with pytest.raises(IntegrityError, match="cannot be read: Permission denied"):
        Bundle.open(small)


def test_part_without_a_hash(small: Path) -> None:
    edit(small, lambda m: m["files"].pop("onnx/decoder.onnx"))
    with pytest.raises(ManifestError, match=r"'onnx/decoder\.onnx' without its hash"):
        Bundle.open(small, check_files=False)


@pytest.mark.parametrize(
    "name", ["../secret", "onnx/../../secret", "/etc/passwd", "onnx\\decoder.onnx", "..\\secret", "..", "link", "linked/secret"]
)
def test_paths_that_lead_out(small: Path, name: str) -> None:
    secret = small.parent / "secret"
    secret.write_text("secret")
    (small / "link").symlink_to(secret)
    (small / "linked").symlink_to(small.parent)
    record = {"sha256": bundles.sha256_of(secret), "size": 6}
    edit(small, lambda m: m["files"].update({name: record}))
    with pytest.raises(IntegrityError, match="outside the bundle"):
        Bundle.open(small)
    edit(small, lambda m: m["parts"]["decoder"].update(file=name))
    with pytest.raises(IntegrityError, match="outside the bundle"):
        Bundle.open(small, check_files=False)


@pytest.mark.parametrize("name", ["\0", "\ud800", "x" * 5000, "loop/file"])
def test_names_that_no_file_has(small: Path, name: str) -> None:
    (small / "loop").symlink_to(small / "loop")
    edit(small, lambda m: m["files"].update({name: {"sha256": "", "size": 0}}))
    with pytest.raises(IntegrityError):
        Bundle.open(small)


def test_links_inside_are_followed(small: Path) -> None:
    (small / "onnx" / "decoder.onnx").rename(small / "onnx" / "kept.onnx")
    (small / "onnx" / "decoder.onnx").symlink_to("kept.onnx")
    assert Bundle.open(small).part_path("decoder").read_bytes() == b"graph"


def test_bundle_may_be_moved_and_linked(small: Path, tmp_path: Path) -> None:
    small.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    Bundle.open(tmp_path / "link")


def test_reports_do_not_change_the_bundle(small: Path) -> None:
    opened = Bundle.open(small)
    path = opened.report("verify", {"b": 1, "a": [2.5, None]})
    assert path == small / "reports" / "verify.json"
    assert json.loads(path.read_text()) == {"a": [2.5, None], "b": 1}
    opened.report("verify", {"again": True})
    assert json.loads(path.read_text()) == {"again": True}
    assert os.listdir(small / "reports") == ["verify.json"]
    assert Bundle.open(small).manifest == opened.manifest
    assert "reports/verify.json" not in seal(small, opened.manifest).files


def test_report_that_cannot_be_written(small: Path) -> None:
    (small / "reports").write_text("in the way")
    with pytest.raises(OutputError, match=r"verify\.json cannot be written"):
        Bundle.open(small).report("verify", {})


# --------------------------------------------------------------------------------------------- writing


def test_nothing_appears_before_the_end(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "down" / "bundle"
    with publish_bundle(output) as folder:
        fill(folder)
        assert not output.exists()
        assert folder.parent == output.parent
        assert folder.name.startswith(".")
    assert os.listdir(output.parent) == ["bundle"]
    Bundle.open(output)


def fail_halfway(output: Path, failure: BaseException) -> None:
    with publish_bundle(output, force=True) as folder:
        (folder / "half").write_text("half")
        raise failure


@pytest.mark.parametrize(
    "failure", [RuntimeError("bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota")]
)
@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_what_was_there(tmp_path: Path, failure: BaseException, existing: bool) -> None:
    output = tmp_path / "bundle"
    if existing:
        with publish_bundle(output) as folder:
            fill(folder)
    expected = OutputError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected) as caught:
        fail_halfway(output, failure)
    assert not isinstance(failure, OSError) or "disk is full" in str(caught.value)
    assert os.listdir(tmp_path) == ["bundle"] * existing
    if existing:
        Bundle.open(output)


def test_other_errors_of_the_system_are_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Input/output error"), publish_bundle(tmp_path / "bundle"):
        raise OSError(errno.EIO, "Input/output error")


def test_replaced_bundle_comes_back_when_the_new_one_cannot_take_its_place(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="Input/output error"), publish_bundle(small, force=True) as folder:
        fill(folder)
    assert os.listdir(small.parent) == ["small"]
    Bundle.open(small)


def test_force_replaces_bundles_and_empty_folders_only(small: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for name in ("small", "empty", "full", "full/file"):
        with pytest.raises(OutputError, match="exists"):
            check_output(tmp_path / name, force=False)
    for name in ("full", "full/file"):
        with pytest.raises(OutputError, match="is no bundle"):
            check_output(tmp_path / name, force=True)
    for name in ("small", "empty", "new"):
        assert check_output(tmp_path / name, force=True) == tmp_path / name
        with publish_bundle(tmp_path / name, force=True) as folder:
            fill(folder)
            (folder / "new").write_text("")
        assert (tmp_path / name / "new").exists()
    assert sorted(os.listdir(tmp_path)) == ["empty", "full", "new", "small"]


def test_link_to_a_bundle_stays_a_link(small: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(small)
    with publish_bundle(tmp_path / "link", force=True) as folder:
        fill(folder)
        (folder / "new").write_text("")
    assert (tmp_path / "link").is_symlink()
    assert (small / "new").exists()
    assert sorted(os.listdir(tmp_path)) == ["link", "small"]


@pytest.mark.parametrize("name", ["bundle", "bundle [1]*", "b.2"])
def test_abandoned_folders_are_removed(tmp_path: Path, name: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    living = os.getppid()
    kept = [
        f".{name}.{living}.part",
        f".{name}.notes",
        f".{name}.mine.part",
        f".{name}.{gone.pid}.old",
        f".other.{gone.pid}.part",
    ]
    for leftover in [*kept, f".{name}.{gone.pid}.part", f".{name}.{os.getpid()}.part"]:
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "half").write_text("half")
    with publish_bundle(tmp_path / name) as folder:
        fill(folder)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, name])
    # What a killed process had moved aside goes once something stands in its place.
    with publish_bundle(tmp_path / name, force=True) as folder:
        fill(folder)
    kept.remove(f".{name}.{gone.pid}.old")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, name])


def test_a_dtype_that_is_none(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["parts"]["projector"]["inputs"]["vision_features"]["dtype"] = "float33"
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="'vision_features' the dtype 'float33'"):
        Bundle.open(copy)
