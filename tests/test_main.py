"""The main job, as a user starts it."""

import argparse
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest

from sparse_attn import Causal, Local, PerHead, Strided, parse_pattern, plan, terminal, training
from sparse_attn.__main__ import main
from sparse_attn._startup import copy_but_notes, is_note

COMMAND = [sys.executable, "-m", "sparse_attn"]
ENVIRONMENT = {**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "80"}


def run(*arguments, **options):
    return subprocess.run(  # noqa: S603
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=ENVIRONMENT,
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


@pytest.fixture
def regular_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return text


def test_it_learns_a_regular_text(tmp_path, regular_text):
    model = tmp_path / "model.keras"
    done = run(
        "--text", regular_text, "--steps", "20", "--length", "128", "--save", model,
        "--pattern", "Local(16) | Atrous(16)",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no notes of TensorFlow
    before, after = re.search(r"text: (.*) before and (.*) after", done.stdout).groups()
    entropy = re.search(r"single bytes: +(.*)", done.stdout).group(1)
    assert float(after) < float(entropy) < float(before)
    assert "of all pairs are scored in Causal() & (Local(16) | Atrous(16))" in done.stdout
    assert re.search("[░▒▓█]{2}", done.stdout)  # the picture
    assert "20/20" in done.stdout
    assert "def " in done.stdout.split("A sample:")[1]
    assert model.stat().st_size > 100_000
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "model.keras"}
    assert fits(done.stdout.split("A sample:")[0].replace(str(tmp_path), ""), 80)


def test_ctrl_c_keeps_what_was_trained(tmp_path, regular_text):
    model = tmp_path / "model.keras"
    arguments = ["--text", regular_text, "--steps", "5000", "--length", "128", "--save", model]
    arguments += ["--pattern", "PerHead([Local(16), Atrous(16)])"]
    with subprocess.Popen(  # noqa: S603
        [*COMMAND, "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as job:
        told = iter(job.stdout.readline, "")
        assert any(line.startswith("1/5000, loss") for line in told)
        job.send_signal(signal.SIGINT)
        out, error = job.communicate(timeout=200)
    assert job.returncode == 130
    assert "Stopping after this step." in error
    assert "Traceback" not in error
    assert re.search(r"Stopped after \d+ of 5000 steps", out)
    assert f"Saved to {model}" in out
    loaded = keras.saving.load_model(model)
    assert loaded(np.zeros((1, 128), "int32")).shape == (1, 128, 256)


def test_a_reader_that_is_gone_ends_training_and_its_model_is_kept(tmp_path, regular_text):
    model = tmp_path / "model.keras"
    arguments = ["--text", regular_text, "--steps", "40", "--length", "128", "--save", model]
    with subprocess.Popen(  # noqa: S603
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as job:
        assert any(line.startswith("1/40, loss") for line in iter(job.stdout.readline, ""))
        job.stdout.close()
        assert job.stderr.read() == ""
    assert job.returncode == 141
    assert keras.saving.load_model(model)(np.zeros((1, 128), "int32")).shape == (1, 128, 256)


def test_a_reader_that_is_gone_ends_it_quietly():
    with subprocess.Popen(  # noqa: S603
        [*COMMAND, "show", "Causal()"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as job:
        job.stdout.close()
        assert job.stderr.read() == b""
    assert job.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_that_cannot_be_written_is_told():
    with open("/dev/full", "w") as full:
        job = subprocess.run(  # noqa: S603
            [*COMMAND, "show", "Causal()"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
    assert job.stderr == "The output cannot be written: No space left on device\n"
    assert job.returncode == 1


def fits(text, columns):
    return max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize("columns", [80, 40])
def test_pictures_fit_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    patterns = [Causal() & Local(128), Causal() & Strided(64), Local((None, 3)) & ~Strided(99)]
    lines = terminal.draw(patterns, 512).splitlines()
    assert fits("\n".join(lines), columns)
    beside = [line for line in lines if "Local(128)" in line and "Strided(64)" in line]
    assert len(beside) == (columns == 80)
    assert sum(line.startswith("Causal() & Strided(64)") for line in lines) == (columns == 40)
    monkeypatch.setenv("COLUMNS", "200")
    assert "Local(128)" + " " * 31 + "Causal() & S" in terminal.draw(patterns, 512)


@pytest.mark.parametrize("columns", [80, 40])
@pytest.mark.parametrize(
    "pattern",
    ["Causal() & (Local(64) | Prefix(4))", "PerHead([Causal(), Longformer(64, (0, 9, 700))])"],
)
def test_what_is_shown_fits_the_terminal(pattern, columns, monkeypatch, capsys, default_costs):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["show", pattern]) is None
    out = capsys.readouterr().out
    assert fits(out, columns)
    assert "masked by" in " ".join(out.split())
    assert re.search(r"training bytes\s+[\d.]+ [GM]B  ", out)


@pytest.mark.parametrize("arguments", [[], ["train"], ["show"]])
def test_help_fits_80_columns(arguments, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--help"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert fits(out, 80)
    assert ("--steps N" in out) == (arguments == ["train"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_shades_are_told_apart_in_every_encoding(encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", out)
    main(["show", "Causal() & Local(20)", "--length", "256"])
    told = out.buffer.getvalue().decode("ascii")
    assert (Causal() & Local(20)).text(256, shades=" .:+#") in told
    terminal.say("\udcff é ░")
    assert out.buffer.getvalue().decode(encoding).splitlines()[-1].endswith("\\u2591")


def test_the_plain_locale_has_plain_shades(monkeypatch):
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    for locale, shades in (("C", " .:+#"), ("C.UTF-8", " ░▒▓█")):
        monkeypatch.setenv("LC_ALL", locale)
        assert terminal.shades() == shades
        terminal.say("\ufffd")
        told = sys.stdout.buffer.getvalue().decode().splitlines()[-1]
        assert told == ("\\ufffd" if locale == "C" else "\ufffd")


def test_a_sample_does_nothing_to_a_terminal():
    assert terminal.printable("a\x1b[2Jé\r\n\tb") == "a\ufffd[2Jé\ufffd\n\tb"


def test_ctrl_c_before_the_training_ends_it_quietly(capsys):
    with pytest.raises(SystemExit) as leaving, terminal.quiet_ends():
        raise KeyboardInterrupt
    assert leaving.value.code == 130
    assert capsys.readouterr().err == "\nStopped.\n"


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with training.Progress(9) as progress:
        os.kill(os.getpid(), signal.SIGINT)
        assert progress.is_stopped
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


class Saved:
    """A model that can be saved at some places."""

    def __init__(self, bad=None):
        self.bad = bad

    def save(self, path):
        Path(path).write_text("half" if Path(path).parent == self.bad else "whole")
        if Path(path).parent == self.bad:
            raise OSError("the disk is full")


def test_a_model_that_cannot_be_saved_is_saved_elsewhere(tmp_path, monkeypatch, capsys):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    path = folder / "model.keras"
    path.write_text("as it was")
    assert training.save_model(Saved(folder), path, training.Progress(9)) == 1
    out, error = capsys.readouterr()
    assert f"argument --save: {path} was not written: the disk is full" in error
    saved = Path(re.search("Saved to (.*)", out).group(1))
    assert saved.parent.parent == elsewhere
    assert saved.read_text() == "whole"
    assert path.read_text() == "as it was"
    assert [each.name for each in folder.iterdir()] == ["model.keras"]


def test_training_that_was_stopped_is_kept_though_no_place_was_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    progress = training.Progress(9)
    assert training.save_model(Saved(), None, progress) == 0
    assert not [*tmp_path.iterdir()]
    progress.is_stopped, progress.done = True, 4
    assert training.save_model(Saved(), None, progress) == 130
    (saved,) = tmp_path.rglob("*.keras")
    assert capsys.readouterr().out == f"\nStopped after 4 of 9 steps\n\nSaved to {saved}\n"


def test_a_link_to_a_file_stays_one(tmp_path):
    (tmp_path / "model.keras").write_text("as it was")
    (tmp_path / "link.keras").symlink_to("model.keras")
    path = terminal.output_file(".keras")(str(tmp_path / "link.keras"))
    assert training.save_model(Saved(), path, training.Progress(9)) == 0
    assert (tmp_path / "link.keras").is_symlink()
    assert (tmp_path / "model.keras").read_text() == "whole"


@pytest.mark.parametrize("name", ["/proc/x.keras", "folder.keras"])
def test_a_place_is_tried_before_training(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.keras").mkdir()
    with pytest.raises(argparse.ArgumentTypeError, match="must be a file that can be written"):
        terminal.output_file(".keras")(name)
    assert terminal.output_file(".keras")("x.keras") == tmp_path / "x.keras"
    assert [each.name for each in tmp_path.iterdir()] == ["folder.keras"]


def test_text_may_be_any_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 10)
    train, held_out, notes = training.read_text(tmp_path, 9)
    assert bytes(train) + bytes(held_out) == bytes(range(256)) * 10
    assert (len(held_out), notes) == (256, [])


def test_a_folder_is_read_but_for_what_is_no_text(tmp_path, monkeypatch):
    folder = tmp_path / "tests"  # left out of the standard library, and of nothing else
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"a" * 500)
    (folder / "b.py").write_bytes(b"b" * 400)
    (folder / "c.bin").write_bytes(b"c")
    (folder / "d.txt").symlink_to("nowhere")
    os.mkfifo(folder / "e.txt")
    train, held_out, notes = training.read_text(folder, 9)
    assert sorted(bytes(train) + bytes(held_out)) == sorted(b"\n" + b"a" * 500 + b"b" * 400)
    assert notes == []

    monkeypatch.setattr(training, "MOST_BYTES", 300)
    train, held_out, notes = training.read_text(folder, 9)
    assert len(train) + len(held_out) == 300
    assert notes == ["It is cut after the first 300 bytes"]

    monkeypatch.setattr(training, "MOST_FILES", 4)
    with pytest.raises(ValueError, match="must be a folder of at most 4 files"):
        training.read_text(folder, 9)


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    def forbid(path, mode):
        if path.name != "c.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, mode)

    for name in "abc":
        (tmp_path / f"{name}.txt").write_bytes(b"a" * 500)
    monkeypatch.setattr(Path, "open", forbid)
    *_, notes = training.read_text(tmp_path, 9)
    assert re.fullmatch(r"Left out, as it cannot be read: .*[ab]\.txt and 1 more", notes[0])
    with pytest.raises(ValueError, match=r"text that can be read.*a\.txt \(Permission denied\)"):
        training.read_text(tmp_path / "a.txt", 9)


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


def test_all_but_notes_is_passed_on_even_if_the_writer_dies_within_a_line(tmp_path):
    read, write = os.pipe()
    os.write(write, b"one\n" + NOTES + b"\ntwo\nthree")
    os.close(write)
    with (tmp_path / "err").open("wb") as err:
        copy_but_notes(read, err.fileno())
    os.close(read)
    assert (tmp_path / "err").read_bytes() == b"one\n\ntwo\nthree"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: must be a positive int. Received: 0"),
        (["--length", "1.5"], "argument --length: must be a positive int. Received: 1.5"),
        (["train", "--steps", "x"], "argument --steps: must be a positive int. Received: x"),
        (["tain"], "COMMAND: must be train or show. Did you mean train? Received: tain"),
        (["Local(3)"], "Did you mean show 'Local(3)'? Received: Local(3)"),
        (["zzz"], "argument COMMAND: must be train or show. Received: zzz"),
        (["--stepz", "3"], "unrecognized arguments: --stepz 3. Did you mean --steps?"),
        (["train", "--zzz=3"], "unrecognized arguments: --zzz=3.\n"),
        (["--pattern", "Local(-1)"], "`window` must be a non-negative int"),
        (["--pattern", "print(1)"], "Received: print(1)"),
        (["--pattern", "local(4)"], "argument --pattern: There is no pattern local. Did you mean"),
        (
            ["--pattern", "PerHead([Local(3)] * 3)"],
            "must be a multiple of 3, the number of patterns",
        ),
        (["--pattern", "BigBird(32)", "--length", "64"], "made for lengths up to 32"),
        (
            ["--save", "model.txt"],
            "must be a .keras file in a folder that exists. Received: model.txt",
        ),
        (
            ["--save", "/proc/x.keras"],
            "argument --save: must be a file that can be written. Received",
        ),
        (
            ["--text", "nowhere"],
            "--text: must be a file or a folder that exists. Received: nowhere",
        ),
        (
            ["--text", "/dev/zero"],
            "--text: must be a regular file or a folder. Received: /dev/zero",
        ),
        (
            ["--text", "."],
            "must be a file, or a folder of .py and .txt files. Received: ., which has",
        ),
        (["--text", "x" * 300], "must be a file that can be read. Received: xxx"),
        (["--text", "setup.cfg"], "argument --text: must be a file or a folder that exists"),
        (["--text", os.devnull], "argument --text: must be a regular file or a folder. Received:"),
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
    assert done.stderr == ""
    assert pattern.text(4096) in done.stdout
    assert str(pattern.cost(4096, 8)) in done.stdout
    assert "".join(str(plan(pattern, 4096)).split()) in "".join(done.stdout.split())
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
        (["Local(3)", "--length", "0"], "argument --length: must be a positive int. Received: 0"),
        (["Local(3)", "--heads", "0"], "argument --heads: must be a positive int. Received: 0"),
        (["BigBird(64, 8)", "--length", "65"], "is made for lengths up to 64"),
        (["PerHead([Full()] * 2)", "--heads", "3"], "multiple of 2"),
        (
            ["Local(3)", "--save", "a.png"],
            "must be a .svg file in a folder that exists. Received: a.png",
        ),
        (["Local(3)", "--save", "no/a.svg"], "must be a .svg file in a folder that exists"),
        (["Local(3)", "--length", str(10**9)], "argument --length: must be at most 16,777,216"),
        (["PerHead([[[Causal()]*1024]*1024]*1024)"], "A list must hold at most 1024 patterns"),
        (["Longformer(3, -1)"], "`global_positions` must be a non-negative int"),
        (["Random(10**40)"], "An argument must be a literal or a pattern. Received: 10 ** 40"),
        (["Local(1, window=2)"], "multiple values for argument 'window'"),
        (["Local(window=1, window=2)"], "a keyword is repeated"),
        (["&".join(f"Local({i})" for i in range(900))], "`text` must be a pattern"),
        ([], "the following arguments are required: pattern"),
        (["Local(3)", "--lenth=9"], "unrecognized arguments: --lenth=9. Did you mean --length?"),
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
