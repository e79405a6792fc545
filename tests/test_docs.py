"""README, docs/ and the other pages: what they name is there, and they are plain English."""

import re
import shlex
from pathlib import Path

import pytest

from evit import commands as cli
from evit.commands import jobs
from tests.conftest import ROOT
from tests.test_readme import commands

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md")
]
PAGES += DOCS
LINES = {line: None for page in PAGES for line in commands(page.read_text())}


def test_each_fault_names_a_test_that_exists():
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    named = [re.findall(r"`(tests/\S+\.py)::(\w+)`", row) for row in rows]
    headers = [row for row, tests in zip(rows, named, strict=True) if not tests]
    assert all(row.endswith("| what happens | proof |") for row in headers), headers
    for path, name in sum(named, []):
        assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_sentence_begins_with_of_or_with_what_as_a_noun(page):
    text = re.sub(r"```.*?```|^    .*$", "", page.read_text(), flags=re.S | re.M)
    begun = re.findall(
        r"(?:^[#|*\-\s]*|[.:;!?|]\s+|\*\*\s*)((?:Of|What)\s[^.?!|]*[.?!|]?)", text, re.M
    )
    assert not [sentence for sentence in begun if not sentence.endswith("?")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if not path.startswith("http"):
            other = (page.parent / path) if path else page
            assert other.exists(), target
            titles = re.findall(r"^#+ (.*)$", other.read_text(), re.M) if heading else []
            names = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            assert not heading or heading in names, (target, names)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_files_of_the_package_that_a_page_names_are_there(page):
    rooms = "reducers|models|data|training|measure|report|commands"
    named = re.findall(
        rf"(?<![\w/])(?:src/evit/)?((?:{rooms})/[\w/]+\.(?:py|c))\b", page.read_text()
    )
    assert not [name for name in named if not (ROOT / "src/evit" / name).is_file()]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_every_page_begins_with_a_command_and_leads_to_others(page):
    text = page.read_text()
    assert re.match(r"# .+\n\n```(bash|python)\n", text) and "See also:" in text


@pytest.mark.parametrize("line", LINES)
def test_every_command_on_the_pages_composes(line):
    """Whatever else a command needs, its knobs and choices are there."""
    words = [word for word in shlex.split(line) if not re.match(r"(srun|--nproc|-m$)", word)]
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        name = words[1].removeprefix("sweep-")
        assert name in jobs.names() or re.search(rf"^{name}:", makefile, re.M)
        arguments = [a for w in words[2:] if w.startswith("ARGS=") for a in w[5:].split()]
        if words[1].startswith("sweep-"):
            jobs.split(arguments)
        return
    assert Path(words[0]).parent == Path(".venv/bin")
    program = Path(words[1]).stem
    assert words[1] == f"src/{program}.py"
    config = "config" if program == "train" else program
    arguments = [word for word in words[2:] if not word.startswith(("-", "reducer=["))]
    cli.check_spelling(arguments, config)
    cli.composed(config, [cli.quoted(argument) for argument in arguments])
