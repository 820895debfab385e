"""What is compared: rows of jobs that are timed in turns, and the bars they must reach."""

import re
from dataclasses import dataclass

import numpy as np

LOCAL, LEFT, FULL = "Local(256)", "Local((256, 0))", "Full()"
SHORT = ["Full()", "Causal()", "Local(16)", "Local(256)", "Atrous(4)", "Strided(16)", "Blocks(16)"]
SHORT += ["Causal() & (Local(16) | Prefix(4))"]
TF, XLA, JAX, TORCH = (
    f"sparse_attn {x}" for x in ("TensorFlow", "TensorFlow XLA", "JAX", "PyTorch")
)
FLEX, LUCID = "PyTorch FlexAttention", "local-attention"
TF_LAYER, TORCH_LAYER = "LocalSelfAttention TensorFlow", "LocalSelfAttention PyTorch"
TF_SELF, TORCH_SELF = "SelfAttention TensorFlow", "SelfAttention PyTorch"
SDPA, SDPA_CUDNN = ("PyTorch SDPA", FULL), ("PyTorch SDPA cuDNN", FULL)
DENSE = ("Keras dense", FULL)
NARROW, WIDE = "tiles half as wide", "tiles twice as wide"
PEERS = {"BigBird(n)": "BigBird PyTorch", "Longformer(256, 2)": "Longformer PyTorch"}
TILES = ["Local(16)", "Local(64)", LOCAL, "Local(1024)", "Causal()"]
# The lengths of a curve, and where each ends: at what fits in memory and patience.
LENGTHS = (4096, 8192, 16384, 32768, 65536)
CURVES = {
    "forward": {TF: 65536, JAX: 65536, TORCH: 65536, LUCID: 65536, FLEX: 32768}
    | {SDPA: 16384, "Keras masked": 8192, "JAX local window": 8192},
    "training": {TF: 65536, JAX: 32768, TORCH: 32768, LUCID: 32768}  # Flex: not on a CPU
    | {SDPA: 16384, "Keras masked": 8192, "JAX local window": 8192},
}


@dataclass(frozen=True)
class Job:
    """What one process computes: batch 1, 8 heads of 64, or a layer of that size.

    `task` is "forward", or "training": forward, and the gradients of all inputs and weights.
    In the pattern's expression `n` is the length.
    """

    contender: str
    pattern: str = LOCAL
    n: int = 4096
    task: str = "forward"
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def expression(self):
        """The pattern's expression at the length of the job."""
        return re.sub(r"\bn\b", str(self.n), self.pattern)


@dataclass(frozen=True)
class Bar:
    """A quantity of the row's job number `of`, in places beside the job number `against`.

    `limit` is what it must reach, or `None` if it is only told.
    """

    quantity: str
    limit: float | None = None
    of: int = 0
    against: int | None = None

    def value(self, measurements):
        """The quantity, a float, or `None` if a measurement that it needs has failed."""
        if self.quantity.startswith("exponent"):
            key = {"exponent of time": "seconds", "exponent of memory": "above"}[self.quantity]
            if any("failed" in m for m in measurements):
                return None
            return exponent([m["job"]["n"] for m in measurements], [m[key] for m in measurements])
        of = measurements[self.of]
        against = of if self.against is None else measurements[self.against]
        if "failed" in of or "failed" in against:
            return None
        match self.quantity:
            case "time":
                return of["seconds"] / against["seconds"]
            case "speed":
                return against["seconds"] / of["seconds"]
            case "peak memory":
                return of["peak"] / against["peak"]
            case "gigabytes":
                return of["peak"] / 1e9
            case "share":
                return (of["flops"] / of["seconds"]) / (against["flops"] / against["seconds"])
        raise ValueError(f"`quantity` must be a known one. Received: quantity={self.quantity!r}")


@dataclass(frozen=True)
class Row:
    """Jobs that are timed in turns, at most `rounds` times each, and what must come of it.

    `curve` says that the measurements are points of the plots.
    """

    name: str
    jobs: tuple
    bars: tuple = ()
    rounds: int = 100
    curve: bool = False


