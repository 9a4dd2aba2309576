"""Weights that are cast and transposed in blocks on their way to disk: the same bytes as all at once."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
import ml_dtypes
import onnx_ir as ir
from safetensors.numpy import save_file

from edgevlm import tensors
from edgevlm.models import Rows
from edgevlm.tensors import StoredTensor, column_blocks, read_safetensors_index

SHAPES = {
    "matrix": (37, 11),
    "row": (1, 9),
    "column": (9, 1),
    "wide": (3, 200),
    "empty": (0, 4),
    "vector": (23,),
    "kernel": (6, 3, 5, 5),
}
SOURCES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module", params=SOURCES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(SOURCES[request.param]) for name, shape in SHAPES.items()}
    path = tmp_path_factory.mktemp("tensors") / "model.safetensors"
    save_file(arrays, path, metadata={"format": "pt"})
    return path, arrays


@pytest.mark.parametrize("block_bytes", [1, 64, 4 * 11 * 5, 32 << 20])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_streamed_bytes_are_the_whole_tensors(
    stored: tuple[Path, dict[str, np.ndarray]], dtype: ir.DataType, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", block_bytes)
    path, arrays = stored
    for name, entry in read_safetensors_index(path).items():
        for transposed in [False, True] if len(entry.shape) == 2 else [False]:
            tensor = StoredTensor(entry, dtype, name, transposed=transposed)
            expected = np.ascontiguousarray(arrays[name].T if transposed else arrays[name]).astype(dtype.numpy())
            file = io.BytesIO()
            tensor.tofile(file)
            assert file.getvalue() == tensor.numpy().tobytes() == tensor.tobytes() == expected.tobytes()
            assert tensor.nbytes == len(file.getvalue())
            assert tuple(tensor.shape) == expected.shape


@pytest.mark.parametrize("block_bytes", [64, 32 << 20])
@pytest.mark.parametrize(("first", "count", "period"), [(0, 2, 6), (2, 4, 6), (1, 1, 3), (0, 2, 2), (1, 2, 3), (5, 1, 6)])
def test_rows_of_a_tensor_are_one_of_their_own(
    stored: tuple[Path, dict[str, np.ndarray]], first: int, count: int, period: int, block_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tensors, "BLOCK_BYTES", block_bytes)
    path, _ = stored
    rng = np.random.default_rng(0)
    entries = read_safetensors_index(path)
    dtype = entries["matrix"].map().dtype
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in (("w", (6, 11)), ("b", (6,)), ("k", (6, 3, 2)))}
    path = path.with_name(f"rows-{first}-{count}-{period}-{block_bytes}.safetensors")
    save_file(arrays, path)
    for name, entry in read_safetensors_index(path).items():
        part = entry.rows(first, count, period)
        wanted = Rows(first, count, period).of(arrays[name])
        assert part.shape == wanted.shape == (6 // period * count, *arrays[name].shape[1:])
        np.testing.assert_array_equal(part.map(), wanted)
        kept = [row for row in range(6) if first <= row % period < first + count]
        np.testing.assert_array_equal(wanted, arrays[name][kept])
        assert isinstance(part.map(), np.memmap) == (period == 6)
        for transposed in [False, True] if wanted.ndim == 2 else [False]:
            tensor, file = StoredTensor(part, ir.DataType.FLOAT, name, transposed=transposed), io.BytesIO()
            tensor.tofile(file)
            assert file.getvalue() == np.ascontiguousarray(wanted.T if transposed else wanted, np.float32).tobytes()


def test_blocks_are_small(stored: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 4 * 11 * 5)

    class Recorder(io.BytesIO):
        sizes: list[int]

        def write(self, data: object) -> int:  # type: ignore[override]
            self.sizes.append(len(bytes(data)))  # type: ignore[call-overload]
            return super().write(data)  # type: ignore[arg-type]

    file = Recorder()
    file.sizes = []
    StoredTensor(read_safetensors_index(stored[0])["matrix"], ir.DataType.FLOAT, "matrix").tofile(file)
    assert file.sizes == [4 * 11 * 5] * 7 + [4 * 11 * 2]


@pytest.mark.parametrize("block_bytes", [1, 400, 32 << 20])
@pytest.mark.parametrize("transposed", [False, True])
def test_column_blocks_cover_the_matrix(
    stored: tuple[Path, dict[str, np.ndarray]], block_bytes: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", block_bytes)
    path, arrays = stored
    tensor = StoredTensor(read_safetensors_index(path)["matrix"], ir.DataType.FLOAT, "matrix", transposed=transposed)
    expected = (arrays["matrix"].T if transposed else arrays["matrix"]).astype(np.float32)
    blocks = list(column_blocks(tensor))
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks], 1), expected)
    assert [part.start for part, _ in blocks] == [0, *(part.stop for part, _ in blocks[:-1])]
    assert blocks[-1][0].stop == expected.shape[1]
    assert all(block.dtype == np.float32 for _, block in blocks)
