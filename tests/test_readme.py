import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# pages whose blocks run one after another, and how many there are
PAGES = {"README.md": 5, "docs/guide/estimators.md": 4}


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_runs(page, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert len(blocks) == PAGES[page]
    namespace = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    assert capsys.readouterr().out or page != "README.md"


def test_the_front_page_draws(monkeypatch):
    import matplotlib.pyplot as plt

    (code,) = re.findall(
        r"```\{front-page\} \S+\n(.*?)```", (ROOT / "docs/index.md").read_text(), flags=re.DOTALL
    )
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, "docs/index.md", "exec"), {})
    assert len(plt.gcf().axes) == 3 * 9
    plt.close("all")
