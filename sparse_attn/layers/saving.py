"""How layers are saved: their patterns, and the policies of sublayers, quantized ones as well."""

import keras
from keras import dtype_policies

from sparse_attn.layers.base import warn
from sparse_attn.patterns import Pattern


class HasPolicies:
    """A layer that tells its sublayers how they compute, and saves that by their names.

    It is a dtype policy and, where they are quantized, how. A path would not do for a name: that
    of a layer within another one is not the same after it is loaded.
    """

    _computing = None  # of sublayers that are yet to be made: their arguments, by name

    def computing(self, name):
        """Arguments of a sublayer: its policy is one that holds no map, which cannot be saved."""
        if self._computing and name in self._computing:
            return self._computing[name]
        policy = self.dtype_policy
        is_map = isinstance(policy, dtype_policies.DTypePolicyMap)
        return {"dtype": policy[f"{self.path}/{name}"] if is_map else policy}

    def with_policies(self, config, *sublayers):
        """The config of the layer, with what its own sublayers have that it has not."""
        found = dict(self._computing or {})
        found |= {sub.name: _computing_of(sub) for sub in sublayers}
        if all(own == {"dtype": self.dtype_policy} for own in found.values()):
            return config
        return {**config, "policies": keras.saving.serialize_keras_object(found)}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        policies = config.pop("policies", None)
        layer = cls(**config)  # that of Keras would say what is wrong in other words
        layer._warned.add("dropped mask")  # its model was built before
        if policies:
            layer._computing = keras.saving.deserialize_keras_object(policies)
        return layer


def _computing_of(sublayer):
    how = getattr(sublayer, "quantization_config", None)
    own = {"dtype": sublayer.dtype_policy}
    return own if how is None else {**own, "quantization_config": how}


def save_shared(thing):
    """The config of an object, or of a list of them, that several layers of a model may hold.

    In a `.keras` file Keras marks the config of what it meets a second time, and that which it
    made the first time; but of the latter a copy is in the file by then. So it meets it twice here.
    """
    keras.saving.serialize_keras_object(thing)
    return keras.saving.serialize_keras_object(thing)


def save_pattern(pattern):
    """The config of a pattern, which holds where classes of a user's own are defined.

    A class that is not registered is saved all the same, with a warning.
    """
    own = {}
    for kind in classes_of(pattern):
        name = keras.saving.get_registered_name(kind)
        if not name.startswith("sparse_attn>"):
            own[name] = kind.__module__
        if keras.saving.get_registered_object(name) is None:
            warn(
                f"`pattern` holds {kind.__name__!r}, a class that is not registered: this can be "
                "neither loaded nor cloned until it is. Put "
                "`@keras.saving.register_keras_serializable()` above its definition."
            )
    config = keras.saving.serialize_keras_object(pattern)
    return {**config, "defined_in": own} if own else config


def load_pattern(config):
    """The inverse of `save_pattern`, which says what is to be registered first if anything is."""
    own = config.get("defined_in", {})
    try:
        return keras.saving.deserialize_keras_object(config, custom_objects=_registered_since(own))
    except (TypeError, ValueError) as error:
        for name, module in own.items():
            if keras.saving.get_registered_object(name) is None:
                raise ValueError(
                    f"`pattern` holds {name!r}, a class of {module!r} that is not registered here, "
                    "so that it can be neither loaded nor cloned. Put "
                    "`@keras.saving.register_keras_serializable()` above its definition, and "
                    "import or define it before this; or do this within `with "
                    "keras.saving.custom_object_scope"
                    f"({{{name!r}: {name.rpartition('>')[2]}}}):`."
                ) from error
        raise


def _registered_since(own):
    """Classes that were not registered when they were saved, but are now, by their old names."""
    known = keras.saving.get_custom_objects()
    found = {}
    for name in own:
        if ">" not in name and keras.saving.get_registered_object(name) is None:
            named_so = [kind for each, kind in known.items() if each.rpartition(">")[2] == name]
            if len(named_so) == 1:
                found[name] = named_so[0]
    return found


def classes_of(pattern):
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
