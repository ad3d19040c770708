"""Results name where they came from, and pages show nothing else."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import runner

ROOT = Path(__file__).parents[2]
# results that are not there yet, or are of an older form of their benchmark: the pages say so
AWAITED: set[str] = set()
PAGES = sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "docs" / "guide").glob("*.md"))


def test_a_result_names_where_it_came_from(tmp_path):
    rows = [{"seed": 1, "score": 0.5}, {"seed": 0, "score": 0.25}]
    runner.save(tmp_path / "results" / "found.json", rows)
    kept = json.loads((tmp_path / "results" / "found.json").read_text())
    assert kept["rows"] == rows
    origin = kept["provenance"]
    assert origin["command"].startswith("python -m ")
    assert origin["seeds"] == [0, 1]
    assert re.fullmatch(r"[0-9a-f]{7,}( and changes)?|unknown", origin["commit"])
    assert origin["threads"] == 1
    assert {"python", "torch", "scikit-learn"} <= set(origin["versions"])
    assert {"processor", "cores"} <= set(origin["machine"])
    assert runner.load(tmp_path / "results" / "found.json") == rows


@pytest.mark.parametrize("older", [[{"a": 1}], {"rows": [{"a": 1}]}], ids=["list", "rows"])
def test_older_results_are_read(tmp_path, older):
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert runner.load(tmp_path / "older.json") == [{"a": 1}]


def test_rows_of_another_commit_are_not_gone_on_with(tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    assert runner.begun(path) == []
    runner.save(path, [{"a": 1}])
    assert runner.begun(path) == [{"a": 1}]
    monkeypatch.setattr(runner, "_commit", lambda: "another")
    assert runner.begun(path) == []


def test_every_table_of_the_pages_is_the_result_of_a_workload():
    made = {result for workload in runner.WORKLOADS for result in workload.results}
    shown = {
        name
        for page in PAGES
        for name in re.findall(
            r"(?:benchmark-table\} |benchmarks/results/)(\w[\w.]*\.(?:json|png))", page.read_text()
        )
    }
    assert shown
    assert sorted(shown - made) == []


def test_no_table_of_figures_is_typed_by_hand():
    figure = re.compile(r"[-±~<>]*\d[\d,]*\.?\d*|[-±]?\.\d+")
    for page in PAGES:
        for line in page.read_text().splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            typed = [cell for cell in cells[1:] if figure.match(cell) and "`" not in cell]
            assert not (line.startswith("|") and len(typed) > 1), f"{page.name}: {line}"


def test_every_column_that_a_page_asks_for_is_in_the_result():
    asked = re.compile(r"benchmark-table\} (\S+)\n:columns: (.*)")
    for page in PAGES:
        for result, columns in asked.findall(page.read_text()):
            if result in AWAITED:
                continue
            known = {key for row in runner.load(runner.RESULTS / result) for key in row}
            keys = {column.strip().partition(" as ")[0] for column in columns.split(",")}
            assert keys - known == set()


def test_every_workload_is_a_script_whose_results_are_committed():
    for workload in runner.WORKLOADS:
        assert (ROOT / "benchmarks" / f"{workload.command.split()[0]}.py").exists()
        missing = [r for r in workload.results if not (runner.RESULTS / r).exists()]
        assert [result for result in missing if result not in AWAITED] == []
        assert not workload.page or (ROOT / "docs" / f"{workload.page}.md").exists()


def test_the_command_lists_a_group():
    command = [sys.executable, "-m", "benchmarks.runner", "--list", "cluster"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1].strip() == "python -m benchmarks.cluster"


def test_an_unknown_group_is_refused(capsys):
    with pytest.raises(SystemExit):
        runner.main(["everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err
