"""The pages: their Python examples run, and their links lead to files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/README.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)")


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_examples_run(name: str, caplog: pytest.LogCaptureFixture):
    page = (ROOT / name).read_text()
    blocks = list(BLOCK.finditer(page))
    assert blocks
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        # Leading empty lines make the line numbers of a failure those of the page.
        code = "\n" * page.count("\n", 0, block.start(1)) + block[1]
        exec(compile(code, name, "exec"), namespace)
    assert not caplog.records, "a model of the page was left to one backward per task"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_local_links_lead_to_files(page: Path):
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
