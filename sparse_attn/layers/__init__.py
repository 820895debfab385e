"""Attention layers: they project with Dense sublayers and call `sparse_attention`."""

from sparse_attn.layers.multi_head_attention import GroupedQueryAttention, MultiHeadAttention
from sparse_attn.layers.positions import (
    PositionEmbedding,
    RelativePositionBias,
    RotaryEmbedding,
    SinePositionEncoding,
)
from sparse_attn.layers.self_attention import (
    AtrousSelfAttention,
    LocalSelfAttention,
    SelfAttention,
    StridedSelfAttention,
)
from sparse_attn.layers.transformer_block import TransformerBlock

__all__ = [
    "AtrousSelfAttention",
    "GroupedQueryAttention",
    "LocalSelfAttention",
    "MultiHeadAttention",
    "PositionEmbedding",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SelfAttention",
    "SinePositionEncoding",
    "StridedSelfAttention",
    "TransformerBlock",
]
