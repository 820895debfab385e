"""The contenders: each a way to compute a job, with what it needs made ready outside of the timing.

Its library is imported in its own process only.
"""

import functools
from dataclasses import dataclass

import numpy as np

from benchmarks.inputs import DIM, FEATURES, HEADS, weights

CONTENDERS = {}


@dataclass(frozen=True)
class Contender:
    """A function that makes a function of tensors for a job, and how to call it.

    `kind` says what the tensors are, see `inputs.shapes`; with `heads_first` those of attention
    are `(b, h, n, d)`.
    """

    make: object
    framework: str
    about: str
    kind: str = "attention"
    heads_first: bool = False
    xla: bool = False


def contender(name, framework, about, **options):
    def register(make):
        CONTENDERS[name] = Contender(make, framework, about, **options)
        return make

    return register


def _pattern(job):
    from sparse_attn import parse_pattern

    return parse_pattern(job.expression)


@contender("sparse_attn TensorFlow", "tensorflow", "`sparse_attention` in a `tf.function`")
@contender(
    "sparse_attn TensorFlow XLA",
    "tensorflow",
    "`sparse_attention` in a `tf.function(jit_compile=True)`",
    xla=True,
)
@contender("sparse_attn JAX", "jax", "`sparse_attention` under `jax.jit`, which is XLA")
@contender("sparse_attn PyTorch", "torch", "`sparse_attention`, not compiled")
def _sparse_attn(job):
    from sparse_attn import sparse_attention

    pattern = _pattern(job)
    return lambda q, k, v: sparse_attention(q, k, v, pattern)


@contender(
    "own predicate TensorFlow",
    "tensorflow",
    "sparse_attn TensorFlow, with the predicate of the window in a class of one's own",
)
def _own_predicate(job):
    from sparse_attn import Pattern, sparse_attention

    window = _pattern(job).window

    class Near(Pattern):
        def __call__(self, q_pos, k_pos):
            return abs(q_pos - k_pos) <= window

    return lambda q, k, v: sparse_attention(q, k, v, Near())


@contender(
    "tiles half as wide", "tensorflow", "sparse_attn TensorFlow, were tiles chosen half as wide"
)
def _half_as_wide(job):
    _scale_tiles(0.5)
    return _sparse_attn(job)


@contender(
    "tiles twice as wide", "tensorflow", "sparse_attn TensorFlow, were tiles chosen twice as wide"
)
def _twice_as_wide(job):
    _scale_tiles(2)
    return _sparse_attn(job)


@functools.cache  # once in a process
def _scale_tiles(factor):
    from sparse_attn import layouts

    layouts.WIDTH_FACTOR *= factor**2
    layouts.MAX_GROUPS = int(layouts.MAX_GROUPS / factor)


@contender("Keras dense", "tensorflow", "`keras.ops.dot_product_attention` without a mask")
def _keras_dense(job):
    from keras import ops

    return ops.dot_product_attention


@contender("Keras causal", "tensorflow", "`keras.ops.dot_product_attention(is_causal=True)`")
def _keras_causal(job):
    from keras import ops

    return lambda q, k, v: ops.dot_product_attention(q, k, v, is_causal=True)


@contender("Keras masked", "tensorflow", "`keras.ops.dot_product_attention(mask=)`, of bools")
def _keras_masked(job):
    from keras import ops

    mask = ops.convert_to_tensor(_pattern(job).mask(job.n)[None, None])
    return lambda q, k, v: ops.dot_product_attention(q, k, v, mask=mask)


@contender("JAX local window", "jax", "`jax.nn.dot_product_attention(local_window_size=)`")
@contender("JAX cuDNN", "jax", "`jax.nn.dot_product_attention(implementation='cudnn')`")
def _jax_local(job):
    import jax

    window = _pattern(job).sides
    options = {"implementation": "cudnn", "is_causal": True} if job.device == "gpu" else {}
    return lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, local_window_size=window, **options
    )


