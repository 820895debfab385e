"""What the constructors of layers are given: objects, or what was saved of them."""

import functools
import types

import keras

from sparse_attn.checks import check_int, received
from sparse_attn.layers.saving import load_pattern, save_shared
from sparse_attn.patterns import Full, check_pattern
from sparse_attn.scores import read_mods


def read_object(kinds, name, value):
    """One of Keras' objects from itself, its name or its config; a function is one as well.

    Args:
        kinds: Keras' module of such objects, such as `keras.initializers`.
        name: the argument's name, for the message.
        value: what came. `None` passes.
    """
    requirement = f"one of `{kinds.__name__}`, its name or its config, or a function"
    try:
        found = kinds.get(value)
    except (TypeError, ValueError) as error:
        raise ValueError(received(name, requirement, value)) from error
    if not (found is None or callable(found)):
        raise ValueError(received(name, requirement, value))
    return found


def read_size(name, value):
    """Return `value` as a positive int, or raise `ValueError`, as Keras' layers do."""
    try:
        return check_int(name, value, minimum=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The argument {error}") from None


def read_pattern(pattern):
    """The pattern that a constructor was given: one, its config, or `None` for `Full()`."""
    if isinstance(pattern, dict):
        pattern = load_pattern(pattern)
    return check_pattern("pattern", Full() if pattern is None else pattern)


def save_score_mod(score_mod):
    """The config of a `score_mod`, or an error where Keras could not read it again."""
    for mod in score_mod if isinstance(score_mod, (list, tuple)) else [score_mod]:
        is_part = isinstance(mod, (functools.partial, types.MethodType))
        is_named = hasattr(mod, "get_config") or hasattr(mod, "__name__")
        if mod is not None and (is_part or not is_named):
            requirement = (
                "a registered function or object to be saved or cloned; an object of a class with "
                "`get_config`"
            )
            raise ValueError(received("score_mod", requirement, mod))
    return save_shared(score_mod)


def read_score_mod(score_mod, num_heads):
    """What a constructor was given: anything that `sparse_attention` takes, or its config."""
    if isinstance(score_mod, dict):
        score_mod = keras.saving.deserialize_keras_object(score_mod)
    if isinstance(score_mod, (list, tuple)):
        load = keras.saving.deserialize_keras_object
        score_mod = [load(mod) if isinstance(mod, dict) else mod for mod in score_mod]
    read_mods(score_mod, num_heads)
    return score_mod


def read_layer(name, layer):
    if isinstance(layer, dict):
        layer = keras.saving.deserialize_keras_object(layer)
    if not (layer is None or isinstance(layer, keras.layers.Layer)):
        raise TypeError(received(name, "a Keras layer or None", layer))
    return layer


def read_window(sliding_window):
    if sliding_window is None:
        return None
    try:
        return check_int("sliding_window", sliding_window, minimum=1)
    except (TypeError, ValueError) as error:
        told = received("sliding_window", "None or a positive int", sliding_window)
        raise type(error)(told) from None


def read_features(output_shape):
    if output_shape is None:
        return None
    sizes = output_shape if isinstance(output_shape, (tuple, list)) else [output_shape]
    try:
        if not sizes:
            raise ValueError
        return tuple(check_int("output_shape", size, minimum=1) for size in sizes)
    except (TypeError, ValueError):
        raise ValueError(
            "Invalid `output_shape`: it must be a positive int or a tuple of them. "
            f"Received: output_shape={output_shape!r}"
        ) from None
