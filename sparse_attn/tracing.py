"""What a framework has to be told, or asked, about how it traces and differentiates."""

import contextlib
import itertools
import math
import operator
from functools import cache, reduce

import einops
import keras
from keras import ops

AT_ONCE = 2  # pieces of work that a graph of TensorFlow does at the same time


def unconverted(function):
    """A function that TensorFlow's AutoGraph runs as it is.

    What is decorated so has no control flow on tensors, which is all that
    AutoGraph is for; to convert it, with all that it calls, takes seconds.
    """
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.autograph.experimental.do_not_convert(function)


def uncompiled(function):
    """A function that PyTorch's compiler leaves as it is.

    What it plans in Python and numpy would be traced, which takes long where it does not fail.
    """
    if keras.backend.backend() != "torch":
        return function
    import torch

    return torch.compiler.disable(function)


def eagerly():
    """A context in which operations give values, within a function that is traced too."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.init_scope()
    if keras.backend.backend() == "jax":
        import jax

        return jax.ensure_compile_time_eval()
    if is_traced_to_export():  # torch has no public name for it
        from torch.utils._python_dispatch import _disable_current_modes

        return _disable_current_modes()
    return contextlib.nullcontext()


def may_differentiate(tensors):
    """Whether the gradient by any of these tensors may be asked for; only PyTorch can say no."""
    if keras.backend.backend() != "torch":
        return True
    import torch

    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def pull_back(function, tensors, upstream):
    """The gradients of `sum(function(*tensors) * upstream)` by float tensors: a list."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            found = function(*tensors)
        zero = tf.UnconnectedGradients.ZERO
        found = tape.gradient(found, tensors, upstream, unconnected_gradients=zero)
        return [tf.convert_to_tensor(x) for x in found]  # of rows that were taken, too
    if backend == "jax":
        import jax

        return list(jax.vjp(function, *tensors)[1](upstream))
    import torch

    if is_transformed():
        return list(torch.func.vjp(function, *tensors)[1](upstream))
    again = torch.is_grad_enabled()  # to be differentiated itself
    with torch.enable_grad():
        tensors = [x if again and x.requires_grad else x.detach().requires_grad_() for x in tensors]
        found = function(*tensors)
    options = {"create_graph": again, "materialize_grads": True}
    return list(torch.autograd.grad(found, tensors, upstream, **options))


def custom_gradient(function):
    """`ops.custom_gradient`, in a form that `torch.func` and `vmap` can transform too.

    Args:
        function: from tensors to `(output, grad)`, one tensor and a function.
            TensorFlow and JAX call `grad(upstream)`. PyTorch calls
            `grad(*tensors, upstream=upstream)`; under a transform these tensors
            are not those that `function` saw, so `grad` must not use the latter.
    """
    if keras.backend.backend() != "torch":
        return ops.custom_gradient(function)
    from torch.autograd import forward_ad

    if forward_ad._current_level >= 0:  # forward mode has no use for a gradient
        return lambda *tensors: function(*tensors)[0]
    return lambda *tensors: _custom_function().apply(_Call(function), *tensors)


class _Call:
    """A function under way, and then its gradient."""

    def __init__(self, function):
        self.function, self.grad = function, None


