"""The pages: their Python examples run, their commands can be given, and their links lead to files that exist."""

import re
import shlex
from pathlib import Path

import pytest

from gem_fast.paper.cli import _parse

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/README.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^ {4}[^#\n]* -m gem_fast (.*?)(?: +#.*)?$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)")


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md", "docs/beyond_the_paper.md"])
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


def test_commands_are_understood():
    commands = [command for page in PAGES for command in COMMAND.findall(page.read_text())]
    assert len(commands) > 10
    for command in commands:
        assert _parse(shlex.split(command)) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_local_links_lead_to_files(page: Path):
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
