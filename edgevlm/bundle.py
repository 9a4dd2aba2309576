"""The bundle: a folder that is the only contract between the workshop and the robot.

    edgevlm.json     the manifest below: what the parts are, how the model counts and speaks, sha256 of every file
    *.json, *.jinja  the checkpoint's own configuration, tokenizer and preprocessing, under Hugging Face's names
    onnx/            one file a part, with its weights beside it
    reports/         what was measured; not covered by the hashes, so that measuring does not change the bundle

A bundle appears whole or not at all: it is written into a hidden folder beside its destination and renamed. This
module knows nothing of families, graphs or backends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import hashlib
import json
import os
import shutil
import types
import typing
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from .errors import BundleError, IntegrityError, ManifestError, OutputError

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "Bundle",
    "CrossAttention",
    "FileRecord",
    "ImageTokens",
    "KVCache",
    "Manifest",
    "Part",
    "TensorInfo",
    "check_output",
    "publish_bundle",
    "scratch_folder",
]

MANIFEST = "edgevlm.json"
SCHEMA_VERSION = 3
#: numpy's own errors of a short write have no number: https://github.com/numpy/numpy/issues/17589 and .../pull/28771
_NUMPY_DISK_FULL = ("requested and", "Not enough free space")
#: What a part's inputs and outputs may be.
#: Bytes from which a file holds weights: whatever they are, they can be read.
_LARGE = 16 << 20
_DTYPES = ("float32", "float16", "bool", "int8", "uint8", "int32", "int64")
#: Folders that may change after publishing.
_UNHASHED = ("reports", "engines")


@dataclass(frozen=True)
class TensorInfo:
    """dtype as numpy names it; a dimension is a number, or a name where it is dynamic."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Part:
    """One ONNX graph. `weights` counts the bytes of its initializers by dtype. `onnxruntime_only` says what in it is beyond the
    form that TensorRT reads too; nothing, mostly."""

    file: str
    nodes: int
    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]
    weights: dict[str, int]
    onnxruntime_only: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(self.weights.values())


@dataclass(frozen=True)
class KVCache:
    """`2 · layers` tensors `past_key_values.N.key|value`, `[batch, heads, capacity, head_dim]`, updated in place: floats as the
    decoder computes in, or int8."""

    layers: int
    heads: int
    head_dim: int
    dtype: str

    def bytes_per_token(self) -> int:
        """Bytes one position takes over all layers, for one sequence."""
        return 2 * self.layers * self.heads * self.head_dim * {"int8": 1, "float16": 2}.get(self.dtype, 4)


@dataclass(frozen=True)
class CrossAttention:
    """What the decoder reads beside its own sequence: `2 · layers` tensors `cross_key_values.N.key|value`,
    `[batch, heads, cross_length, head_dim]`, which the part `cross_kv` makes.

    `source` says of what: `images`, once a picture, `places` rows each; or `prompt`, once a prompt, one row a token.
    """

    layers: int
    heads: int
    head_dim: int
    dtype: str
    source: str
    places: int = 0


@dataclass(frozen=True)
class ImageTokens:
    """The token that marks a picture's places, and how many places one picture (or one of its tiles) takes in the prompt.

    `before` and `after` are the ids around the places of a picture. A checkpoint whose tokenizer has no such token has the
    token "" and the id -1. Where the number depends on the size of the picture, `places` is 0.
    """

    token: str
    token_id: int
    places: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class PatchGrid:
    """How a picture of any size becomes patches and places: `size` pixels a patch, `temporal` frames a layer, `merge` by
    `merge` patches a place. `window` is the side of an attention window in places, 0 where attention is over the whole frame;
    `tokens_per_second` what a second of a film counts in positions, 0 where layers are counted; `learnt` the side of the
    square table of learnt positions that is stretched over a picture, 0 where there is none.
    """

    size: int
    temporal: int
    merge: int
    window: int = 0
    tokens_per_second: float = 0.0
    learnt: int = 0


