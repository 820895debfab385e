"""The dtype policies of sublayers, which may be quantized each by itself, and are saved so."""

import keras
from keras import dtype_policies


def policy_of(layer, name):
    """The policy of a sublayer: one that holds a whole map of them cannot be saved."""
    policy = layer.dtype_policy
    is_map = isinstance(policy, dtype_policies.DTypePolicyMap)
    return policy[f"{layer.path}/{name}"] if is_map else policy


def with_policies(layer, config):
    """The config of a layer, with the policies of its sublayers if any is quantized."""
    quantized = {
        sub.path: sub.dtype_policy
        for sub in layer._flatten_layers(include_self=False)
        if getattr(sub, "quantization_mode", None) is not None
    }
    if not quantized:
        return config
    policy = layer.dtype_policy
    if isinstance(policy, dtype_policies.DTypePolicyMap):
        policy, quantized = policy.default_policy, {**policy, **quantized}
    policies = dtype_policies.DTypePolicyMap(policy, quantized)
    return {**config, "dtype": keras.saving.serialize_keras_object(policies)}