@cache
def _custom_function():
    import torch

    class CustomGradient(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(call, *tensors):
            output, call.grad = call.function(*tensors)
            return output

        @staticmethod
        def setup_context(ctx, inputs, output):
            call, *tensors = inputs
            ctx.save_for_backward(*tensors)
            ctx.grad = call.grad

        @staticmethod
        def backward(ctx, upstream):
            return None, *ctx.grad(*ctx.saved_tensors, upstream=upstream)

    return CustomGradient


def recomputed(function):
    """A function from tensors to a tuple of them, of which nothing is kept to differentiate it.

    For PyTorch, where a gradient that is to be differentiated keeps all that it was made of.
    """
    return lambda *tensors: _recomputed_function().apply(function, *tensors)


@cache
def _recomputed_function():
    import torch

    class Recomputed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(function, *tensors):
            return function(*tensors)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.function, *tensors = inputs
            ctx.save_for_backward(*tensors)

        @staticmethod
        def backward(ctx, *upstream):
            tensors, function = list(ctx.saved_tensors), ctx.function
            floats = [i for i, x in enumerate(tensors) if x.is_floating_point()]

            def of_floats(*given):
                for i, x in zip(floats, given, strict=True):
                    tensors[i] = x
                return function(*tensors)

            _, vjp = torch.func.vjp(of_floats, *(tensors[i] for i in floats))
            found = dict(zip(floats, vjp(upstream), strict=True))
            return None, *(found.get(i) for i in range(len(tensors)))

    return Recomputed


def is_transformed():
    """Whether PyTorch's `vmap`, a transform of `torch.func` or its forward mode is at work."""
    if keras.backend.backend() != "torch":
        return False
    import torch
    from torch.autograd import forward_ad

    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def unlinked(tensor):
    """The same numbers, which a function's backward pass can hold without a circle.

    PyTorch's tensors hold what made them. A circle would keep both until a collector comes.
    """
    return tensor.detach() if keras.backend.backend() == "torch" else tensor


def read_variable(variable):
    """The value of a variable, as a tensor that gradients by the variable are linked to."""
    if keras.backend.backend() != "tensorflow":
        return variable.value
    import tensorflow as tf

    return tf.convert_to_tensor(variable)


def is_dense(tensor):
    """Whether a tensor has a place for each number: it is neither ragged, sparse nor nested."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return not isinstance(tensor, (tf.RaggedTensor, tf.SparseTensor, tf.IndexedSlices))
    if keras.backend.backend() == "jax":
        import jax

        return isinstance(tensor, jax.Array)
    import torch

    return tensor.layout == torch.strided and not tensor.is_nested


def size_of(x, axis):
    """The size of a tensor along an axis, an int if it is known.

    In a graph of TensorFlow `ops.shape` would take four nodes for each size that is not.
    """
    size = x.shape[axis]
    return sizes_of(x)[axis] if size is None else size


def length_of(x):
    """The size of axis 1 of a tensor; `torch.export` takes it for an int.

    Layouts compare lengths in more ways than symbols of PyTorch can be compared.
    """
    size = size_of(x, 1)
    if keras.backend.backend() == "torch":
        import torch

        return int(size) if isinstance(size, torch.SymInt) else size
    return size


def sizes_of(x):
    """All sizes of a tensor, which in a graph of TensorFlow come out of one node."""
    if keras.backend.backend() != "tensorflow":
        return ops.shape(x)
    import tensorflow as tf

    return tf.unstack(tf.shape(x))


def take(x, start, size, axis):
    """`size` entries of a tensor along an axis, from `start` on: ints, or int tensors."""
    numbers = start, size, x.shape[axis]  # tensors where PyTorch traces, whatever they are now
    if all(isinstance(number, int) for number in numbers) and numbers == (0, size, size):
        return x
    if keras.backend.backend() == "torch":  # `ops.slice` would mix int32 with int64
        return x.narrow(axis, start, size)
    starts = [0] * len(x.shape)
    sizes = list(x.shape)
    starts[axis], sizes[axis] = start, size
    if None in sizes:  # -1, all there are, is short; but XLA pads all axes where it knows no start
        unknown = [-1] * len(sizes) if isinstance(start, int) else sizes_of(x)
        sizes = [unknown[i] if size is None else size for i, size in enumerate(sizes)]
    return ops.slice(x, starts, sizes)


def split(x, ends, axis):
    """`ops.split` at some places, ints; on PyTorch this would make tensors of them."""
    if keras.backend.backend() != "torch":
        return ops.split(x, ends, axis=axis)
    edges = [0, *ends, x.shape[axis]]
    return list(x.split([b - a for a, b in itertools.pairwise(edges)], axis))


def put(x, part, start):
    """`x` with `part` in place of its entries from `start` on, ints or int tensors, one per axis.

    TensorFlow knows no gradient of `ops.slice_update`, so that gradients had none themselves.
    """
    if keras.backend.backend() != "tensorflow":
        return ops.slice_update(x, start, part)
    import tensorflow as tf

    @tf.custom_gradient
    def update(x, part):
        def gradient(upstream):
            d_part = ops.slice(upstream, start, ops.shape(part))
            return put(upstream, ops.zeros_like(part), start), d_part

        return ops.slice_update(x, start, part), gradient

    return update(x, part)


def pad_rows(x, before, behind):
    """Rows of zeros on both sides of axis 1, ints or int tensors, perhaps none."""
    if keras.backend.backend() == "torch":  # `ops.pad` would leave out what is 0 in a trace
        import torch

        return torch.nn.functional.pad(x, (*[0, 0] * (x.ndim - 2), before, behind))
    return ops.pad(x, [(0, 0), (before, behind)] + [(0, 0)] * (len(x.shape) - 2))


def gather(x, numbers, axis):
    """`ops.take`, in operations that PyTorch can export.

    Args:
        x: a tensor.
        numbers: ints of any shape, an array or a tensor, none negative.
        axis: int, not negative; it is replaced by the axes of `numbers`.
    """
    if keras.backend.backend() != "torch":
        return ops.take(x, numbers, axis=axis)
    numbers = ops.convert_to_tensor(numbers).long()
    found = x.index_select(axis, numbers.reshape(-1))
    return found.reshape((*x.shape[:axis], *numbers.shape, *x.shape[axis + 1 :]))


def take_along_last(x, numbers):
    """`ops.take_along_axis` at the last axis, also for axes of unknown size that turn out empty.

    On PyTorch it is one operation that ONNX has.

    Args:
        x: a tensor.
        numbers: int32 tensor of the same rank, of which the other axes broadcast to those of `x`.
            Where `x` is empty, what it gives is any number.
    """
    if keras.backend.backend() == "torch":
        return x.gather(-1, numbers.expand((*x.shape[:-1], numbers.shape[-1])).long())
    if keras.backend.backend() != "tensorflow":
        return ops.take_along_axis(x, numbers, axis=-1)
    import tensorflow as tf

    sizes, static = sizes_of(x), (*x.shape[:-1], numbers.shape[-1])
    shape = (*sizes[:-1], size_of(numbers, len(sizes) - 1))
    if x.shape[-1] is None:  # nothing is copied if the size is not 0
        x = tf.pad(x, [(0, 0)] * (len(sizes) - 1) + [(0, tf.maximum(1 - sizes[-1], 0))])
    last = size_of(x, len(sizes) - 1)
    numbers = tf.reshape(tf.broadcast_to(numbers, shape), (-1, shape[-1]))
    found = tf.reshape(tf.gather(tf.reshape(x, (-1, last)), numbers, batch_dims=1), shape)
    found.set_shape(static)
    return found


def product(x, y, pattern):
    """`einops.einsum` of two tensors of which the last axes alone differ: matrix products.

    TensorFlow adds float16 up in float16 in its einsum, and in float32 in its
    matrix product. PyTorch has rules for a batch of gradients, which
    `jacobian(vectorize=True)` asks for, of matrix products alone.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        return einops.einsum(x, y, pattern)
    (*_, i, j), (*_, k, m) = (side.split() for side in pattern.partition(" ->")[0].split(","))
    shared = ({i, j} & {k, m}).pop()
    if backend == "tensorflow":
        import tensorflow as tf

        transposed = {"transpose_a": shared == i, "transpose_b": shared == m}
        leading = x.shape[:-2]
        if x.dtype != tf.bfloat16 or len(leading) < 2 or any(n not in (None, 1) for n in leading):
            return tf.matmul(x, y, **transposed)
        # A single product of bfloat16 with several leading axes is wrong on CPUs with AMX, seen
        # with TensorFlow 2.21 and `transpose_b`; with one leading axis it is right.
        sizes, others = sizes_of(x), sizes_of(y)
        count = math.prod(sizes[:-2])
        x = tf.reshape(x, (count, *sizes[-2:]))
        found = tf.matmul(x, tf.reshape(y, (count, *others[-2:])), **transposed)
        return tf.reshape(found, (*sizes[:-2], *sizes_of(found)[-2:]))
    x = x if shared == j else x.transpose(-1, -2)
    return x @ (y if shared == k else y.transpose(-1, -2))


def sum_segments(x, numbers, count):
    """`ops.segment_sum`, which on PyTorch would give float32 whatever it got.

    Args:
        x: `(rows, d)`.
        numbers: `(rows,)` ints in `[0, count)`: the segment of each row.
        count: int or int tensor.
    """
    if keras.backend.backend() != "torch":
        return ops.segment_sum(x, numbers, num_segments=count)
    return x.new_zeros((count, x.shape[1])).index_add(0, numbers, x)


def sum_to(x, like):
    """`x`, summed over the axes along which `like` was broadcast; of the dtype of `like`.

    A size that TensorFlow does not know yet may be 1, too.
    """
    if None in like.shape:
        import tensorflow as tf

        sizes = tf.shape(like)
        _, axes = tf.raw_ops.BroadcastGradientArgs(s0=tf.shape(x), s1=sizes)
        return tf.cast(tf.reshape(tf.reduce_sum(x, axes), sizes), like.dtype)
    missing = len(x.shape) - len(like.shape)
    x = ops.sum(x, axis=tuple(range(missing))) if missing else x
    axes = tuple(axis for axis in range(len(x.shape)) if like.shape[axis] == 1)
    return ops.cast(ops.sum(x, axis=axes, keepdims=True) if axes else x, like.dtype)


def after(tensors):
    """A context in which operations wait until `tensors` are there.

    TensorFlow starts whatever can start, and of several branches of a graph it
    would hold what is large in all of them at once.
    """
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.control_dependencies(tensors)


def map_range(function, count):
    """`ops.map` over `range(count)`, in which TensorFlow works on few turns at a time, not on 10.

    Args:
        function: from an int32 tensor, on PyTorch an int, to a list of tensors.
        count: int or int tensor.
    """
    if keras.backend.backend() == "torch":  # whose loops are Python's
        turns = [function(number) for number in range(count)]
        return [ops.stack(each) for each in zip(*turns, strict=True)]
    numbers = ops.arange(count, dtype="int32")
    if keras.backend.backend() != "tensorflow":
        return ops.map(function, numbers)
    import tensorflow as tf

    specs = tf.nest.map_structure(tf.TensorSpec.from_tensor, function(numbers[0]))
    options = {"fn_output_signature": specs}
    if not tf.executing_eagerly():
        options["parallel_iterations"] = AT_ONCE
    return tf.map_fn(function, numbers, **options)


def fold_range(function, count, first):
    """`ops.fori_loop` from 1 to `count`, likewise: `so_far = function(i, so_far)`."""
    if keras.backend.backend() != "tensorflow":
        return ops.fori_loop(1, count, function, first)
    import tensorflow as tf

    _, found = tf.while_loop(
        lambda i, so_far: i < count,
        lambda i, so_far: (i + 1, function(i, so_far)),
        (1, first),
        parallel_iterations=1 if tf.executing_eagerly() else AT_ONCE,
    )
    return found


def refuse_longer(x, sizes, limit, told):
    """`x`, once it is certain that some sizes are at most `limit`.

    A size that is an int has been checked before. Of others, TensorFlow raises an
    error while it runs. XLA and exported models cannot: their result is NaN.

    Args:
        x: a float tensor.
        sizes: ints or int tensors.
        limit: an int.
        told: a str, what the error says.
    """
    sizes = [size for size in sizes if not isinstance(size, int)]
    if not sizes:
        return x
    if keras.backend.backend() != "tensorflow":
        fits = reduce(operator.and_, [as_number(size) <= limit for size in sizes])
        return ops.where(fits, x, ops.full((), float("nan"), x.dtype))
    import tensorflow as tf

    longest = tf.reduce_max([tf.cast(size, "int32") for size in sizes])
    with tf.control_dependencies([tf.debugging.assert_less_equal(longest, limit, told)]):
        return tf.where(longest <= limit, x, tf.cast(float("nan"), x.dtype))


def both_true(x, y):
    """`x & y` of bool tensors of as many axes, in operations that LiteRT has.

    Its "and" ends the process where more than four axes are broadcast: those that are of size 1
    in both are left out. Where that does not suffice, a selection does the same, more slowly.
    """
    if keras.backend.backend() != "tensorflow" or len(x.shape) <= 4:
        return x & y
    import tensorflow as tf

    ones = [
        axis for axis, sizes in enumerate(zip(x.shape, y.shape, strict=True)) if sizes == (1, 1)
    ]
    if len(x.shape) - len(ones) > 4:
        return tf.where(x, y, tf.constant(False))
    found = tf.squeeze(x, ones) & tf.squeeze(y, ones)
    for axis in ones:
        found = tf.expand_dims(found, axis)
    return found


def on_one_axis(function, x):
    """`function(x)`, elementwise; on PyTorch `x` has one axis in it.

    PyTorch's converter to LiteRT refuses the minimum and maximum of a tensor of six axes and
    a number, as positions have where query heads share key heads.
    """
    if keras.backend.backend() != "torch":
        return function(x)
    return function(x.reshape(-1)).reshape(x.shape)


def any_of(flags):
    """`ops.any` of a whole bool tensor, in operations that PyTorch can export to ONNX."""
    return ops.sum(ops.cast(flags, "int32")) > 0


def all_of(flags):
    """`ops.all` of a whole bool tensor, likewise."""
    return ops.logical_not(any_of(ops.logical_not(flags)))


def require(x, condition, told):
    """`x`, once it is certain that a condition holds.

    TensorFlow raises an error while it runs. Where nothing can be raised, with XLA, on
    JAX and in a trace of PyTorch, all of `x` is NaN if it does not hold.

    Args:
        x: a float tensor.
        condition: a scalar bool tensor.
        told: a str, what the error says.
    """
    if keras.backend.backend() != "tensorflow":
        return ops.where(condition, x, ops.full((), float("nan"), x.dtype))
    import tensorflow as tf

    with tf.control_dependencies([tf.debugging.Assert(condition, [told])]):
        return tf.where(condition, x, tf.cast(float("nan"), x.dtype))


def trace_pairs(function, n, m):
    """Call `function(q_pos, k_pos)` as it would be traced; PyTorch, which need not trace, runs it.

    Args:
        function: from int32 tensors `(n, 1)` and `(1, m)` to a tensor.
        n, m: ints; TensorFlow does not see them.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        specs = [tf.TensorSpec(shape, "int32") for shape in ((None, 1), (1, None))]
        tf.function(function, autograph=False).get_concrete_function(*specs)
    elif keras.backend.backend() == "jax":
        import jax

        jax.eval_shape(function, *(jax.ShapeDtypeStruct(x, "int32") for x in ((n, 1), (1, m))))
    else:
        function(ops.arange(n, dtype="int32")[:, None], ops.arange(m, dtype="int32")[None])


def least(a, b):
    """The lesser of two sizes: ints, int tensors, or what JAX exports unknown lengths as."""
    return _either(min, "minimum", "min_dim", a, b)


def most(a, b):
    """The larger of two sizes, likewise."""
    return _either(max, "maximum", "max_dim", a, b)


def as_number(size):
    """A size as an int tensor: what it is once the graph runs."""
    if keras.backend.backend() == "torch":  # `ops` would make an int of it, for good
        import torch

        is_tensor = isinstance(size, torch.Tensor)
        return size if is_tensor else torch.scalar_tensor(size, dtype=torch.int64)
    return ops.convert_to_tensor(size)


def known_size(size):
    """The size if it is an int, or `None` while it is a tensor or a name."""
    return size if isinstance(size, int) else None


def is_symbolic(size):
    """Whether a size is a name, as JAX exports unknown lengths: little can be asked of it."""
    return keras.backend.backend() == "jax" and not isinstance(size, int)


def _either(of_ints, of_tensors, of_dims, a, b):
    if isinstance(a, int) and isinstance(b, int):
        return of_ints(a, b)
    if keras.backend.backend() == "jax":
        import jax

        return getattr(jax.core, of_dims)(a, b)
    if keras.backend.backend() == "torch":  # whose sizes are int64; of `ops` they would be int32
        import torch

        a, b = (torch.as_tensor(x, dtype=torch.int64) for x in (a, b))
        return getattr(torch, of_tensors)(a, b)
    return getattr(ops, of_tensors)(a, b)


def value_of(number):
    """The int in a scalar int tensor, or `None` where it is traced and none is in it yet."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        value = tf.get_static_value(number)
        return None if value is None else int(value)
    if keras.backend.backend() == "jax":
        import jax

        return None if isinstance(number, jax.core.Tracer) else int(number)
    import torch

    traced = is_traced_to_export() or torch.compiler.is_compiling() or number.is_meta
    return None if traced else int(number)


def is_traced_to_export():
    """Whether PyTorch traces a model to export it; it cannot do so through a custom gradient."""
    if keras.backend.backend() != "torch":
        return False
    import torch

    return torch.jit.is_tracing() or torch.compiler.is_exporting()
