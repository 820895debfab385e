"""`python -m benchmarks`: measure, and write the results to `docs/`."""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import report
from benchmarks.machine import machine, versions
from benchmarks.rows import cpu_rows, gpu_rows
from benchmarks.turns import ROOT, measure


def main(arguments=None):
    """Measure; the program's exit status: 1 if a contender has failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose names start so")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    parser.add_argument("--quick", action="store_true", help="short lengths: a smoke test")
    parser.add_argument("--out", type=Path, help="the folder to write to; docs/ by default")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--report", type=Path, metavar="FILE", help="tables and plots of a JSON")
    parser.add_argument("--bars", type=Path, metavar="FILE", help="which bars a JSON reaches")
    options = parser.parse_args(arguments)

    if options.bars:
        print(report.summary(_read(options.bars)), end="")
        return 0
    if options.report:
        path = options.out / options.report.name if options.out else options.report
        _finish(_read(options.report), path)
        return 0
    if not sys.platform.startswith("linux"):
        parser.error(f"peaks of memory are read from Linux' /proc. Received: {sys.platform}")
    if options.rounds < 1:
        parser.error(f"argument --rounds: must be at least 1. Received: {options.rounds}")
    if options.quick and not (options.out or options.list):
        parser.error("argument --quick: needs --out, a folder other than docs/")
    known = (cpu_rows if options.device == "cpu" else gpu_rows)(shrink=8 if options.quick else 1)
    rows = [row for row in known if row.name.startswith(tuple(options.only or [""]))]
    if not rows:
        parser.error(f"argument --only: no row is called so; see --list. Received: {options.only}")
    if options.list:
        print(*[row.name for row in rows], sep="\n")
        return 0
    gpu = _gpu_name(parser) if options.device == "gpu" else None
    path = (options.out or ROOT / "docs") / f"benchmarks{'-gpu' if gpu else ''}.json"
    results = _read(path) if path.exists() else {"rows": {}}
    results["title"] = f"Benchmarks on {gpu}" if gpu else "Benchmarks"
    results["command"] = f"python -m benchmarks{' --device gpu' if gpu else ''}"
    if options.quick:
        results["title"] += ": a smoke test at short lengths, which says nothing about speed"
    most, failed = min(options.rounds, 3) if options.quick else options.rounds, False
    for name, stored in _measured(rows, most, gpu):
        failed |= any("failed" in m for m in stored["measurements"])
        found = {**results["rows"], name: stored}
        results["rows"] = {row.name: found[row.name] for row in known if row.name in found}
        report.write_whole(path, json.dumps(results, indent=1) + "\n")  # it may be interrupted
    _finish(results, path)
    return int(failed)


def _measured(rows, rounds, gpu):
    """Measure rows one by one, and tell what comes of it: names and rows as they are stored."""
    from tqdm import tqdm

    total = sum(len(row.jobs) * (1 + min(row.rounds, rounds)) for row in rows)
    with tqdm(total=total, unit="turn") as bar:
        for row in rows:
            bar.set_description(row.name)
            measurements = measure(row, min(row.rounds, rounds), step=bar.update)
            stored = {
                "date": datetime.now(UTC).date().isoformat(),
                "machine": machine(gpu),
                "versions": versions(),
                "curve": row.curve,
                "measurements": measurements,
                "bars": [{**asdict(b), "value": b.value(measurements)} for b in row.bars],
            }
            for m in measurements:
                if "failed" in m:
                    bar.write(f"{row.name}: {m['job']['contender']} failed: {m['failed']}")
            for claim in report.claims(row.name, stored):
                bar.write(" | ".join(filter(None, (row.name, *claim))))
            yield row.name, stored


def _read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def _finish(results, path):
    for written in report.write(results, path):
        print(written)
    print(report.slopes(results))


def _gpu_name(parser):
    """The name of the GPU, or the end of the program where there is none."""
    ask = "import torch; print(torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        parser.error(f"argument --device: there is no GPU that PyTorch can use: {reason}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
