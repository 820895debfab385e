"""Show a pattern in the terminal: its picture, its plan and its cost."""

import argparse

from sparse_attn import parse_pattern, plan
from sparse_attn.patterns import PerHead
from sparse_attn.terminal import columns, output_file, positive_int, say, shades, wrap, write_whole

__all__ = ["add_show"]

LONGEST = 2**24
WIDTH = 64  # characters across a picture, at most


def add_show(commands):
    """The command `show` of the command line."""
    parser = commands.add_parser("show", help="Show a pattern.", description=__doc__)
    add = parser.add_argument
    add("pattern", help="such as 'Causal() & (Local(64) | Atrous(64))'")
    add("--length", type=_length, default=4096, metavar="N", help="in positions (%(default)s)")
    add("--heads", type=positive_int, metavar="N", help="for the cost (1, or each of a PerHead)")
    add("--head-dim", type=positive_int, default=64, metavar="N", help="features (%(default)s)")
    add("--save", type=output_file(".svg"), metavar="PICTURE.svg", help="draw it there too")
    parser.set_defaults(run=show, parser=parser)


def show(options):
    """Print all of it, and save the picture."""
    error = options.parser.error
    try:
        pattern = parse_pattern(options.pattern)
        patterns = dict.fromkeys(pattern.patterns if isinstance(pattern, PerHead) else [pattern])
        heads = {} if options.heads is None else {"num_heads": options.heads}
        cost = pattern.cost(options.length, head_dim=options.head_dim, **heads)
        picture = pattern.svg(options.length) if options.save else None
    except (TypeError, ValueError) as problem:
        error(str(problem))
    except (MemoryError, OverflowError, RecursionError) as problem:
        error(f"this is too much: {type(problem).__name__}: {problem}")
    for each in patterns:
        say(wrap(f"{each!r}, {options.length:,} queries down, as many keys across:\n", 2))
        say(each.text(options.length, width=min(WIDTH, columns()), shades=shades()))
        say(wrap(f"\nPlan: {plan(each, options.length)}\n", 15))
    say(wrap(f"Cost:\n{cost.table(columns())}", 2))
    if options.save:
        try:
            write_whole(options.save, lambda path: path.write_text(picture, encoding="utf-8"))
        except OSError as problem:
            error(f"argument --save: {problem}")
        say(f"\nSaved to {options.save}")


def _length(text):
    """The type of a length that can be drawn in a moment."""
    number = positive_int(text)
    if number > LONGEST:
        raise argparse.ArgumentTypeError(f"must be at most {LONGEST:,}. Received: {number:,}")
    return number
