"""What the commands share: arguments that are checked, and output that fits a terminal."""

import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import textwrap
from pathlib import Path

from sparse_attn.checks import closest
from sparse_attn.pictures import ASCII_SHADES, SHADES

__all__ = [
    "draw",
    "output_file",
    "parse",
    "positive_int",
    "printable",
    "quiet_ends",
    "say",
    "shades",
    "wrap",
]

INTERRUPTED, BROKEN_PIPE = 130, 141  # what a shell tells of a tool that ends by these signals
GAP = 4  # between pictures
LEAST, MOST = 32, 48  # characters across a picture, where pictures stand side by side


def parse(parser, commands, argv):
    """The options of a command line; an error says what was probably meant.

    Args:
        parser: an `ArgumentParser` with commands.
        commands: their parsers by name.
        argv: a list of str.
    """
    command = argv[0]
    if command not in commands and not command.startswith("-"):
        meant = f"show '{command}'" if "(" in command else closest(command, commands)
        requirement = f"must be {' or '.join(commands)}.{_did_you_mean(meant)}"
        parser.error(f"argument COMMAND: {requirement} Received: {command}")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        parser = commands[command]
        meant = closest(unknown[0].split("=")[0], re.findall(r"--[\w-]+", parser.format_usage()))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}.{_did_you_mean(meant)}")
    return options


def _did_you_mean(name):
    return f" Did you mean {name}?" if name else ""


def positive_int(text):
    """The type of an argument that is a positive int."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive int. Received: {text}")
    return number


def output_file(suffix):
    """The type of an argument that names a file to write; that it can be written is tried."""

    def check(text):
        path = Path(os.path.realpath(text))  # to replace what a link points to, not the link
        if path.suffix != suffix or not path.parent.is_dir():
            requirement = f"must be a {suffix} file in a folder that exists"
            raise argparse.ArgumentTypeError(f"{requirement}. Received: {text}")
        requirement = "must be a file that can be written"
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise argparse.ArgumentTypeError(f"{requirement}. Received: {text}")
        try:
            part_of(path).touch()
            part_of(path).unlink()
        except OSError as error:
            told = f"{requirement}. Received: {text} ({error.strerror})"
            raise argparse.ArgumentTypeError(told) from None
        return path

    return check


def part_of(path):
    """Where a file is written before it takes its place as a whole."""
    return path.with_name(f".{os.getpid()}.part{path.suffix}")


def write_whole(path, write):
    """Write a file so that it is there as a whole, or as it was before.

    Args:
        path: a `Path`.
        write: a function that writes to the `Path` it is called with.
    """
    try:
        write(part_of(path))
        os.replace(part_of(path), path)
    finally:
        part_of(path).unlink(missing_ok=True)


@contextlib.contextmanager
def quiet_ends():
    """End without a traceback where the reader of the output is gone, or at Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see `_startup`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _let_go_of_output()
        sys.exit(BROKEN_PIPE)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _let_go_of_output():
    """Nothing is written any more: Python flushes once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def columns():
    """How many characters fit into a line of the terminal."""
    return max(16, shutil.get_terminal_size().columns)


def wrap(text, indent=0):
    """Lines of text, each no longer than the terminal is wide.

    Args:
        text: a str. What stands before the text of a line stays as it is.
        indent: how far all but the first of the lines that are made of one are indented.
    """
    room, made = columns(), []
    for line in text.split("\n"):
        start = line[: len(line) - len(line.lstrip())]
        made += textwrap.wrap(
            line.strip(),
            room,
            initial_indent=start,
            subsequent_indent=" " * min(indent, room // 5),
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(made)


def say(text="", end="\n"):
    """Print text; characters that the encoding of the output lacks are shown by their numbers."""
    text = text.encode(_encoding(), "backslashreplace").decode(_encoding())
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise  # see `quiet_ends`
    except OSError as error:
        _let_go_of_output()
        sys.exit(f"The output cannot be written: {error.strerror}")


def _encoding():
    """The encoding of the output; where the locale is the plain one, Python may take another."""
    if os.environ.get("LC_ALL") in ("C", "POSIX") and "PYTHONIOENCODING" not in os.environ:
        return "ascii"
    return getattr(sys.stdout, "encoding", None) or "ascii"


def printable(text):
    """Text that does nothing to a terminal but to fill lines."""
    return "".join(
        x if x.isprintable() or x in "\n\t" else "\N{REPLACEMENT CHARACTER}" for x in text
    )


def shades():
    """Characters for pictures that the output shows: those of ASCII where it has no others."""
    try:
        SHADES.encode(_encoding())
    except UnicodeEncodeError:
        return ASCII_SHADES
    return SHADES


def draw(patterns, n):
    """Pictures of patterns under their names: side by side as far as there is room, or below.

    Args:
        patterns: a list of `Pattern`.
        n: number of queries and of keys.

    Returns:
        A str of lines.
    """
    room = columns()
    in_row = max(1, min(len(patterns), (room + GAP) // (LEAST + GAP)))
    width = min(MOST, (room - GAP * (in_row - 1)) // in_row)
    rows = []
    for start in range(0, len(patterns), in_row):
        some = patterns[start : start + in_row]
        names = [textwrap.wrap(repr(pattern), width, break_on_hyphens=False) for pattern in some]
        height = max(map(len, names))
        blocks = [
            [""] * (height - len(name)) + name + pattern.text(n, None, width, shades()).split("\n")
            for name, pattern in zip(names, some, strict=True)
        ]
        lines = zip(*blocks, strict=True)
        rows += [
            "\n".join((" " * GAP).join(x.ljust(width) for x in line).rstrip() for line in lines)
        ]
    return "\n\n".join(rows)
