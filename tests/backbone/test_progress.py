"""Items pass unchanged, with a bar only where one was asked for."""

import pytest

from skperf.backbone.progress import track


@pytest.mark.parametrize("verbose", [0, 1])
def test_items_pass_on_and_a_bar_says_what_it_counts(verbose, capsys):
    assert list(track([3, 1, 2], description="counting", verbose=verbose)) == [3, 1, 2]
    said = capsys.readouterr().err
    assert ("counting" in said and "3" in said) if verbose else said == ""


def test_a_length_that_is_not_known_is_given(capsys):
    assert list(track(iter("ab"), description="letters", total=2, verbose=1)) == ["a", "b"]
    assert "/2" in capsys.readouterr().err
