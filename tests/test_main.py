"""The main job, as a user starts it."""

import os
import re
import subprocess
import sys

import pytest

from sparse_attn import Causal, Local, PerHead, parse_pattern, plan
from sparse_attn.__main__ import main


def run(*arguments, **options):
    command = [sys.executable, "-m", "sparse_attn", *arguments]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(  # noqa: S603
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=environment,
        **options,
    )


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """What the program says when it refuses some arguments, run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments):
        with pytest.raises(SystemExit) as leaving:
            main(list(arguments))
        assert leaving.value.code == 2
        return capsys.readouterr().err

    return refuse


def test_it_learns_a_regular_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    model = tmp_path / "model.keras"
    done = run(
        "--text", text, "--steps", "20", "--length", "128", "--save", model,
        "--pattern", "Local(16) | Atrous(16)",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = re.search(r"text: (.*) before and (.*) after", done.stdout).groups()
    entropy = re.search(r"single bytes: +(.*)", done.stdout).group(1)
    assert float(after) < float(entropy) < float(before)
    assert "of all pairs are scored in Causal() & (Local(16) | Atrous(16))" in done.stdout
    assert re.search("[░▒▓█]{2}", done.stdout)  # the picture
    assert "20/20" in done.stdout
    assert "def " in done.stdout.split("A sample:")[1]
    assert model.stat().st_size > 100_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: invalid positive_int value: '0'"),
        (["--pattern", "Local(-1)"], "`window` must be a non-negative int"),
        (["--pattern", "print(1)"], "Received: print(1)"),
        (["--pattern", "PerHead([Local(3)] * 4)"], "one of the `patterns` of a PerHead"),
        (["--pattern", "BigBird(32)", "--length", "64"], "made for lengths up to 32"),
        (["--save", "model.txt"], "must be a .keras file in a folder that exists: model.txt"),
        (["--text", "nowhere"], "No such file or directory: 'nowhere'"),
        (["--text", __file__], "`--text` must hold more than 40970 bytes. Received:"),
    ],
)
def test_wrong_arguments(arguments, message, refusal):
    assert message in refusal(*arguments)


def test_show_tells_picture_plan_and_cost(tmp_path, default_costs):
    saved = tmp_path / "picture.svg"
    text = "Causal() & (Local(64) | Atrous(64))"
    done = run("show", text, "--length", "4096", "--heads", "8", "--save", saved)
    assert done.returncode == 0, done.stderr
    pattern = parse_pattern(text)
    for part in (pattern.text(4096), str(plan(pattern, 4096)), str(pattern.cost(4096, 8))):
        assert part in done.stdout
    assert done.stdout.startswith(f"{text}, 4,096 queries down, as many keys across:")
    assert saved.read_text() == pattern.svg(4096)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.svg"]


def test_show_tells_of_each_pattern_of_a_per_head(default_costs):
    done = run("show", "PerHead([Local(4), Causal()])", "--length", "64")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Plan: 1 part(s)") == 2
    assert str(PerHead([Local(4), Causal()]).cost(64)) in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Local(-1)"], "`window` must be a non-negative int"),
        (["Local(3).mask(4)"], "Received: Local(3).mask(4)"),
        (["__import__('os')"], "Received: __import__('os')"),
        (["Local(3)", "--length", "0"], "`length` must be a positive int. Received: length=0"),
        (["BigBird(64, 8)", "--length", "65"], "is made for lengths up to 64"),
        (["PerHead([Full()] * 2)", "--heads", "3"], "multiple of 2"),
        (["Local(3)", "--save", "a.png"], "must be a .svg file in a folder that exists: a.png"),
        (["Local(3)", "--save", "no/a.svg"], "must be a .svg file in a folder that exists"),
        (["Local(3)", "--length", str(10**9)], "argument --length: at most 16,777,216"),
        (["PerHead([[[Causal()]*1024]*1024]*1024)"], "A list must hold at most 1024 patterns"),
        (["Longformer(3, -1)"], "`global_positions` must be a non-negative int"),
        (["Random(10**40)"], "An argument must be a literal or a pattern. Received: 10 ** 40"),
        (["Local(1, window=2)"], "multiple values for argument 'window'"),
        (["Local(window=1, window=2)"], "A pattern must be made of"),
        (["&".join(f"Local({i})" for i in range(900))], "`text` must be a pattern"),
        ([], "the following arguments are required: pattern"),
    ],
)
def test_wrong_arguments_of_show(arguments, message, refusal, tmp_path):
    assert message in refusal("show", *arguments)
    assert not list(tmp_path.iterdir())


def test_show_that_cannot_save_leaves_nothing(tmp_path):
    (tmp_path / "picture.svg").mkdir()
    done = run("show", "Local(3)", "--length", "9", "--save", "picture.svg", cwd=tmp_path)
    assert done.returncode == 2
    assert "argument --save: " in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["picture.svg"]