def exponent(lengths, values):
    """The `e` of `value ~ length ** e`, by least squares of the logarithms, or `None`."""
    if len(set(lengths)) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def cpu_rows(shrink=1):
    """All rows for a CPU. For a smoke test, lengths are divided by `shrink`."""
    rows = []

    def add(text, n, task, contenders, bars, rounds=100):
        """A row; a contender is a name, or a name and a pattern."""
        n = max(n // shrink, 128)
        jobs = tuple(Job(*_pair(contender), n, task) for contender in contenders)
        rows.append(Row(f"{text}, n = {n}", jobs, tuple(bars), rounds))

    contenders = [TF, XLA, FLEX, "Keras masked", SDPA, LUCID]
    bars = [Bar("time", 0.85, 0, 2), Bar("time", 0.2, 0, 3), Bar("time", None, 1, 0)]
    add(f"forward, {LOCAL}", 4096, "forward", contenders, bars)
    contenders = [TF, XLA, LUCID, SDPA, "Keras masked"]
    bars = [Bar("time", 0.45, 0, 2), Bar("time", 0.35, 0, 3), Bar("time", 0.18, 0, 4)]
    bars.append(Bar("time", None, 1, 0))
    add(f"training, {LOCAL}", 4096, "training", contenders, bars)
    contenders = [TF_LAYER, "Keras MultiHeadAttention"]
    bars = [Bar("speed", 8, 0, 1), Bar("peak memory", 1 / 6, 0, 1)]
    add(f"layer, training, {LOCAL}", 8192, "training", contenders, bars, rounds=11)
    for pattern, limit in (("Atrous(64)", 15), ("Causal() & Strided(64)", 5)):
        contenders = [(TF, pattern), DENSE]
        add(f"forward, {pattern}", 4096, "forward", contenders, [Bar("speed", limit, 0, 1)])
    for task, torch_limit, share in (("forward", 1.0, 0.20), ("training", 0.7, 0.22)):
        contenders = [JAX, "JAX local window"]
        add(f"JAX, {task}, {LOCAL}", 4096, task, contenders, [Bar("speed", 5, 0, 1)], rounds=9)
        contenders = [TORCH, SDPA, FLEX if task == "forward" else LUCID]
        bars = [Bar("time", torch_limit, 0, 1), Bar("time", None, 0, 2)]
        add(f"PyTorch, {task}, {LOCAL}", 4096, task, contenders, bars)
        contenders = [(TF, FULL), (TF, "Causal()"), DENSE, ("Keras causal", "Causal()")]
        bars = [Bar("time", 1.05, 0, 2), Bar("time", 0.75, 1, 2), Bar("time", None, 1, 3)]
        add(f"dense, {task}", 4096, task, contenders, bars)
        contenders = [*[(TF, pattern) for pattern in SHORT], DENSE]
        bars = [Bar("time", 1.3, i, len(SHORT)) for i in range(len(SHORT))]
        add(f"short, {task}", 128, task, contenders, bars)
        for pattern in TILES:
            contenders = [(name, pattern) for name in (TF, NARROW, WIDE)]
            bars = [Bar("time", 1.1, 0, 1), Bar("time", 1.1, 0, 2)]
            add(f"tiles, {task}, {pattern}", 4096, task, contenders, bars, rounds=9)
        contenders = [TORCH_LAYER, TF_LAYER, "Longformer PyTorch"]
        bars = [Bar("speed", None, 0, 2), Bar("speed", None, 1, 2)]
        add(f"Longformer, {task}, {LOCAL}", 4096, task, contenders, bars)
        for n in (4096, 8192):
            for pattern, peer in PEERS.items():
                contenders = [(x, pattern) for x in (TF_SELF, TORCH_SELF, peer)]
                limit = 0.4 if task == "forward" else 0.5
                bars = [Bar("time", limit, 0, 2), Bar("time", None, 1, 2)]
                add(f"layer, {task}, {pattern}", n, task, contenders, bars)
        contenders = ["own predicate TensorFlow", TF]
        add(f"own predicate, {task}, {LOCAL}", 4096, task, contenders, [Bar("time", 1.5, 0, 1)])
        pattern = f"Neighborhood((64, {64 // shrink}), 3)"
        contenders = [(TF, pattern), DENSE]
        add(f"{task}, {pattern}", 4096, task, contenders, [Bar("speed", 8, 0, 1)])
        rows.append(_share(task, "GEMM TensorFlow", [TF], 16384 // shrink, 4096 // shrink, share))
    rows.append(
        Row(
            f"bfloat16, forward, {LOCAL}, n = {4096 // shrink}",
            tuple(Job(TF, n=4096 // shrink, dtype=x) for x in ("bfloat16", "float32")),
            (Bar("time", 0.65, 0, 1),),
        )
    )
    add(f"memory of a layer, {LOCAL}", 65536, "training", [TF_LAYER], [Bar("gigabytes", 5)], 3)
    add(f"memory, {LOCAL}", 262144, "forward", [TF], [Bar("gigabytes", 8)], 3)
    for task, ends in CURVES.items():
        for contender, longest in ends.items():
            name, pattern = _pair(contender)
            lengths = [n // shrink for n in LENGTHS if n <= longest]
            jobs = tuple(Job(name, pattern, n, task) for n in lengths)
            bars, rounds = (), 3
            if name == TF:
                bars, rounds = (Bar("exponent of time", 1.15), Bar("exponent of memory", 1.15)), 7
            rows.append(Row(f"growth, {task}, {pattern}, {name}", jobs, bars, rounds, curve=True))
    return rows


def gpu_rows(shrink=1):
    """All rows for a GPU, in bfloat16: JAX and PyTorch. JAX' cuDNN has windows to the left only."""
    rows = []
    options = {"dtype": "bfloat16", "device": "gpu"}
    for task in ("forward", "training"):
        for n in (4096, 16384, 65536, 262144):
            for pattern, peer in ((LOCAL, SDPA_CUDNN), (LEFT, ("JAX cuDNN", LEFT))):
                contenders = [*[(name, pattern) for name in (JAX, TORCH, FLEX)], peer]
                jobs = [Job(*contender, n // shrink, task, **options) for contender in contenders]
                bars = [Bar("time", None, of, against) for of in (0, 1) for against in (2, 3)]
                name = f"{task}, {pattern}, n = {n // shrink}"
                rows.append(Row(name, tuple(jobs), tuple(bars), curve=True))
        n = 16384 // shrink
        rows.append(_share(task, "GEMM PyTorch", [JAX, TORCH], n, n, None, **options))
    return rows


def _share(task, gemm, names, n, gemm_n, limit, **options):
    """A row of the share of the FLOP bound: useful work in a second beside a large product's."""
    jobs = [Job(name, LOCAL, n, task, **options) for name in names]
    jobs.append(Job(gemm, FULL, gemm_n, **options))
    bars = [Bar("share", limit, of, len(names)) for of in range(len(names))]
    return Row(f"share of the FLOP bound, {task}, {LOCAL}, n = {n}", tuple(jobs), tuple(bars))


def _pair(contender):
    return (contender, LOCAL) if isinstance(contender, str) else contender
