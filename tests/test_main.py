"""The main job, as a user starts it."""

import os
import re
import subprocess
import sys

import pytest


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


def test_it_learns_a_regular_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    model = tmp_path / "model.keras"
    done = run(
        "--text", text, "--steps", "12", "--length", "512", "--save", model,
        "--pattern", "Local(16) | Atrous(16)",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = re.search(r"text: (.*) before and (.*) after", done.stdout).groups()
    entropy = re.search(r"single bytes: +(.*)", done.stdout).group(1)
    assert float(after) < float(entropy) < float(before)
    assert "of all pairs are scored in Causal() & (Local(16) | Atrous(16))" in done.stdout
    assert "▓▓" in done.stdout
    assert "12/12" in done.stdout
    assert "def " in done.stdout.split("A sample:")[1]
    assert model.stat().st_size > 100_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: invalid positive_int value: '0'"),
        (["--pattern", "Local(-1)"], "`window` must be a non-negative int"),
        (["--pattern", "print(1)"], "Received: print(1)"),
        (["--save", "model.txt"], "must be a .keras file in a folder that exists: model.txt"),
        (["--text", "nowhere"], "No such file or directory: 'nowhere'"),
        (["--text", __file__], "`--text` must hold more than 40970 bytes. Received:"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