@dataclass(frozen=True)
class FileRecord:
    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """`edgevlm.json`. `context_length` is the longest sequence that the model was made for, in tokens.

    `decoder_start_id` is the token that a decoder begins with whose prompt went into an encoder. `instruction_length` is
    the longest instruction, in tokens of its own tokenizer, that shapes what is seen in a picture. `image_options` are what
    the family sets of the image processor's options, whatever its own file says. `video` is the token of films, for models
    that take them, `patches` how pictures of any size are laid out.
    """

    family: str
    dtype: str
    kv_cache: KVCache
    context_length: int
    hidden_size: int
    vocab_size: int
    image: ImageTokens
    cross_attention: CrossAttention | None = None
    decoder_start_id: int | None = None
    instruction_length: int | None = None
    image_options: dict[str, Any] = field(default_factory=dict)
    video: ImageTokens | None = None
    patches: PatchGrid | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST) -> Manifest:
        """Raises ManifestError, naming the place that is wrong."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise ManifestError(f"{where} is not JSON: {exc}. The bundle is damaged; export it again.") from exc
        if not isinstance(data, dict) or not isinstance(data.get("schema_version"), int):
            raise ManifestError(f"{where} has no 'schema_version'; it is not the manifest of a bundle.")
        if data["schema_version"] is not True and data["schema_version"] != SCHEMA_VERSION:
            newer = data["schema_version"] > SCHEMA_VERSION
            remedy = "Update EdgeVLM." if newer else "Export the checkpoint again."
            raise ManifestError(
                f"{where} has schema version {data['schema_version']}; this EdgeVLM reads version {SCHEMA_VERSION}. {remedy}"
            )
        return decode_json(cls, data, where)


T = TypeVar("T")


def decode_json(kind: Any, data: Any, where: str) -> Any:
    """A value of the annotated type from parsed JSON; ManifestError names the place that does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            with contextlib.suppress(ManifestError):
                return decode_json(option, data, where)
        raise ManifestError(f"{where} is {data!r}; expected {' or '.join(getattr(a, '__name__', str(a)) for a in arguments)}.")
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(data, dict):
            raise ManifestError(f"{where} is {type(data).__name__}; expected an object.")
        hints = typing.get_type_hints(kind)
        known = {f.name: f for f in dataclasses.fields(kind)}
        unknown = sorted(set(data) - set(known))
        optional = {
            n for n, f in known.items() if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        }
        missing = sorted(set(known) - optional - set(data))
        if unknown or missing:
            said = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
            raise ManifestError(f"{where} {' and '.join(said)}. The bundle is damaged; export it again.")
        return kind(**{name: decode_json(hints[name], value, f"{where}: {name}") for name, value in data.items()})
    if origin is dict:
        if not isinstance(data, dict):
            raise ManifestError(f"{where} is {type(data).__name__}; expected an object.")
        return {name: decode_json(arguments[1], value, f"{where}: {name}") for name, value in data.items()}
    if origin in (tuple, list):
        if not isinstance(data, list):
            raise ManifestError(f"{where} is {type(data).__name__}; expected a list.")
        return origin(decode_json(arguments[0], value, f"{where}[{i}]") for i, value in enumerate(data))
    wanted = type(None) if kind is None else kind
    if not isinstance(data, wanted) or (isinstance(data, bool) and wanted is not bool):
        raise ManifestError(f"{where} is {data!r}; expected {wanted.__name__}.")
    return data


def sha256_of(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, check_files: bool = True) -> Bundle:
        """Reads the manifest and, unless told otherwise, compares every file with its hash.

        Raises BundleError where there is no bundle, ManifestError, or IntegrityError naming the file.
        """
        root = Path(folder)
        if not (root / MANIFEST).is_file():
            exists = "is no bundle (it has no edgevlm.json)" if root.is_dir() else "does not exist"
            raise BundleError(f"{root} {exists}. `edgevlm export` and `edgevlm quantize` write bundles.")
        try:
            text = (root / MANIFEST).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ManifestError(f"{root / MANIFEST} cannot be read: {exc}.") from exc
        bundle = cls(root, Manifest.from_json(text, str(root / MANIFEST)))
        bundle._check(check_files)
        return bundle

    def path(self, name: str) -> Path:
        """The path of a file that the manifest lists. Raises IntegrityError where it leads out of the bundle."""
        relative = PurePosixPath(name)
        inside = not relative.is_absolute() and ".." not in relative.parts and "\\" not in name
        path = self.folder / relative
        try:
            path.exists()  # says what `resolve` passes over
            inside = inside and path.resolve().is_relative_to(self.folder.resolve())
        except (OSError, ValueError, RuntimeError) as exc:  # too long, a zero byte or lone surrogate in it, a loop of links
            raise IntegrityError(f"The manifest names {name!r}, which no file can be called: {exc}.") from exc
        if not inside:
            raise IntegrityError(f"The manifest names {name!r}, which lies outside the bundle {self.folder}. It is not opened.")
        return path

    def part_path(self, part: str) -> Path:
        """The ONNX file of a part."""
        return self.path(self.manifest.parts[part].file)

    def report(self, name: str, content: dict[str, Any]) -> Path:
        """Writes `reports/NAME.json` and returns its path."""
        path = self.folder / "reports" / f"{name}.json"
        staged = path.with_suffix(".part")
        try:
            path.parent.mkdir(exist_ok=True)
            staged.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            staged.replace(path)
        except OSError as exc:
            raise OutputError(f"The report {path} cannot be written: {exc.strerror}.") from exc
        return path

    def _check(self, hashes: bool) -> None:
        for part in self.manifest.parts.values():
            for name, info in (part.inputs | part.outputs).items():
                if info.dtype not in _DTYPES:
                    raise ManifestError(
                        f"{self.folder / MANIFEST} gives {name!r} the dtype {info.dtype!r}; known are {', '.join(_DTYPES)}."
                    )
            if part.file not in self.manifest.files:
                raise ManifestError(f"{self.folder / MANIFEST} names the part file {part.file!r} without its hash.")
        for name, record in self.manifest.files.items():
            path = self.path(name)
            if not path.is_file():
                raise IntegrityError(f"{path} is missing; the manifest lists it. Copy the bundle again, or export it again.")
            if path.stat().st_size != record.size:
                raise IntegrityError(
                    f"{path} has {path.stat().st_size:,} bytes; the manifest says {record.size:,}. Copy the bundle again."
                )
        if hashes:
            self._compare_hashes(self.manifest.files)

    @contextlib.contextmanager
    def comparing_hashes(self) -> Iterator[None]:
        """Compares every file with its hash: small ones, which say how others are to be read, before the block, large ones
        while it runs. Raises IntegrityError naming the file, at the end also in place of what the block raised."""
        files = self.manifest.files
        self._compare_hashes({name: record for name, record in files.items() if record.size < _LARGE})
        with ThreadPoolExecutor(1) as helper:
            large = {name: record for name, record in files.items() if record.size >= _LARGE}
            compared = helper.submit(self._compare_hashes, large)
            try:
                yield
            except Exception:
                compared.result()
                raise
            compared.result()

    def _compare_hashes(self, files: Mapping[str, FileRecord]) -> None:
        """Several files at once: both reading and hashing leave Python's lock alone."""
        paths = {self.path(name): record for name, record in files.items()}
        largest = sorted(paths, key=lambda path: -paths[path].size)
        pool = ThreadPoolExecutor(4)
        try:
            found = {path: pool.submit(sha256_of, path) for path in largest}
            for path, record in paths.items():
                try:
                    changed = found[path].result() != record.sha256
                except OSError as exc:
                    raise IntegrityError(f"{path} cannot be read: {exc.strerror}.") from exc
                if changed:
                    raise IntegrityError(
                        f"{path} was changed: its sha256 is not the manifest's. Copy the bundle again, or export it again."
                    )
        finally:
            pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------- writing


