"""Faults that are put into the package, to see that the campaign sees them.

`python -m tests.campaign.breaks --cases 300` counts the cases that fail for each of them.
"""

import argparse
import contextlib
from typing import NamedTuple
from unittest import mock

from keras import ops

from sparse_attn import functional, layouts, stream, tiles
from tests.campaign.cases import BACKEND, GROUP, case
from tests.campaign.run import failure, forget

_evaluate, _score_gradients = tiles._evaluate, stream.score_gradients
_public_lse = functional.public_lse


def _off_by_one(pattern, q_pos, k_pos):
    return _evaluate(pattern, q_pos, k_pos + 1)


def _scaled(query, key, d_scores):
    d_query, d_key = _score_gradients(query, key, d_scores)
    return d_query, 1.05 * d_key


def _rounded(lse):
    lse = _public_lse(lse)
    return ops.cast(ops.cast(lse, "float16"), lse.dtype)


def _without_forbidden(bias):
    return ops.where(bias < -1e29, ops.zeros_like(bias), bias)


def _turned(split_keys):
    """The keys of the next residue."""

    def split(layout, x, n):
        tiles = split_keys(layout, x, n)
        return [ops.roll(x, 1, axis=2) if layout.rate != 1 else x for x in tiles]

    return split


class Break(NamedTuple):
    """What is replaced, as `(place, name, replacement)`, and the cases that it might matter for."""

    replaced: list
    concerns: object = lambda each: True


BREAKS = {
    "a mask off by one": Break([(tiles, "_evaluate", _off_by_one)]),
    "a gradient scaled by 1.05": Break([(stream, "score_gradients", _scaled)]),
    "a log-sum-exp in half precision": Break(
        [(functional, "public_lse", _rounded)], lambda each: each.return_lse
    ),
    "a dropped -inf": Break(
        [
            (tiles, "is_not_masked", lambda bias: bias == bias),
            (tiles, "at_least_lowest", _without_forbidden),
        ],
        lambda each: each.bias and each.bias_forbids,
    ),
    "a wrong residue": Break(
        [(kind, "split_keys", _turned(kind.split_keys)) for kind in (layouts.Halo, layouts.Stairs)]
    ),
}


@contextlib.contextmanager
def broken(name):
    """A context in which the package has one of `BREAKS`."""
    with contextlib.ExitStack() as stack:
        for place, attribute, replacement in BREAKS[name].replaced:
            stack.enter_context(mock.patch.object(place, attribute, replacement))
        forget()
        yield
    forget()


def main(argv=None):
    parser = argparse.ArgumentParser("python -m tests.campaign.breaks", description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    cases = [case(options.seed, number) for number in range(options.cases)]
    sound = [each for each in cases if failure(each) is None]
    print(f"{len(sound)} of {len(cases)} cases on {BACKEND} are equal to the oracle")
    for name in BREAKS:
        with broken(name):
            concerned = filter(BREAKS[name].concerns, sound)
            seen = [each.number for each in concerned if failure(each)]
        groups = len({number // GROUP for number in seen})
        print(f"{name}: seen by {len(seen)} cases, of {groups} groups", flush=True)


if __name__ == "__main__":
    main()
