"""The rules of the house that import-linter reads from lists, held against the tree."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("backbone", "performative", "reprogramming", "influence", "components")


def test_every_file_of_mathematics_is_linted_as_such():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contract = next(
        contract
        for contract in config["tool"]["importlinter"]["contracts"]
        if contract["name"].startswith("mathematics")
    )
    files = [f for folder in FOLDERS for f in (ROOT / "skperf" / folder).glob("[!_]*.py")]
    assert set(contract["source_modules"]) == {f"skperf.{f.parent.name}.{f.stem}" for f in files}


def test_private_names_of_scikit_learn_are_imported_in_one_file():
    offenders = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "skperf").rglob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("from sklearn")
        and ("._" in line.split(" import ")[0] or line.split(" import ")[-1].startswith("_"))
    }
    assert offenders == {"skperf/backbone/_sklearn.py"}
