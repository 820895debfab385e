"""The workers of a row, one process each, which take turns."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.contenders import CONTENDERS

ROOT = Path(__file__).parents[1]
PAUSE = 0.3  # seconds between turns, in which the threads of the last one come to rest
LIMIT = 900  # seconds for an answer


class Worker:
    """The process of one job. `ask` raises `ChildProcessError` when it has failed."""

    def __init__(self, job, limit=LIMIT):
        self.limit = limit
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in `close`
        environment = {
            **os.environ,
            "KERAS_BACKEND": CONTENDERS[job.contender].framework,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        if job.device == "cpu":
            environment.update(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def ask(self, turn=True):
        """The next answer, a dict; `turn=False` for the first one, which comes by itself."""
        start = time.monotonic()
        timer = threading.Timer(self.limit, self.process.kill)
        timer.start()
        try:
            if turn:
                print(file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        timer.cancel()
        late = time.monotonic() - start >= self.limit
        answer = json.loads(line) if line else {"failed": self._last_words(late)}
        if "failed" in answer:
            raise ChildProcessError(_without_folders(answer["failed"]))
        return answer

    def _last_words(self, late):
        if late:
            return f"no answer in {self.limit} seconds"
        code = self.process.wait()
        self.log.seek(0)
        lines = self.log.read().split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no word")
        return f"ended with {code}{' (out of memory?)' if code == -9 else ''}: {last.strip()}"

    def close(self):
        try:
            self.process.communicate(timeout=10)  # the end of its input ends it
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self.log.close()


def _without_folders(message):
    return re.sub(r"(?<![\w.:/])/(?:[^\s/:'\"]+/)+", "", message)


def measure(row, rounds, step=lambda: None, pause=PAUSE, limit=LIMIT):
    """Start the jobs of a row, then time them in turns.

    Args:
        row: a `Row`.
        rounds: how many turns each gets.
        step: called after each start and each turn.
        pause: seconds before each turn.
        limit: seconds that an answer may take.

    Returns:
        A list of dicts, one for each job: the worker's own (see `worker.prepare`), `turns`, the
        median seconds of a call in each turn, and `seconds`, their median; or `job` and `failed`.
    """
    workers, found = [], []
    try:
        for job in row.jobs:
            worker = Worker(job, limit)
            workers.append(worker)
            found.append(_attempt(asdict(job), lambda w=worker: {**w.ask(turn=False), "turns": []}))
            step()
        for _ in range(rounds):
            for i, worker in enumerate(workers):
                if "failed" not in found[i]:
                    time.sleep(pause)
                    seconds = _attempt(found[i]["job"], worker.ask)
                    if "failed" in seconds:
                        found[i] = seconds
                    else:
                        found[i]["turns"].append(median(seconds["seconds"]))
                step()
    finally:
        for worker in workers:
            worker.close()
    return [m if "failed" in m else {**m, "seconds": median(m["turns"])} for m in found]


def _attempt(job, action):
    try:
        return action()
    except ChildProcessError as error:
        return {"job": job, "failed": str(error)}
