"""How layers are saved: their patterns, and the policies of sublayers, quantized ones as well."""

import keras
from keras import dtype_policies

from sparse_attn.patterns import Pattern


class HasPolicies:
    """A layer that tells its sublayers their policies, and saves them by their names.

    A path would not do: that of a layer within another one is not the same after it is loaded.
    """

    _policies = None  # of sublayers that are yet to be made, by name

    def policy_of(self, name):
        """The policy of a sublayer: one that holds a whole map of them cannot be saved."""
        if self._policies and name in self._policies:
            return self._policies[name]
        policy = self.dtype_policy
        is_map = isinstance(policy, dtype_policies.DTypePolicyMap)
        return policy[f"{self.path}/{name}"] if is_map else policy

    def with_policies(self, config, *sublayers):
        """The config of the layer, with the policies of its own sublayers if any differs."""
        policies = dict(self._policies or {})
        policies |= {sub.name: sub.dtype_policy for sub in sublayers}
        if all(policy == self.dtype_policy for policy in policies.values()):
            return config
        save = keras.saving.serialize_keras_object
        return {**config, "policies": {name: save(policy) for name, policy in policies.items()}}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        policies = config.pop("policies", None)
        layer = cls(**config)  # that of Keras would say what is wrong in other words
        if policies:
            load = keras.saving.deserialize_keras_object
            layer._policies = {name: load(policy) for name, policy in policies.items()}
        return layer


def save_shared(thing):
    """The config of an object, or of a list of them, that several layers of a model may hold.

    In a `.keras` file Keras marks the config of what it meets a second time, and that which it
    made the first time; but of the latter a copy is in the file by then. So it meets it twice here.
    """
    keras.saving.serialize_keras_object(thing)
    return keras.saving.serialize_keras_object(thing)


def save_pattern(pattern):
    """The config of a pattern, which tells where classes of a user's own are defined."""
    modules = {
        keras.saving.get_registered_name(kind): kind.__module__ for kind in _classes(pattern)
    }
    own = {name: module for name, module in modules.items() if not name.startswith("sparse_attn>")}
    config = keras.saving.serialize_keras_object(pattern)
    return {**config, "defined_in": own} if own else config


def load_pattern(config):
    """The inverse of `save_pattern`, which tells what is to be imported first if anything is."""
    known = keras.saving.get_registered_object
    try:
        return keras.saving.deserialize_keras_object(config)
    except (TypeError, ValueError) as error:
        for name, module in config.get("defined_in", {}).items():
            if known(name) is None:
                raise ValueError(
                    f"`pattern` holds a class that is not known here, {name!r}. Before you load, "
                    f"import {module!r}, where it is defined; it must be registered there by "
                    "`keras.saving.register_keras_serializable`."
                ) from error
        raise


def _classes(pattern):
    """The classes of a pattern and of all patterns in it."""
    found, left = set(), [pattern]
    while left:
        each = left.pop()
        if isinstance(each, Pattern):
            found.add(type(each))
            left += vars(each).values()
        elif isinstance(each, (list, tuple)):
            left += each
    return found
