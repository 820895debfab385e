"""What TensorFlow has to be told about graphs; the other backends need none of it."""

import contextlib

import keras


def unconverted(function):
    """A function that TensorFlow's AutoGraph runs as it is.

    What is decorated so has no control flow on tensors, which is all that
    AutoGraph is for; to convert it, with all that it calls, takes seconds.
    """
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.autograph.experimental.do_not_convert(function)


def after(tensors):
    """A context in which operations wait until `tensors` are there.

    TensorFlow starts whatever can start, and of several branches of a graph it
    would hold what is large in all of them at once.
    """
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.control_dependencies(tensors)