@contender(
    "PyTorch SDPA", "torch", "`scaled_dot_product_attention`, fused, dense", heads_first=True
)
def _sdpa(job):
    from torch.nn import functional

    return functional.scaled_dot_product_attention


@contender(
    "PyTorch SDPA cuDNN",
    "torch",
    "`scaled_dot_product_attention` of cuDNN, dense",
    heads_first=True,
)
def _sdpa_cudnn(job):
    from torch.nn import attention, functional

    def attend(q, k, v):
        with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
            return functional.scaled_dot_product_attention(q, k, v)

    return attend


@contender(
    "PyTorch FlexAttention",
    "torch",
    "`flex_attention` under `torch.compile`, with a block mask made beforehand",
    heads_first=True,
)
def _flex(job):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    pattern = _pattern(job)
    blocks = create_block_mask(
        lambda b, h, q_pos, k_pos: pattern(q_pos, k_pos),
        *(None, None, job.n, job.n),
        device="cuda" if job.device == "gpu" else "cpu",
        _compile=job.n > 16384,  # or it makes n * n bools on the way
    )
    attend = torch.compile(flex_attention, dynamic=False)  # fast kernels, of this length only
    return lambda q, k, v: attend(q, k, v, block_mask=blocks)


@contender(
    "local-attention",
    "torch",
    "`LocalAttention(exact_windowsize=True)` of lucidrains, without rotary positions",
    heads_first=True,
)
def _local_attention(job):
    from local_attention import LocalAttention

    return LocalAttention(
        dim=DIM,
        window_size=_pattern(job).window,
        look_backward=1,
        look_forward=1,
        exact_windowsize=True,
        use_rotary_pos_emb=False,
        autopad=True,
    )


@contender(
    "LocalSelfAttention TensorFlow",
    "tensorflow",
    "`LocalSelfAttention(8, 64, window)` of sparse_attn in a `tf.function`",
    kind="layer",
)
@contender(
    "LocalSelfAttention PyTorch",
    "torch",
    "`LocalSelfAttention(8, 64, window)` of sparse_attn, not compiled",
    kind="layer",
)
def _our_layer(job):
    from sparse_attn.layers import LocalSelfAttention

    layer = LocalSelfAttention(HEADS, DIM, window=_pattern(job).window)
    layer.build((1, job.n, FEATURES))
    return _with_weights(layer)


@contender(
    "SelfAttention TensorFlow",
    "tensorflow",
    "`SelfAttention(8, 64, pattern)` of sparse_attn in a `tf.function`",
    kind="layer",
)
@contender(
    "SelfAttention PyTorch",
    "torch",
    "`SelfAttention(8, 64, pattern)` of sparse_attn, not compiled",
    kind="layer",
)
def _our_general_layer(job):
    from sparse_attn.layers import SelfAttention

    layer = SelfAttention(HEADS, DIM, _pattern(job))
    layer.build((1, job.n, FEATURES))
    return _with_weights(layer)


@contender(
    "Keras MultiHeadAttention",
    "tensorflow",
    "`keras.layers.MultiHeadAttention(8, 64, sliding_window=window + 1)`",
    kind="layer",
)
def _keras_layer(job):
    import keras

    layer = keras.layers.MultiHeadAttention(
        HEADS, DIM, sliding_window=_pattern(job).window + 1, dtype=job.dtype
    )
    layer.build((1, job.n, FEATURES), (1, job.n, FEATURES))
    _with_weights(layer)
    return lambda x: layer(x, x)


def _with_weights(layer):
    for variable, array in zip(layer.weights, weights(), strict=True):
        variable.assign(array.reshape(variable.shape))
    return layer


