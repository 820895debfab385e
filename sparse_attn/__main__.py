"""Train a small language model on bytes of real text: `python -m sparse_attn --help`.

Every position may look a few lines back in full and to the start of the text
in strides, so a length of thousands of bytes is cheap on a laptop.
"""

import argparse
import math
import os
import sys
import sysconfig
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
import numpy as np
from keras import layers

from sparse_attn import Causal, Local, Strided, parse_pattern, plan
from sparse_attn.layers import SelfAttention

BATCH = 2
WIDTH, HEADS, BLOCKS = 128, 4, 4


def main(argv=None):
    parser, arguments = read_arguments(argv)
    keras.utils.set_random_seed(0)
    length = arguments.length
    train, held_out = read_text(parser, arguments.text, length)
    print(f"Text: {len(train):,} bytes to train on, {len(held_out):,} held out.")

    if arguments.pattern:
        patterns = [Causal() & arguments.pattern]
    else:
        patterns = [Causal() & Local(128), Causal() & Strided(64)]
    for pattern in patterns:
        print(f"\n{pattern}: {plan(pattern, length).share:.1%} of {length:,}² pairs are scored")
        print(pattern.text(length, width=32))

    model = make_model(patterns, arguments.steps)
    x, y = windows(train, arguments.steps * BATCH, length)
    test_x, test_y = windows(held_out, 8, length)
    before = bits_per_byte(model, test_x, test_y)
    print(f"\nTraining {model.count_params():,} weights at length {length:,}:")
    model.fit(x, y, batch_size=BATCH, shuffle=False)
    after = bits_per_byte(model, test_x, test_y)
    print(
        f"\nBits per byte on held-out text: {before:.2f} before, {after:.2f} after training "
        f"(entropy of single bytes: {unigram_entropy(held_out):.2f})"
    )
    print("\nA sample:\n" + sample(model, "import os\n\n\ndef "))
    if arguments.save:
        model.save(arguments.save)
        print(f"\nSaved to {arguments.save}")


def read_arguments(argv):
    def positive(text):
        if not text.isdecimal() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"must be a positive int. Received: {text}")
        return int(text)

    def pattern(text):
        try:
            return parse_pattern(text)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    def keras_file(text):
        if not text.endswith(".keras") or not Path(text).resolve().parent.is_dir():
            requirement = "must end in .keras and lie in a folder that exists"
            raise argparse.ArgumentTypeError(f"{requirement}. Received: {text}")
        return text

    parser = argparse.ArgumentParser(prog="python -m sparse_attn", description=__doc__)
    parser.add_argument("--text", type=Path, help="a file, or a folder of .py and .txt files")
    parser.add_argument("--steps", type=positive, default=120, help="of training (%(default)s)")
    parser.add_argument("--length", type=positive, default=4096, help="in bytes (%(default)s)")
    parser.add_argument("--pattern", type=pattern, help="for all blocks, such as 'Local(64)'")
    parser.add_argument("--save", type=keras_file, metavar="MODEL.keras")
    return parser, parser.parse_args(argv)


def read_text(parser, path, length):
    """Bytes to train on and bytes held out: whole files, one in ten for the latter."""
    root = Path(sysconfig.get_path("stdlib")) if path is None else path
    files = [root]
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.suffix in (".py", ".txt"))
        files = [f for f in files if not {"site-packages", "test", "tests"} & set(f.parts)]
    try:
        texts = [file.read_bytes() for file in files]
    except OSError as error:
        parser.error(f"argument --text: {error}")
    if len(texts) == 1:
        cut = len(texts[0]) * 9 // 10
        texts = [texts[0][:cut], texts[0][cut:]]
    order = np.random.default_rng(0).permutation(len(texts)) if len(texts) > 2 else [1, 0]
    texts = [texts[i] for i in order[: len(texts)]]
    count = max(1, len(texts) // 10)
    train, held_out = (
        np.frombuffer(b"\n".join(part), "uint8") for part in (texts[count:], texts[:count])
    )
    if min(len(train), len(held_out)) <= length:
        parser.error(f"argument --text: too little text in {root} for --length {length}")
    return train, held_out


def windows(data, count, length):
    """Random stretches of text, and the same one byte later."""
    starts = np.random.default_rng(1).integers(0, len(data) - length, count)
    stretches = np.stack([data[start : start + length + 1] for start in starts]).astype("int32")
    return stretches[:, :-1], stretches[:, 1:]


def make_model(patterns, steps):
    """A transformer that takes its blocks' patterns in turn; the next byte's logits."""
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(256, WIDTH)(inputs)
    x = x + layers.Conv1D(WIDTH, 8, padding="causal")(x)  # tells bytes close by apart
    for block in range(BLOCKS):
        pattern = patterns[block % len(patterns)]
        x = x + SelfAttention(HEADS, WIDTH // HEADS, pattern)(layers.LayerNormalization()(x))
        wide = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(WIDTH)(wide)
    logits = layers.Dense(256)(layers.LayerNormalization()(x))
    model = keras.Model(inputs, logits)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=steps, warmup_target=4e-3, warmup_steps=max(1, steps // 10)
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # On a CPU TensorFlow is faster without XLA.
    jit_compile = keras.backend.backend() == "jax"
    model.compile(keras.optimizers.AdamW(rate), loss, jit_compile=jit_compile)
    return model


def bits_per_byte(model, x, y):
    return model.evaluate(x, y, batch_size=BATCH, verbose=0) / math.log(2)


def unigram_entropy(data):
    share = np.bincount(data) / len(data)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def sample(model, prompt, count=300, temperature=0.6):
    """Continue the prompt; what follows a position does not matter to a causal model."""
    text, start = np.zeros((1, 512), "int32"), len(prompt)
    text[0, :start] = list(prompt.encode())
    rng = np.random.default_rng(2)
    for position in range(start, min(start + count, text.shape[1])):
        logits = model.predict_on_batch(text)[0, position - 1] / temperature
        chance = np.exp(logits - logits.max())
        text[0, position] = rng.choice(256, p=chance / chance.sum())
    return bytes(text[0, : start + count].tolist()).decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
