"""How functions are traced."""

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
