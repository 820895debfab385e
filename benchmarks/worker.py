"""The process of one contender: it prepares a job, checks it, and takes a turn when told to.

`python -m benchmarks.worker JOB`, with the job as JSON. It answers in lines of JSON: one when it
is ready, and one for each line that it reads.
"""

import json
import os
import re
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks import inputs
from benchmarks.contenders import CONTENDERS
from benchmarks.frameworks import FRAMEWORKS
from benchmarks.rows import Job

WARM_UP = 3  # calls
TURN = 0.1  # seconds of calls in a turn, if a single one takes less


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**what):
        print(json.dumps(what), file=answers, flush=True)

    try:
        job = Job(**json.loads(sys.argv[1]))
        call, ready = prepare(job)
        answer(**ready)
        for _ in sys.stdin:
            answer(seconds=turn(call))
    except Exception as error:
        traceback.print_exc()
        last = (str(error).strip().splitlines() or [""])[-1]
        answer(failed=f"{type(error).__name__}: {last}")


def prepare(job):
    """Make a job ready, measure its memory, and compare its results with the oracle.

    Returns:
        A function without arguments that computes the job, and a dict: `base`, bytes of the
        process with all that is imported and made beforehand; `above`, the most that computing
        adds to them; `peak`, the most that the whole process ever had; `errors` by
        `oracle.check`; `flops`.
    """
    contender, framework, call = _build(job)
    in_use = framework.device_memory if job.device == "gpu" else process_memory
    base, start_peak = in_use()
    for _ in range(WARM_UP):
        outputs = None  # or two results would be held at once
        outputs = call()
    peak = in_use()[1]

    from benchmarks import oracle  # no part of the memory above

    errors = oracle.check(job, contender.kind, _arrays(job, contender, framework, outputs))
    del outputs
    if job.n > oracle.SHORT and contender.kind != "gemm":
        short = replace(job, n=oracle.SHORT)
        _, framework, short_call = _build(short)
        oracle.check(short, contender.kind, _arrays(short, contender, framework, short_call()))
    from sparse_attn import parse_pattern

    flops = inputs.flops(contender.kind, parse_pattern(job.expression), job.n, job.task)
    ready = {"base": base, "above": peak - base, "peak": max(start_peak, peak)}
    return call, {"job": asdict(job), **ready, "errors": errors, "flops": flops}


def _build(job):
    """The contender of a job, its framework, and the call that computes the job."""
    contender = CONTENDERS[job.contender]
    framework = FRAMEWORKS[contender.framework](job, contender.xla)
    import sparse_attn  # noqa: F401 - so that it is part of every contender's base

    if job.dtype != "float32" and contender.kind == "layer":
        raise ValueError(f"`dtype` must be float32 for a layer. Received: {job}")

    def tensor(x):
        return framework.tensor(_swap_heads(x) if contender.heads_first else x)

    tensors = [tensor(x) for x in inputs.arrays(contender.kind, job.n)]
    function = contender.make(job)
    if job.task == "forward":
        return contender, framework, framework.forward(function, tensors)
    upstream = tensor(inputs.upstream(contender.kind, job.n))
    return contender, framework, framework.training(function, tensors, upstream)


def _arrays(job, contender, framework, outputs):
    """Outputs as arrays `(n, features)`, without the gradients of a layer's weights."""
    count = 1 if job.task == "forward" else 1 + len(inputs.shapes(contender.kind, job.n))
    arrays = [framework.numpy(x) for x in outputs[:count]]
    if contender.heads_first:
        arrays = [_swap_heads(x) for x in arrays]
    return [x.reshape(job.n, -1) for x in arrays]


def _swap_heads(x):
    """`(b, n, h, d)` to `(b, h, n, d)` and back, as a new array."""
    return x.swapaxes(1, 2).copy()


def process_memory():
    """Bytes that the process has in memory, and the most since the last question.

    Not of `getrusage`: a child starts with its parent's peak there.
    """
    status = Path("/proc/self/status").read_text()
    found = [re.search(rf"{name}:\s+(\d+) kB", status)[1] for name in ("VmRSS", "VmHWM")]
    Path("/proc/self/clear_refs").write_text("5")
    return tuple(1024 * int(kilobytes) for kilobytes in found)


def turn(call):
    """Seconds of the calls in a turn; the first wakes the threads and counts only if it is long."""
    seconds = [_time(call)]
    if seconds[0] > 3 * TURN:
        return seconds
    seconds.clear()
    while not seconds or sum(seconds) < TURN:
        seconds.append(_time(call))
    return seconds


def _time(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
