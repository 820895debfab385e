"""Keras masks that got lost on the way to a layer, found in the history of its symbols.

Keras' layers pass masks on. Its operations, such as `x + y`, drop them without a word.
"""

import weakref

import keras

from sparse_attn.layers.base import warn

# They relate positions or move axes: what comes out of them is not at the places of what went in.
_OTHER_PLACES = {"Dot", "DotProductAttention", "Einsum", "Matmul", "Tensordot", "Vdot"}
_OTHER_PLACES |= {"Moveaxis", "Swapaxes", "Transpose"}
_reported = weakref.WeakSet()  # the calls of operations (nodes of Keras) that dropped masks


def mask_of(x):
    """The Keras mask that a tensor or a symbol carries, or `None`."""
    return getattr(x, "_keras_mask", None)


def warn_of_dropped_mask(layer, name, symbol):
    """Warn if an ancestor of a symbol had a mask, once for each call that dropped one.

    A layer that comes from a config is silent: it was part of a model before.

    Args:
        layer: the layer that gets the symbol.
        name: the argument that it comes in.
        symbol: a symbol without a mask.
    """
    node = None if "dropped mask" in layer._warned else _dropped_by(symbol)
    if node is not None:
        _reported.add(node)
        warn(_message(layer, name, node.operation))


def _dropped_by(symbol):
    """The node that dropped the mask of an ancestor of a symbol, not reported yet, or `None`.

    The search goes back through all that leaves positions in their places, and ends at

    - a tensor that carries a mask: the operation behind it dropped that mask. If it is a
      layer, it has said so (pooling), or Keras has warned at its call; so it is
      reported only if it merges tensors with masks and without;
    - a layer that does not support masking, which would have dropped a mask in any case;
    - operations whose outputs lie elsewhere: of another rank, of one position, products of
      matrices and the like. Of a layer with several arguments, only the first counts, as
      for Keras' own masks.

    Each symbol is visited once.
    """
    left, seen = [symbol], set()
    while left:
        x = left.pop()
        history = getattr(x, "_keras_history", None)
        if id(x) in seen or history is None or mask_of(x) is not None:
            continue
        seen.add(id(x))
        operation = history.operation
        is_layer = isinstance(operation, keras.layers.Layer)
        node = operation._inbound_nodes[history.node_index]
        inputs = _inputs(node, is_layer)
        sources = [each for each in inputs if _corresponds(each, x, is_layer)]
        masks = [mask_of(each) for each in sources]
        if any(mask is not None for mask in masks):
            # Layers that merge pass no mask on if any input has none, one that is broadcast too.
            merges = any(mask_of(each) is None for each in inputs)
            if (merges or not is_layer) and node not in _reported:
                return node
        elif not is_layer or operation.supports_masking:
            left += sources
    return None


def _inputs(node, is_layer):
    """The inputs of a call that its output may have the positions of."""
    operation, arguments = node.operation, node.arguments
    if type(operation).__name__ in _OTHER_PLACES:
        return []
    if not is_layer:
        return node.input_tensors
    first = keras.tree.flatten([*arguments.args, *arguments.kwargs.values()][:1])
    return first[:1] if isinstance(operation, keras.layers.Attention) else first  # [query, ...]


def _corresponds(source, x, is_layer):
    if not isinstance(source, keras.KerasTensor) or len(source.shape) != len(x.shape):
        return False
    pairs = zip(source.shape[1:-1], x.shape[1:-1], strict=True)
    # Of a slice, or of several tensors behind one another, some positions are still there.
    return all(a == b or (1 not in (a, b) and (None in (a, b) or not is_layer)) for a, b in pairs)


def _message(layer, name, operation):
    """What a warning says."""
    return (
        f"The mask of `{name}` did not arrive at layer {layer.name!r}: {operation.name!r} (of type "
        f"{type(operation).__name__}) dropped it, so that padding is attended to. Operators such "
        "as `x + y`, and the functions of `keras.ops`, drop masks; layers keep them, where all "
        "of their inputs have one: `keras.layers.add([x, y])`. Or give the mask by name."
    )
