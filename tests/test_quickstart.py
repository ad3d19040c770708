"""The main job runs, answers every question and draws its figures."""

import pytest

from skperf import __main__ as quickstart


@pytest.mark.slow
def test_quickstart(tmp_path, capsys):
    quickstart.main(tmp_path)
    shown = capsys.readouterr().out
    assert shown.count("\n    answer") == shown.count("\n    instead") == 7
    assert "nan" not in shown
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"components.png", "influence.png", "performative.png", "reprogramming.png"}


def test_findings_are_wrapped():
    finding = quickstart.Finding("Why?", "word " * 40, "none", "call()")
    lines = str(finding).splitlines()
    assert lines[0] == "Why?"
    assert lines[1].startswith("    answer  word")
    assert lines[2].startswith("            word")
    assert max(map(len, lines)) <= 98
