"""What the metadata says, held against the tree."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import skperf
from skperf.backbone._sklearn import DOC_LINK

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
)


def requirements(lines):
    return [each for each in map(Requirement, lines) if each.name != "skperf"]


def test_one_version():
    assert PROJECT["version"] == skperf.__version__
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited[1] == skperf.__version__
    assert f"## {skperf.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_estimators_link_to_the_published_documentation():
    assert DOC_LINK.startswith(PROJECT["urls"]["Documentation"])
    # and below it to where autosummary puts a page, see docs/api.md
    assert DOC_LINK.removeprefix(PROJECT["urls"]["Documentation"]).startswith("api/skperf.")


@pytest.mark.parametrize("extra", ["", *sorted(set(EXTRAS) - {"text"})])
def test_the_tested_versions_satisfy_the_requirements(extra):
    needed = requirements(EXTRAS[extra] if extra else PROJECT["dependencies"])
    found = {name.lower().replace("_", "-"): version for name, version in PINNED.items()}
    missing = [each for each in needed if each.name.lower() not in found]
    assert missing == []
    assert [each for each in needed if found[each.name.lower()] not in each.specifier] == []


def test_torch_is_asked_for_as_tested():
    (torch,) = (each for each in requirements(PROJECT["dependencies"]) if each.name == "torch")
    assert str(torch.specifier) == ">=" + ".".join(PINNED["torch"].split(".")[:2])


def test_the_oldest_versions_are_the_lower_bounds():
    oldest = dict(
        line.split("==")
        for line in re.findall(r"^\S+==\S+$", (ROOT / "oldest.txt").read_text(), re.MULTILINE)
    )
    for each in requirements(PROJECT["dependencies"]):
        if each.name != "torch":
            (bound,) = each.specifier
            assert bound.operator == ">="
            assert oldest[each.name].startswith(bound.version)


def test_every_licence_of_the_shipped_files_is_declared():
    table = (ROOT / "skperf" / "datasets" / "data" / "LICENSES.md").read_text()
    named = set(re.findall(r"MIT|Apache-2\.0|CC-BY-4\.0|CC0-1\.0|BSD-3-Clause", table))
    assert set(PROJECT["license"].split(" AND ")) == named


def test_the_package_is_marked_as_typed():
    assert (ROOT / "skperf" / "py.typed").exists()
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_the_workflow_runs_what_a_machine_runs():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: .ci/run" in workflow
    declared = {
        each.rpartition(" ")[2] for each in PROJECT["classifiers"] if "Python :: 3." in each
    }
    assert set(re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", workflow)[1])) == declared
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", workflow)) <= targets
