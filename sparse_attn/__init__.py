"""Sparse attention for Keras: a pattern says which pairs of positions may attend."""

from sparse_attn import _startup  # before the frameworks

# isort: split
import keras as _keras

from sparse_attn import layers, masking, reference
from sparse_attn._version import __version__
from sparse_attn.attend import merge_attention
from sparse_attn.expressions import kinds as _kinds
from sparse_attn.expressions import parse_pattern
from sparse_attn.functional import sparse_attention
from sparse_attn.patterns import (
    Atrous,
    Axial,
    Band,
    Blocks,
    Causal,
    Dilated,
    Fixed,
    Full,
    Global,
    Grid,
    Local,
    Neighborhood,
    Pattern,
    PerHead,
    Prefix,
    Random,
    Strided,
)
from sparse_attn.plan import plan
from sparse_attn.recipes import BigBird, Longformer, PrefixLM, SparseTransformer, StreamingLLM
from sparse_attn.scores import ALiBi, PositionBias, ScoreMod, SoftCap

# Not `layers`, `masking`, `reference`, `plan` and `__version__`: `import *` must not overwrite what
# a program has under such names, as after `from keras import layers`. All five are public too.
__all__ = [
    "ALiBi",
    "Atrous",
    "Axial",
    "Band",
    "BigBird",
    "Blocks",
    "Causal",
    "Dilated",
    "Fixed",
    "Full",
    "Global",
    "Grid",
    "Local",
    "Longformer",
    "Neighborhood",
    "Pattern",
    "PerHead",
    "PositionBias",
    "Prefix",
    "PrefixLM",
    "Random",
    "ScoreMod",
    "SoftCap",
    "SparseTransformer",
    "StreamingLLM",
    "Strided",
    "merge_attention",
    "parse_pattern",
    "sparse_attention",
]

# Patterns know numpy only; here they are made known to Keras' saving.
for _kind in _kinds().values():
    _keras.saving.register_keras_serializable(package="sparse_attn")(_kind)
del _kind
