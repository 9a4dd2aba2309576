"""Which module may know which, what the package exports, and what a running model leaves out of memory."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgevlm

ROOT = Path(edgevlm.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if path != ROOT / "__init__.py"
}

#: Package or module → what of edgevlm it may import, itself aside.
MAY_IMPORT = {
    "errors": set(),
    "tensors": {"errors"},
    "boxes": set(),
    "bundle": {"errors"},
    "graphs": {"bundle", "errors", "tensors"},
    "models": {"bundle", "errors", "images", "prompt"},
    "kernels": set(),
    "runtimes": {"bundle", "engines", "errors", "kernels"},
    # What runs bundles is above `quant`; it knows the default calibration set, and nothing else of it.
    "quant": {"bundle", "calibration", "errors", "graphs", "tensors"},
    "calibration": {"bundle", "errors", "images", "prompt", "runtimes", "scenes", "vlm"},
    "evaluation": {
        "__version__",
        "bundle",
        "errors",
        "export",
        "generate",
        "images",
        "models",
        "prompt",
        "reference",
        "scenes",
        "verify",
        "vlm",
    },
    "engines": {"bundle", "errors", "graphs", "images", "targets", "tensors"},
    "export": {"bundle", "errors", "graphs", "models", "quant", "tensors"},
    "generate": {"bundle", "errors", "runtimes"},
    "images": {"errors"},
    "prompt": {"errors"},
    "vlm": {"boxes", "bundle", "errors", "generate", "images", "models", "prompt", "runtimes"},
    "speed": {"scenes", "vlm"},
    "targets": {"errors"},
    # What a model weighs is found as the export finds it, without weights.
    "plan": {"bundle", "errors", "export", "generate", "images", "models", "quant", "targets"},
    "tune": {
        "__version__",
        "bundle",
        "calibration",
        "errors",
        "evaluation",
        "export",
        "graphs",
        "quant",
        "speed",
        "vlm",
    },
    "reference": {"models", "prompt"},
    "verify": {"bundle", "errors", "export", "generate", "models", "prompt", "reference", "scenes", "vlm"},
}


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports anywhere, `edgevlm.x` for what it imports from the package itself."""
    package = ["edgevlm", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            origin = ".".join(filter(None, [base, node.module]))
            yield from (
                (f"{origin}.{alias.name}" for alias in node.names) if origin == "edgevlm" or node.module is None else [origin]
            )


def known_here(path: Path) -> set[str]:
    """The first level of what a file imports of edgevlm."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("edgevlm.")}


def test_imports_are_found() -> None:
    assert known_here(ROOT / "export" / "export.py") >= {"bundle", "errors", "graphs", "models", "quant", "tensors", "export"}
    assert {"vlm", "errors"} <= known_here(ROOT / "__init__.py")
    assert "torch" in set(imports(ROOT / "models" / "decoder.py"))
    assert set(MAY_IMPORT) <= {module.split(".")[0] for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_direction_of_imports(module: str) -> None:
    unit, known = module.split(".")[0], known_here(MODULES[module])
    if unit in MAY_IMPORT:
        assert known <= MAY_IMPORT[unit] | {unit}
    if unit not in {"cli", "__main__"}:
        assert "cli" not in known


ROBOT = {"kernels", "runtimes", "generate", "images", "prompt", "vlm", "boxes", "bundle", "errors"}
#: Of the engines, what finds and loads them; what builds them is the workshop's.
ROBOT_ENGINES = {f"engines{name}" for name in ("", ".plan", ".profiles", ".record", ".target", ".tensorrt")}


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] in ROBOT or m in ROBOT_ENGINES])
def test_robot_modules_name_no_workshop_package(module: str) -> None:
    heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub", "ml_dtypes", "rich"}
    assert {name.split(".")[0] for name in imports(MODULES[module])} & heavy == set()


def test_exports() -> None:
    public = {
        name
        for name, value in vars(edgevlm).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("edgevlm")
    }
    assert public | {"__version__"} == set(edgevlm.__all__)
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        defined |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        defined |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        defined |= {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
        named = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
        listed = set(ast.literal_eval(named[0])) if named else set()
        assert listed <= defined, module


def test_version_is_the_packages() -> None:
    from importlib import metadata

    assert edgevlm.__version__ == metadata.version("edgevlm")


RUN = """
import json, sys
import numpy as np
from edgevlm import VLM

vlm = VLM.load(sys.argv[1], capacity=256)
reply = vlm.generate("How many cubes?", images=[np.zeros((40, 30, 3), np.uint8)], max_new_tokens=3)
loaded = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps({"tokens": len(reply.tokens), "reason": reply.finish_reason, "loaded": loaded}))
"""


def test_running_a_model_loads_no_workshop_package(bundle: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, str(bundle)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["tokens"] == 3 or said["reason"] == "stop"
    assert "onnxruntime" in said["loaded"]
    unwanted = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub", "ml_dtypes", "rich"}
    assert unwanted & set(said["loaded"]) == set()
