"""Keras masks that got lost on the way to a layer, found in the history of its symbols.

Keras' layers pass masks on. Its operations, such as `x + y`, drop them without a word.
"""

import keras

# They relate positions or move axes: what comes out of them is not at the places of what went in.
_OTHER_PLACES = {"Dot", "DotProductAttention", "Einsum", "Matmul", "Tensordot", "Vdot"}
_OTHER_PLACES |= {"Moveaxis", "Swapaxes", "Transpose"}


def mask_of(x):
    """The Keras mask that a tensor or a symbol carries, or `None`."""
    return getattr(x, "_keras_mask", None)


def dropped_by(symbol):
    """The operation that dropped the mask of an ancestor of a symbol, or `None`.

    The search goes back through all that leaves positions in their places, and ends at

    - a tensor that carries a mask: the operation behind it dropped that mask. If it is a
      layer, it has said so (pooling), or Keras has warned at its call; so it is
      reported only if it merges tensors with masks and without;
    - a layer that does not support masking, which would have dropped a mask in any case;
    - operations whose outputs lie elsewhere: of another rank, of one position, products of
      matrices and the like. Of a layer with several inputs, only the first counts, as for
      Keras' own masks.

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
        sources = _sources(operation, operation._inbound_nodes[history.node_index], x, is_layer)
        masked = [each for each in sources if mask_of(each) is not None]
        if masked and (not is_layer or len(masked) < len(sources)):
            return operation
        if not masked and (not is_layer or operation.supports_masking):
            left += sources
    return None


def _sources(operation, node, x, is_layer):
    """The inputs of an operation whose positions are those of its output `x`."""
    found = node.input_tensors
    if is_layer and node.arguments.args:
        first = node.arguments.args[0]
        found = first if isinstance(first, (list, tuple)) else [first]
    elif is_layer:
        found = found[:1]
    elif type(operation).__name__ in _OTHER_PLACES:
        return []
    return [each for each in found if _corresponds(each, x, is_layer)]


def _corresponds(source, x, is_layer):
    if not isinstance(source, keras.KerasTensor) or len(source.shape) != len(x.shape):
        return False
    pairs = zip(source.shape[1:-1], x.shape[1:-1], strict=True)
    # Of a slice, or of several tensors behind one another, some positions are still there.
    return all(a == b or (1 not in (a, b) and (None in (a, b) or not is_layer)) for a, b in pairs)


def message(layer, name, operation):
    """What a warning says."""
    return (
        f"The mask of `{name}` did not arrive at layer {layer.name!r}: {operation.name!r} (of type "
        f"{type(operation).__name__}) dropped it, so that padding is attended to. Operators such "
        "as `x + y`, and the functions of `keras.ops`, drop masks; layers keep them, where all "
        "of their inputs have one: `keras.layers.add([x, y])`. Or give the mask by name."
    )
