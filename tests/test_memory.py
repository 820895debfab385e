"""Peak memory, each time that of a whole fresh process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from sparse_attn import Pattern, parse_pattern, sparse_attention

pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="the step is written for TensorFlow"
    ),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc"),
]

STEP = """
import re, sys
from pathlib import Path
import numpy as np, tensorflow as tf
from sparse_attn import parse_pattern
from sparse_attn.layers import SelfAttention

layer = SelfAttention(8, 64, parse_pattern(sys.argv[2]))
x = tf.constant(np.random.default_rng(0).normal(size=(1, int(sys.argv[1]), 512)), "float32")
layer.build(x.shape)

@tf.function
def step(x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(layer(x, training=True) ** 2)
    return loss, tape.gradient(loss, layer.trainable_variables)

loss, gradients = step(x)
assert all(np.isfinite(gradient).all() for gradient in gradients)
# Not of `getrusage`: a child starts with its parent's peak there.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20)
"""


def peak_gigabytes(n, pattern="Local(256)"):
    command = [sys.executable, "-c", STEP, str(n), pattern]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.timeout(600)
def test_a_training_step_is_linear_in_the_length_and_takes_less_than_3_gb_at_16384():
    base, half, whole = (peak_gigabytes(n) for n in (16, 8192, 16384))
    assert whole < 3
    assert whole - base < 3 * (half - base)  # 2 times if linear, 4 times if quadratic


@pytest.mark.timeout(600)
def test_a_training_step_at_65536_takes_less_than_5_gb():
    assert peak_gigabytes(65536) < 5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("pattern", ["Full()", "Atrous(4)"])
def test_where_scores_are_quadratic_memory_is_not(pattern):
    # The scores of all heads take 8.6 GB, or a quarter of that.
    assert peak_gigabytes(16384, pattern) < 2.5


GATHER = """
import re, sys
from pathlib import Path
import numpy as np, tensorflow as tf
from sparse_attn import Local, sparse_attention

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20

rng = np.random.default_rng(0)
q, k, v = (tf.constant(rng.normal(size=(1, n, 8, 64)), "float32") for n in (1024, 65536, 65536))
sparse_attention(q[:, :8], k, v, Local(256), query_positions=60000)
before = peak()
out = sparse_attention(q, k, v, Local(256), query_positions=60000)
assert np.isfinite(out).all()
print(peak() - before)
"""


def test_keys_that_are_gathered_for_each_query_are_few_at_a_time():
    command = [sys.executable, "-c", GATHER]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.4  # all of them take 2.1 GB


# ---- What `cost` predicts ----------------------------------------------------


class Near(Pattern):
    """A user's own predicate, which lies in a band."""

    def __call__(self, q_pos, k_pos):
        return (q_pos - k_pos) ** 2 <= 200**2


def read(pattern):
    return Near() if pattern == "Near()" else parse_pattern(pattern)


def traced_step(pattern, task, shape, dtype="float32"):
    """A function of query, key and value, traced for a shape."""
    import tensorflow as tf

    @tf.function
    def step(*x):
        if task == "forward":
            return sparse_attention(*x, pattern)
        with tf.GradientTape() as tape:
            tape.watch(x)
            out = sparse_attention(*x, pattern)
        return out, tape.gradient(out, x, output_gradients=out)

    return step.get_concrete_function(*[tf.TensorSpec(shape, dtype)] * 3)


def tensors(shape, dtype="float32"):
    import tensorflow as tf

    x = [tf.random.stateless_normal(shape, (1, seed)) for seed in range(3)]
    return [tf.cast(tensor, dtype) for tensor in x]


def most_bytes_in_use(pattern, task, shape, dtype):
    """The most bytes that TensorFlow's allocator has given out during a step, its inputs with it.

    Its turns differ, and the more so on a busy machine: the middle one of three.
    """
    import tensorflow as tf

    memory = tf.config.experimental
    try:
        memory.get_memory_info("CPU:0")
    except ValueError:
        pytest.skip("this build of TensorFlow counts no bytes of a CPU: it has no oneDNN")
    step, peaks = traced_step(pattern, task, shape, dtype), []
    for _ in range(3):
        before = memory.get_memory_info("CPU:0")["current"]
        x = tensors(shape, dtype)
        memory.reset_memory_stats("CPU:0")
        step(*x)
        peaks.append(memory.get_memory_info("CPU:0")["peak"] - before)
        del x
    return sorted(peaks)[1]


WORK = [
    ("Full()", 8192, 8, 64, "float32"),
    ("Causal()", 4096, 8, 64, "float32"),
    ("Local(256)", 8192, 8, 64, "float32"),
    ("Local(256)", 65536, 1, 64, "float32"),
    ("Local(256)", 8192, 8, 64, "bfloat16"),
    ("Atrous(32)", 8192, 8, 64, "float32"),
    ("Blocks(128)", 8192, 8, 16, "float32"),
    ("Fixed(256)", 65536, 1, 64, "float32"),
    ("Causal() & Strided(64)", 8192, 8, 64, "float32"),
    ("Longformer(128, 2)", 8192, 8, 64, "float32"),
    ("BigBird(8192)", 8192, 8, 64, "float32"),
    ("Near()", 8192, 8, 64, "float32"),
    ("Neighborhood((128, 64), 4)", 8192, 8, 64, "float32"),
    ("Neighborhood((64, 64), 3)", 4096, 8, 16, "float32"),
    ("Neighborhood((32, 16, 16), 1)", 8192, 8, 64, "float32"),
    ("Neighborhood((16, 16, 16), 2)", 4096, 8, 64, "float32"),
    ("Neighborhood((128, 128), 3, 2)", 16384, 8, 64, "float32"),
    ("Neighborhood((32, 32, 16), 2)", 16384, 1, 64, "float32"),
    ("Axial((128, 64))", 8192, 8, 64, "float32"),
    ("PerHead([Local(64)] * 4 + [Atrous(16)] * 4)", 8192, 8, 64, "float32"),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("work", "task"),
    [(work, "training") for work in WORK] + [(work, "forward") for work in WORK[::3]],
    ids=str,
)
def test_predicted_bytes_are_right_within_a_quarter(work, task, default_costs):
    pattern, n, heads, dim, dtype = work
    pattern = read(pattern)
    peak = most_bytes_in_use(pattern, task, (1, n, heads, dim), dtype)
    predicted = getattr(pattern.cost(n, heads, dim, dtype), f"{task}_bytes")
    assert predicted == pytest.approx(peak, rel=0.25)


PROCESS = """
import sys
from pathlib import Path
from tests.test_memory import bytes_in_use, read, tensors, traced_step

pattern, n, task = read(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
traced_step(pattern, task, (1, 16, 8, 64))(*tensors((1, 16, 8, 64)))
step = traced_step(pattern, task, (1, n, 8, 64))
Path("/proc/self/clear_refs").write_text("5")
before = bytes_in_use("VmRSS")
step(*tensors((1, n, 8, 64)))
print(bytes_in_use("VmHWM") - before)
"""


def bytes_in_use(name):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("pattern", "task"),
    [
        ("BigBird(16384)", "training"),
        ("Longformer(256, 2)", "training"),
        ("Near()", "forward"),
        ("Near()", "training"),
    ],
)
def test_a_process_takes_at_most_twice_the_predicted_bytes(pattern, task, default_costs):
    command = [sys.executable, "-c", PROCESS, pattern, "16384", task]
    options = {"capture_output": True, "text": True, "check": False, "timeout": 280}
    options["env"] = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, **options)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * getattr(read(pattern).cost(16384, 8), f"{task}_bytes")
