"""Attention layers: they project with Dense sublayers and call `sparse_attention`."""

from sparse_attn.layers.multi_head_attention import GroupedQueryAttention, MultiHeadAttention
from sparse_attn.layers.self_attention import (
    AtrousSelfAttention,
    LocalSelfAttention,
    SelfAttention,
    StridedSelfAttention,
)

__all__ = [
    "AtrousSelfAttention",
    "GroupedQueryAttention",
    "LocalSelfAttention",
    "MultiHeadAttention",
    "SelfAttention",
    "StridedSelfAttention",
]
