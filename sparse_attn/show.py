"""Show a pattern in the terminal: its picture, its plan and its cost."""

import argparse
import os
import sys
from pathlib import Path

from sparse_attn import parse_pattern, plan
from sparse_attn.patterns import PerHead

__all__ = ["show"]

LONGEST = 2**24


def show(argv):
    """`python -m sparse_attn show`, with its arguments as a list of str."""
    parser = argparse.ArgumentParser(prog="python -m sparse_attn show", description=__doc__)
    parser.add_argument("pattern", help="such as 'Causal() & (Local(64) | Atrous(64))'")
    parser.add_argument("--length", type=int, default=4096, help="in positions (%(default)s)")
    parser.add_argument("--heads", type=int, help="for the cost; 1, or one for each of a PerHead")
    parser.add_argument("--head-dim", type=int, default=64, help="features (%(default)s)")
    parser.add_argument("--save", type=_svg_file, metavar="PICTURE.svg", help="draw it there too")
    options = parser.parse_args(argv)
    if options.length > LONGEST:
        parser.error(f"argument --length: at most {LONGEST:,}. Received: {options.length:,}")
    try:
        pattern = parse_pattern(options.pattern)
        patterns = dict.fromkeys(pattern.patterns if isinstance(pattern, PerHead) else [pattern])
        heads = {} if options.heads is None else {"num_heads": options.heads}
        cost = pattern.cost(options.length, head_dim=options.head_dim, **heads)
        picture = pattern.svg(options.length) if options.save else None
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    except (MemoryError, OverflowError, RecursionError) as error:
        parser.error(f"this is too much: {type(error).__name__}: {error}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know the characters
    for each in patterns:
        print(f"{each!r}, {options.length:,} queries down, as many keys across:\n")
        print(each.text(options.length))
        print(f"\nPlan: {plan(each, options.length)}\n")
    print(f"Cost:\n{cost}")
    if options.save:
        try:
            _write_whole(options.save, picture)
        except OSError as error:
            parser.error(f"argument --save: {error}")
        print(f"\nSaved to {options.save}")


def _svg_file(text):
    path = Path(text)
    if path.suffix != ".svg" or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a .svg file in a folder that exists: {text}")
    return path


def _write_whole(path, text):
    """Write a file so that it is there as a whole, or as it was before."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
