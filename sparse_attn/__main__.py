"""Train a small language model on the bytes of real text.

Every position looks at the bytes just before it, and at every 64th one back to
the start: a length of thousands of bytes stays cheap on a laptop.
`python -m sparse_attn show PATTERN` shows a pattern instead.
"""

import argparse
import math
import sys
import sysconfig
from pathlib import Path

import keras
import numpy as np
from keras import layers

from sparse_attn import Causal, Local, Strided, parse_pattern, plan
from sparse_attn.layers import SelfAttention
from sparse_attn.show import show

WIDTH, HEADS, BLOCKS = 128, 4, 4


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["show"]:
        show(argv[1:])
        return
    parser = argparse.ArgumentParser(prog="python -m sparse_attn", description=__doc__)
    parser.add_argument("--text", type=Path, help="a file, or a folder of .py and .txt files")
    parser.add_argument("--steps", type=positive_int, default=240, help="of training (%(default)s)")
    parser.add_argument("--length", type=positive_int, default=4096, help="in bytes (%(default)s)")
    parser.add_argument("--pattern", help="of every block, such as 'Local(64) | Prefix(4)'")
    parser.add_argument("--save", type=keras_file, metavar="MODEL.keras")
    arguments = parser.parse_args(argv)
    length, steps = arguments.length, arguments.steps
    patterns = [Causal() & Local(128), Causal() & Strided(64)]
    try:
        if arguments.pattern is not None:
            patterns = [Causal() & parse_pattern(arguments.pattern)]
        shares = [plan(pattern, length).share for pattern in patterns]
        train, held_out = read_text(arguments.text, length)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    keras.utils.set_random_seed(0)

    print(f"Text: {len(train):,} bytes to train on, {len(held_out):,} held out")
    for pattern, share in zip(patterns, shares, strict=True):
        print(f"{share:.1%} of all pairs are scored in {pattern}")
    shown = min(length, 512)
    print(f"The first {shown} positions, queries down and keys across:\n")
    for lines in zip(*(p.text(shown, width=48).splitlines() for p in patterns), strict=True):
        print("    ".join(f"{line:48}" for line in lines).rstrip())

    model = make_model(patterns, steps)
    test = windows(held_out, 8, length)
    before = bits_per_byte(model, *test)
    print(f"\nTraining {model.count_params():,} weights, {steps} steps of {length:,} bytes:")
    model.fit(*windows(train, steps, length), batch_size=1, shuffle=False)
    after = bits_per_byte(model, *test)
    print(f"\nBits per byte on held-out text: {before:.2f} before and {after:.2f} after training")
    print(f"The entropy of single bytes:    {unigram_entropy(held_out):.2f}")
    print("\nA sample:\n" + sample(model, "import os\n\n\ndef ", shown))
    if arguments.save:
        model.save(arguments.save)
        print(f"\nSaved to {arguments.save}")


def positive_int(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def keras_file(text):
    if not text.endswith(".keras") or not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a .keras file in a folder that exists: {text}")
    return text


def read_text(path, length):
    """Bytes to train on and bytes held out: whole files of a folder, the end of a file."""
    path = Path(sysconfig.get_path("stdlib")) if path is None else path
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".py", ".txt"))
        files = [f for f in files if not {"site-packages", "test", "tests"} & set(f.parts)]
        order = np.random.default_rng(0).permutation(len(files))
        text = b"\n".join(files[i].read_bytes() for i in order)
    else:
        text = path.read_bytes()
    if len(text) <= 10 * (length + 1):
        requirement = f"more than {10 * (length + 1)} bytes"
        raise ValueError(f"`--text` must hold {requirement}. Received: {path}, {len(text)} bytes")
    data = np.frombuffer(text, "uint8")
    return np.split(data, [len(data) * 9 // 10])


def windows(data, count, length):
    """Random stretches of text, and the same ones a byte later."""
    starts = np.random.default_rng(1).integers(0, len(data) - length, count)
    stretches = np.stack([data[start : start + length + 1] for start in starts]).astype("int32")
    return stretches[:, :-1], stretches[:, 1:]


def make_model(patterns, steps):
    """A transformer whose blocks take the patterns in turn: from bytes to the next one's logits."""
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(256, WIDTH)(inputs)
    x = x + layers.Conv1D(WIDTH, 8, padding="causal")(x)  # tells the nearest bytes apart
    for block in range(BLOCKS):
        pattern = patterns[block % len(patterns)]
        x = x + SelfAttention(HEADS, WIDTH // HEADS, pattern)(layers.LayerNormalization()(x))
        hidden = layers.Dense(2 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(WIDTH)(hidden)
    logits = layers.Dense(256)(layers.LayerNormalization()(x))
    model = keras.Model(inputs, logits)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=steps, warmup_target=3e-3, warmup_steps=max(1, steps // 10)
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.1, beta_2=0.95, global_clipnorm=1.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # TensorFlow is faster without XLA on a CPU.
    model.compile(optimizer, loss, jit_compile=keras.backend.backend() == "jax")
    return model


def bits_per_byte(model, x, y):
    return model.evaluate(x, y, batch_size=1, verbose=0) / math.log(2)


def unigram_entropy(data):
    share = np.bincount(data) / len(data)
    return -sum(share * np.log2(share, where=share > 0, out=np.zeros(len(share))))


def sample(model, prompt, length, count=300, temperature=0.8):
    """Continue the prompt. A causal model does not see what stands after a position."""
    prompt, text = prompt[: length - 1], np.zeros((1, length), "int32")
    text[0, : len(prompt)], rng = list(prompt.encode()), np.random.default_rng(2)
    for position in range(len(prompt), min(len(prompt) + count, length)):
        logits = model.predict_on_batch(text)[0, position - 1] / temperature
        chances = np.exp(logits - logits.max(), dtype="float64")
        text[0, position] = rng.choice(256, p=chances / chances.sum())
    return bytes(text[0, : len(prompt) + count].tolist()).decode(errors="replace")


if __name__ == "__main__":
    main()
