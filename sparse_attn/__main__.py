"""Train a small language model on the bytes of real text, or show a pattern.

Every position of the model looks at the bytes just before it, and at every 64th
one back to the start: a length of thousands of bytes stays cheap on a laptop.
"""

import argparse
import math
import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers

from sparse_attn import Causal, Local, PerHead, Strided, __version__, parse_pattern, plan
from sparse_attn.layers import TransformerBlock
from sparse_attn.show import add_show
from sparse_attn.terminal import (
    draw,
    output_file,
    parse,
    positive_int,
    printable,
    quiet_ends,
    say,
    wrap,
)
from sparse_attn.training import Progress, read_text, save_model, unigram_entropy, windows

WIDTH, HEADS, BLOCKS = 128, 4, 4


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv = ["train", *argv]
    told = "The options of a command: python -m sparse_attn COMMAND --help"
    parser = argparse.ArgumentParser("python -m sparse_attn", description=__doc__, epilog=told)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_train(commands)
    add_show(commands)
    with quiet_ends():
        options = parse(parser, commands.choices, argv)
        return options.run(options)


def add_train(commands):
    """The command `train` of the command line."""
    about = "Train a small language model; so does no command at all."
    parser = commands.add_parser("train", help=about, description=about)
    add, text = parser.add_argument, "a file or a folder of .py and .txt files (Python's own)"
    add("--text", type=Path, metavar="PATH", help=text)
    add("--steps", type=positive_int, default=240, metavar="N", help="of training (%(default)s)")
    add("--length", type=positive_int, default=4096, metavar="N", help="in bytes (%(default)s)")
    add("--pattern", help="of every block, such as 'Local(64) | Prefix(4)'; it is made causal")
    add("--save", type=output_file(".keras"), metavar="MODEL.keras", help="save the model there")
    parser.set_defaults(run=train, parser=parser)


def train(options):
    """Train, print what comes of it, and return the exit status."""
    length, steps = options.length, options.steps
    patterns = [Causal() & Local(128), Causal() & Strided(64)]
    try:
        argument = "--text"
        text, held_out, notes = read_text(options.text, length)
        argument = "--pattern"
        if options.pattern is not None:
            patterns = [Causal() & parse_pattern(options.pattern)]
        each = heads(patterns)
        shares = [plan(pattern, length).share for pattern in each]
    except (TypeError, ValueError) as error:
        options.parser.error(f"argument {argument}: {error}")
    keras.utils.set_random_seed(0)

    notes = [f"Text: {len(text):,} bytes to train on, {len(held_out):,} held out", *notes]
    shown = min(length, 512)
    for pattern, share in zip(each, shares, strict=True):
        notes.append(f"{share:.1%} of all pairs are scored in {pattern}")
    notes.append(f"The first {shown} positions, queries down and keys across:")
    say(wrap("\n".join(notes), 2) + "\n\n" + draw(each, shown))

    model = make_model(patterns, steps)
    test = windows(held_out, 8, length)
    before = bits_per_byte(model, *test)
    weights = f"{model.count_params():,} weights"
    say(wrap(f"\nTraining {weights}, {steps} steps of {length:,} bytes:", 2))
    with Progress(steps, options.save) as progress:
        data = windows(text, steps, length)
        model.fit(*data, batch_size=1, shuffle=False, verbose=0, callbacks=[progress])
    status = save_model(model, options.save, progress)
    after = bits_per_byte(model, *test)
    result = f"Bits per byte on held-out text: {before:.2f} before and {after:.2f} after training"
    say(wrap(f"\n{result}\nThe entropy of single bytes:    {unigram_entropy(held_out):.2f}", 2))
    if not progress.is_stopped:
        say("\nA sample:\n" + printable(sample(model, "import os\n\n\ndef ", shown)))
    return status


def heads(patterns):
    """The distinct patterns of all heads."""
    of_heads = [PerHead([p]) if not isinstance(p, PerHead) else p for p in patterns]
    return list(dict.fromkeys(each for p in of_heads for each in p.groups(HEADS)))


def make_model(patterns, steps):
    """A transformer whose blocks take the patterns in turn: from bytes to the next one's logits."""
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(256, WIDTH)(inputs)
    x = layers.add(
        [x, layers.Conv1D(WIDTH, 8, padding="causal")(x)]
    )  # tells the nearest bytes apart
    for block in range(BLOCKS):
        pattern = patterns[block % len(patterns)]
        x = TransformerBlock(HEADS, WIDTH // HEADS, pattern, hidden_dim=2 * WIDTH)(x)
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
    sys.exit(main())