@contender(
    "Longformer PyTorch",
    "torch",
    "`LongformerSelfAttention(attention_window=2 * window)` of transformers, and a `Linear` for "
    "the output, which it leaves to its caller; its projections of global positions have the "
    "weights of the others",
    kind="layer",
)
def _longformer(job):
    import torch
    from transformers.models.longformer import modeling_longformer as longformer

    from sparse_attn import Global, Longformer

    pattern = _pattern(job)
    positions = pattern.global_positions if isinstance(pattern, Longformer) else 0
    config = longformer.LongformerConfig(
        hidden_size=FEATURES,
        num_attention_heads=HEADS,
        attention_window=[2 * pattern.window],
        attention_probs_dropout_prob=0.0,
    )
    layer = longformer.LongformerSelfAttention(config, layer_id=0)
    if positions == 0:
        del layer.query_global, layer.key_global, layer.value_global
    attend, parts = _with_output(layer)
    _set_linear(parts)
    if positions != 0:
        _set_linear([layer.query_global, layer.key_global, layer.value_global])
    free = torch.zeros((1, job.n))
    is_global = torch.from_numpy(Global(positions).ranges(np.arange(job.n)))[None]
    options = {"attention_mask": free + 10000 * is_global, "is_index_masked": free.bool()}
    options |= {"is_index_global_attn": is_global, "is_global_attn": bool(is_global.any())}
    return attend(lambda x: layer(x, **options)[0])


@contender(
    "BigBird PyTorch",
    "torch",
    "`BigBirdBlockSparseAttention` of transformers, with the random blocks of the pattern, and a "
    "`Linear` for the output, which it leaves to its caller",
    kind="layer",
)
def _bigbird(job):
    import torch
    from transformers.models.big_bird import modeling_big_bird as big_bird

    pattern = _pattern(job)
    config = big_bird.BigBirdConfig(
        hidden_size=FEATURES,
        num_attention_heads=HEADS,
        max_position_embeddings=job.n,
        block_size=pattern.block_size,
        num_random_blocks=pattern.num_random_blocks,
        attention_probs_dropout_prob=0.0,
        use_bias=True,
    )
    layer = big_bird.BigBirdBlockSparseAttention(config, seed=0)
    drawn = pattern.drawn.lists[1:-1]
    layer._bigbird_block_rand_mask = lambda *sizes, **options: drawn
    layer._bigbird_block_rand_mask_with_head = lambda **options: [drawn] * HEADS
    attend, parts = _with_output(layer)
    _set_linear(parts)
    make_masks = big_bird.BigBirdModel.create_masks_for_block_sparse_attn
    masks = make_masks(torch.ones((1, job.n)), pattern.block_size)
    blocked, band_mask, from_mask, to_mask = masks
    options = {"band_mask": band_mask, "from_mask": from_mask, "to_mask": to_mask}
    options |= {"from_blocked_mask": blocked, "to_blocked_mask": blocked}
    return attend(lambda x: layer(x, **options)[0])


def _with_output(layer):
    """A `Linear` behind a layer of PyTorch: what makes the contender, and all four projections."""
    import torch

    output = torch.nn.Linear(FEATURES, FEATURES)

    def attend(function):
        def whole(x):
            return output(function(x))

        whole.parameters = torch.nn.ModuleList([layer, output]).parameters
        return whole

    return attend, (layer.query, layer.key, layer.value, output)


def _set_linear(parts):
    import torch

    arrays = [torch.from_numpy(x) for x in weights()]
    with torch.no_grad():
        for linear, kernel, bias in zip(parts, arrays[::2], arrays[1::2], strict=False):
            linear.weight.copy_(kernel.T)
            linear.bias.copy_(bias)


@contender("GEMM TensorFlow", "tensorflow", "a product of two `(n, n)` matrices", kind="gemm")
def _gemm_tensorflow(job):
    import tensorflow as tf

    return tf.matmul


@contender("GEMM PyTorch", "torch", "a product of two `(n, n)` matrices", kind="gemm")
def _gemm_torch(job):
    import torch

    return torch.matmul
