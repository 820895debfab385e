"""What the main job needs beside its model: text to read, Ctrl-C, a place for the model."""

import os
import signal
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

from sparse_attn.terminal import INTERRUPTED, columns, say, write_whole

__all__ = ["Progress", "read_text", "save_model", "unigram_entropy", "windows"]

MOST_BYTES = 2**28  # of text; beyond, it is cut
MOST_FILES = 2**17  # in a folder
_LEFT_OUT = {"site-packages", "test", "tests"}  # of the standard library


def read_text(path, length):
    """Bytes to train on and bytes held out.

    Args:
        path: a `Path`: a file, the end of which is held out, or a folder, whole files
            of which are; `None` is the standard library of Python.
        length: of a stretch of text; ten of them are needed.

    Returns:
        `(train, held_out, notes)`: two `(n,)` uint8 arrays, and a list of str that say
        what was left out.

    Raises:
        ValueError: if there is no such text, or too little.
    """
    files, left_out = _files(path)
    text, unread, room, is_cut = [], list(left_out), MOST_BYTES, False
    for file in files:
        try:
            with file.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                text.append(opened.read(min(size, room)))
        except OSError as error:
            unread.append(error)
            continue
        is_cut, room = size > room, room - len(text[-1])
        if is_cut:
            break
    if unread and not text:
        raise ValueError(f"must be text that can be read. Received: {path} ({unread[0].strerror})")
    text = b"\n".join(text)
    if len(text) <= 10 * (length + 1):
        requirement = f"must hold more than {10 * (length + 1)} bytes"
        raise ValueError(f"{requirement}. Received: {path}, {len(text)} bytes")
    notes = [f"It is cut after the first {MOST_BYTES:,} bytes"] if is_cut else []
    if unread:
        others = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        notes.append(f"Left out, as it cannot be read: {unread[0].filename}{others}")
    data = np.frombuffer(text, "uint8")
    return *np.split(data, [len(data) * 9 // 10]), notes


def _files(path):
    """The files that a path stands for, in the order in which they are read, and errors."""
    folder = Path(sysconfig.get_path("stdlib")) if path is None else path
    try:
        if folder.is_file():
            return [folder], []
        if not folder.is_dir():
            kind = (
                "a regular file or a folder"
                if folder.exists()
                else "a file or a folder that exists"
            )
            raise ValueError(f"must be {kind}. Received: {folder}")
    except OSError as error:
        told = f"must be a file that can be read. Received: {folder} ({error.strerror})"
        raise ValueError(told) from None
    found, errors, seen = [], [], 0
    for parent, folders, names in os.walk(folder, onerror=errors.append):
        if path is None:
            folders[:] = set(folders) - _LEFT_OUT
        seen += len(folders) + len(names)
        if seen > MOST_FILES:
            raise ValueError(
                f"must be a folder of at most {MOST_FILES:,} files. Received: {folder}"
            )
        found += [Path(parent, name) for name in names if name.endswith((".py", ".txt"))]
    found = sorted(file for file in found if file.is_file())  # and no pipe that never ends
    if not found and not errors:
        requirement = "must be a file, or a folder of .py and .txt files"
        raise ValueError(f"{requirement}. Received: {folder}, which has none")
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order], errors


def windows(data, count, length):
    """Random stretches of text, and the same ones a byte later."""
    starts = np.random.default_rng(1).integers(0, len(data) - length, count)
    stretches = np.stack([data[start : start + length + 1] for start in starts]).astype("int32")
    return stretches[:, :-1], stretches[:, 1:]


def unigram_entropy(data):
    share = np.bincount(data) / len(data)
    return -sum(share * np.log2(share, where=share > 0, out=np.zeros(len(share))))


class Progress(keras.callbacks.Callback):
    """Says how far training is, and stops it at Ctrl-C, after the current step.

    A second Ctrl-C raises `KeyboardInterrupt` at once.

    Args:
        steps: how many steps there are.
        path: where the model is saved if the reader of the output is gone, a `Path`, or `None`.

    Attributes:
        done: how many steps are done.
        is_stopped: whether Ctrl-C stopped it.
    """

    def __init__(self, steps, path=None):
        super().__init__()
        self.steps, self.path, self.done, self.is_stopped = steps, path, 0, False
        self._is_terminal = sys.stdout is not None and sys.stdout.isatty()
        self._told = 0.0

    def __enter__(self):
        self._start, self._handler = time.monotonic(), signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, kind, *_):
        signal.signal(signal.SIGINT, self._handler)
        if kind is BrokenPipeError:
            if self.path is not None:
                write_whole(self.path, self.model.save)
        elif self._is_terminal:
            say()

    def _stop(self, *_):
        if self.is_stopped:
            raise KeyboardInterrupt
        self.is_stopped = True
        if sys.__stderr__ is not None:  # not by `print`, which this may have interrupted
            told = b"\nStopping after this step. Ctrl-C once more stops at once.\n"
            os.write(sys.__stderr__.fileno(), told)

    def on_train_batch_end(self, batch, logs=None):
        self.done = batch + 1
        self.model.stop_training = self.is_stopped
        if self._is_due():
            self._told = time.monotonic()
            taken, is_last = self._told - self._start, self.done == self.steps
            seconds = round(taken if is_last else taken * (self.steps / self.done - 1))
            shown = f"{seconds // 60}:{seconds % 60:02} {'in all' if is_last else 'left'}"
            line = f"{self.done}/{self.steps}, loss {float(logs['loss']):.3f}, {shown}"
            if self._is_terminal:
                say("\r" + line[: columns() - 1].ljust(columns() - 1), end="")
            else:
                say(line)

    def _is_due(self):
        if self.done in (1, self.steps):
            return True
        if self._is_terminal:
            return time.monotonic() - self._told > 0.2
        return self.done * 10 // self.steps > (self.done - 1) * 10 // self.steps


def save_model(model, path, progress):
    """Save a model where it was asked for, or training was stopped, and say so.

    Args:
        model: a Keras model.
        path: a `Path`, or `None`. Where it cannot be written, and where training
            was stopped without one, it is saved in a new folder for temporary files.
        progress: the `Progress` of its training.

    Returns:
        The exit status of the program, an int.
    """
    if progress.is_stopped:
        say(f"\nStopped after {progress.done} of {progress.steps} steps")
    status = INTERRUPTED if progress.is_stopped else 0
    if path is not None:
        try:
            write_whole(path, model.save)
            say(f"\nSaved to {path}")
            return status
        except Exception as error:  # whatever it is: the model is still there
            print(f"\nargument --save: {path} was not written: {error}", file=sys.stderr)
            status = status or 1
    if path is not None or progress.is_stopped:
        folder = Path(tempfile.mkdtemp(prefix="sparse_attn-"))
        saved = folder / (path.name if path else "model.keras")
        model.save(saved)
        say(f"\nSaved to {saved}")
    return status