def check_output(output: str | os.PathLike[str], *, force: bool) -> Path:
    """The destination, or OutputError where it exists and may not be replaced."""
    path = Path(output)
    if path.exists() and not force:
        raise OutputError(f"{path} exists. Give another --output, or --force to replace it.")
    if path.exists() and not (path / MANIFEST).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} exists and is no bundle; --force replaces bundles only. Give another --output.")
    return path


@contextlib.contextmanager
def publish_bundle(output: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yields an empty folder to fill; when the block ends well, it takes the place of `output`, else it is removed.

    The block must end by calling `seal` on what it filled. Raises OutputError where `output` exists without `force`,
    or where the disk is full.
    """
    path = check_output(output, force=force)
    if path.is_symlink():  # what it points to is replaced, not the link
        path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        staging = path.parent / f".{path.name}.{os.getpid()}.part"
        staging.mkdir()
    except OSError as exc:
        raise OutputError(f"{path} cannot be written: {exc.strerror}.") from exc
    try:
        yield staging
        if path.exists():
            replaced = path.parent / f".{path.name}.{os.getpid()}.old"
            path.rename(replaced)
            try:
                staging.rename(path)
            except BaseException:
                replaced.rename(path)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            staging.rename(path)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT) or any(text in str(exc) for text in _NUMPY_DISK_FULL):
            free = shutil.disk_usage(path.parent).free
            raise OutputError(
                f"The disk is full: writing {path} stopped with {free / 1e6:,.0f} MB free. Nothing was left behind; "
                "make room, or give an --output on another disk."
            ) from exc
        raise OutputError(f"{path} cannot be written: {exc}.") from exc
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(output: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder on the disk of `output`, hidden beside it, that is removed in the end. Raises OutputError."""
    path = Path(output)
    place = path.with_name(f"scratch-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place)
        folder = path.parent / f".{place.name}.{os.getpid()}.part"
        folder.mkdir()
    except OSError as exc:
        raise OutputError(f"{path} cannot be written: {exc.strerror}.") from exc
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(path: Path) -> None:
    """Removes what a killed process left: folders named after a process that is gone, or that had this one's number
    (in a container every process may have the same)."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        pid, suffix = leftover.name.split(".")[-2:]
        gone = pid.isdigit() and (int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists())
        # What was being replaced is kept while nothing has taken its place.
        if gone and (suffix == "part" or (suffix == "old" and path.exists())):
            shutil.rmtree(leftover, ignore_errors=True)


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Hashes every file in `folder` into the manifest and writes it, last of all."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    records = {
        name: FileRecord(sha256_of(folder / name), (folder / name).stat().st_size)
        for name in names
        if name != MANIFEST and name.split("/")[0] not in _UNHASHED
    }
    manifest = dataclasses.replace(manifest, files=records)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
