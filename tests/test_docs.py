"""Documentation that is generated, or that names things which exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent


def test_the_cli_reference_is_what_the_program_says() -> None:
    page = runpy.run_path(str(ROOT / "tools" / "cli_reference.py"))
    assert page["PAGE"].read_text(encoding="utf-8") == page["reference"](), "run `make docs`"


def test_every_dependency_has_its_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[<>=; ]", d)[0] for d in declared} - {"edgevlm"}
    listed = set(
        re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert names == listed


def test_the_readme_names_every_file_of_the_package() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = [
        p.relative_to(ROOT / "edgevlm")
        for p in (ROOT / "edgevlm").rglob("*.py")
        if p.name not in ("__init__.py", "__main__.py")
    ]
    missing = [str(f) for f in files if f"`{f}`" not in readme]
    assert not missing


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_version_is_one() -> None:
    import edgevlm

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert edgevlm.__version__ == project["version"] == newest.group(1)
