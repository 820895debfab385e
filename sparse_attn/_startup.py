"""What `python -m sparse_attn` does before the frameworks are imported, which takes seconds.

TensorFlow writes notes about its start to the file descriptor of stderr, from C++
and before any of its settings is read. In the main job a second process reads
that descriptor and passes on all lines but these notes. An error is passed on
even if it ends the first process at once. Python's own `sys.stderr` writes to
the terminal directly.

Nothing here acts on a program that imports `sparse_attn`. With
`TF_CPP_MIN_LOG_LEVEL=0` in the environment, all notes are shown.
"""

import os
import re
import signal
import sys
from pathlib import Path

__all__ = []

_NOTES = re.compile(
    rb"I\d{4} |[-\d]+ [:.\d]+: I |WARNING: All log messages before absl::InitializeLog"
    # What follows the note on the instructions of the CPU, on a line of its own.
    rb"|To enable the following instructions: .* rebuild TensorFlow"
    # TensorFlow's own parts, each of which registers a library again.
    rb"|.*\] Unable to register \w+ factory"
    rb"|.*\] computation placer already registered"
)
_NO_GPU = re.compile(rb".*\] failed call to cuInit")  # an error where there is a GPU


def is_note(line, has_gpu):
    """Whether a line of stderr, as bytes, is one of TensorFlow's notes about its start."""
    return bool(_NOTES.match(line)) or (not has_gpu and bool(_NO_GPU.match(line)))


def _is_main_job():
    """Whether Python is about to run `-m sparse_attn`, and imports the package for that."""
    if sys.argv[:1] != ["-m"]:  # as `sys.argv` is while the module is looked for
        return False
    return sys.orig_argv[-len(sys.argv)].endswith("sparse_attn")


def _filter_notes():
    """Let a process of its own read what is written to the descriptor of stderr."""
    stderr = os.dup(2)
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when the main job does
            for descriptor in (0, 1, 2, write):
                os.close(descriptor)
            copy_but_notes(read, stderr)
        finally:
            os._exit(0)
    os.dup2(write, 2)
    os.close(read)
    os.close(write)
    sys.stderr = sys.__stderr__ = open(  # noqa: SIM115 - it is open to the end
        stderr, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors
    )


def copy_but_notes(read, write):
    """Copy lines from one file descriptor to another, but for TensorFlow's notes."""
    has_gpu = any(Path("/dev").glob("nvidia*"))
    rest = b""
    while data := os.read(read, 2**16):
        *lines, rest = (rest + data).split(b"\n")
        kept = b"".join(line + b"\n" for line in lines if not is_note(line, has_gpu))
        os.write(write, kept)
    os.write(write, rest)


if _is_main_job():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # during imports there is nothing to keep
    _is_open = all((sys.stdin, sys.stdout, sys.stderr))  # so that new descriptors are others
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "0" and hasattr(os, "fork") and _is_open:
        _filter_notes()
