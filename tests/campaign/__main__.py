"""Run many random cases on the backend in use: `python -m tests.campaign --cases 10000`.

A worker process runs some hundred cases at a time, so that memory is let go of, and a case that
ends the process is told like any other failure. Two calls with `--first` and `--cases` that do not
overlap may run side by side. The exit status is 1 if a case fails.
"""

import argparse
import collections
import dataclasses
import signal
import subprocess
import sys
import time

from tests.campaign.cases import BACKEND, GROUP, Case, case
from tests.campaign.run import failure, forget

SHARE = 400  # cases of a worker
SECONDS = 300  # for a case


def arguments(argv):
    parser = argparse.ArgumentParser("python -m tests.campaign", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the number of the first")
    parser.add_argument("--case", type=int, help="run this one alone, and look for a smaller one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=["eager", "known", "unknown", "xla"], help="for all")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def work(options):
    """Run cases and print a line for each: its number, its mode and what is wrong."""
    signal.signal(signal.SIGALRM, _too_long)
    for number in range(options.first, options.first + options.cases):
        each = case(options.seed, number, options.mode)
        print(f"{number}\t{each.mode}", end="\t", flush=True)
        signal.alarm(SECONDS)
        print(failure(each) or "", flush=True)
        signal.alarm(0)
        if number % (5 * GROUP) == 0:
            forget()


def _too_long(*_):
    raise TimeoutError(f"a case took more than {SECONDS} seconds")


def manage(options):
    """Run workers one after another; returns how many cases failed."""
    modes, failed, start = collections.Counter(), 0, time.time()
    number, end = options.first, options.first + options.cases
    while number < end:
        share = min(SHARE, end - number)
        command = [sys.executable, "-m", "tests.campaign", "--worker"]
        command += [f"--first={number}", f"--cases={share}", f"--seed={options.seed}"]
        command += [f"--mode={options.mode}"] if options.mode else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:  # noqa: S603
            mode = "?"
            for line in worker.stdout:
                if line.count("\t") < 2 or not line.split("\t")[0].isdigit():
                    continue
                _, mode, told = line.rstrip("\n").split("\t", 2)
                modes[mode] += 1
                failed += bool(told)
                if told:
                    print(f"case {number} of seed {options.seed}, {mode}: {told}", flush=True)
                number += 1
        if worker.returncode and number < end:
            print(f"case {number} of seed {options.seed}: exit {worker.returncode}", flush=True)
            failed, number = failed + 1, number + 1
        done = number - options.first
        rate = 60 * done / (time.time() - start)
        counts = ", ".join(f"{count} {mode}" for mode, count in modes.items())
        print(
            f"{done} cases on {BACKEND} ({counts}), {failed} failed, {rate:.0f} a minute",
            flush=True,
        )
    return failed


def smaller(each):
    """Cases that lack something of a case."""
    usual = {field.name: field.default for field in dataclasses.fields(Case)}
    for name in list(usual)[7:]:
        if getattr(each, name) != usual[name]:
            yield dataclasses.replace(each, **{name: usual[name]})
    if each.mods:
        yield from (dataclasses.replace(each, mods=(mod,)) for mod in each.mods)
    for inner in ("first", "second", "pattern"):
        if hasattr(each.pattern, inner) and len(vars(each.pattern)) <= 3:
            yield dataclasses.replace(each, pattern=getattr(each.pattern, inner))
    for name in ("batch", "n", "m"):
        for size in {1, getattr(each, name) // 2, getattr(each, name) - 1}:
            if 0 < size < getattr(each, name):
                yield dataclasses.replace(each, **{name: size})


def smallest(each):
    """A case that fails as this one does, and of which nothing can be left out."""
    kind = failure(each).split(":")[0]
    found = (x for x in smaller(each) if (failure(x) or "").split(":")[0] == kind)
    found = next(found, None)
    return smallest(found) if found else each


def main(argv=None):
    options = arguments(argv)
    if options.worker:
        work(options)
        return 0
    if options.case is None:
        return int(manage(options) > 0)
    each = case(options.seed, options.case, options.mode)
    told = failure(each)
    print(f"{each}\n{told or 'equals the oracle'}")
    if told:
        each = smallest(each)
        print(f"\n{each}\n{failure(each)}")
    return int(told is not None)


if __name__ == "__main__":
    raise SystemExit(main())
