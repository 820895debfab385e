"""Sparse attention for Keras: a pattern says which pairs of positions may attend."""

import keras as _keras

from sparse_attn import layers, masking, reference
from sparse_attn._version import __version__
from sparse_attn.attend import merge_attention
from sparse_attn.expressions import parse_pattern
from sparse_attn.functional import sparse_attention
from sparse_attn.patterns import (
    Atrous,
    Band,
    Blocks,
    Causal,
    Dilated,
    Full,
    Local,
    Pattern,
    Prefix,
    Strided,
)
from sparse_attn.plan import plan

__all__ = [
    "Atrous",
    "Band",
    "Blocks",
    "Causal",
    "Dilated",
    "Full",
    "Local",
    "Pattern",
    "Prefix",
    "Strided",
    "__version__",
    "layers",
    "masking",
    "merge_attention",
    "parse_pattern",
    "plan",
    "reference",
    "sparse_attention",
]

# Patterns know numpy only; here they are made known to Keras' saving.
for _kind in Pattern.__subclasses__():
    _keras.saving.register_keras_serializable(package="sparse_attn")(_kind)
del _kind
