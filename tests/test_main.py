"""The main job, as a user starts it."""

import os
import re
import subprocess
import sys

import pytest

from sparse_attn import Causal, Local, PerHead, parse_pattern, plan
from sparse_attn.__main__ import main
from sparse_attn._startup import is_note


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


NOTES = b"""\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795660063.955411    8009 port.cc:153] oneDNN custom operations are on.
2025-01-02 03:04:05.678901: I tensorflow/core/util/port.cc:153] oneDNN custom operations are on.
To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow with ...
E0000 00:00:1.2 9 cuda_dnn.cc:8310] Unable to register cuDNN factory: Attempting to register ...
W0000 00:00:1.2 9 computation_placer.cc:177] computation placer already registered. Please ...
"""
NO_GPU = b"E0000 00:00:1.2 8009 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error"


def test_notes_of_tensorflow_are_told_from_errors():
    assert all(is_note(line, has_gpu=True) for line in NOTES.splitlines())
    assert is_note(NO_GPU, has_gpu=False)
    assert not is_note(NO_GPU, has_gpu=True)
    for error in (
        b"F0000 00:00:1.2 9 cpu_feature_guard.cc:1] The TensorFlow library was compiled to use AVX",
        b"E0000 00:00:1.2 9 gpu.cc:1] out of memory",
        b"W0000 00:00:1.2 9 gpu.cc:1] Allocation of 12 exceeds 10% of free system memory.",
        b"2025-01-02 03:04:05.678901: W tensorflow/core/x.cc:1] Allocation of 12 exceeds 10%",
        b"Fatal Python error: Segmentation fault",
        b"",
    ):
        assert not is_note(error, has_gpu=False)


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
        (["Local(window=1, window=2)"], "a keyword is repeated"),
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
