"""The README's examples run as written, and each of its two commands is one line."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(text, language):
    """The code in a text's blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_first_example_runs(capsys):
    example = blocks(README, "python")[0]
    exec(example, {"__name__": "readme"})  # noqa: S102 - the README's own code
    said = re.search(r"  # (.*)", example).group(1)
    assert capsys.readouterr().out.strip() == said


def test_the_other_examples_run():
    others = blocks(README, "python")[1:]
    assert others
    for example in others:
        exec(example, {"__name__": "readme"})  # noqa: S102 - the README's own code


@pytest.mark.parametrize(
    ("heading", "runs"), [("Run it", "-m sparse_attn"), ("Test it", "-m pytest")]
)
def test_each_command_is_one_line(heading, runs):
    sections = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert len(sections) == 1
    found = blocks(sections[0], "sh")
    assert len(found) == 1
    assert found[0].count("\n") == 1
    assert runs in found[0]


def test_there_are_two_commands():
    assert len(blocks(README, "sh")) == 2


def test_its_picture_and_links_are_there():
    root = Path(__file__).parents[1]
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if "://" not in target]
    assert local
    assert all((root / target).exists() for target in local)


def test_its_ratios_are_those_of_the_benchmark():
    def cells(text):
        return [tuple(x.strip() for x in line.split("|")[1:5]) for line in text.splitlines()]

    speed = re.search(r"^## Speed\n(.*?)^## ", README, re.DOTALL | re.MULTILINE).group(1)
    ratios = [row for row in cells(speed) if len(row) == 4 and "n = " in row[0]]
    page = Path(__file__).parents[1] / "docs" / "benchmarks.md"
    assert len(ratios) > 5
    assert set(ratios) <= set(cells(page.read_text(encoding="utf-8")))
