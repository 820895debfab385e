"""Three frameworks behind one face: tensors, a compiled call that ends when its results are there.

`forward` and `training` return a function without arguments; each call of it computes all anew.
"""

import os

import numpy as np


class TensorFlow:
    def __init__(self, job, xla):
        import tensorflow

        self.tf, self.dtype, self.xla = tensorflow, job.dtype, xla

    def tensor(self, x):
        return self.tf.cast(self.tf.constant(x), self.dtype)

    def forward(self, function, inputs):
        compiled = self._compile(lambda *inputs: (function(*inputs),), inputs)
        return lambda: compiled(*inputs)

    def training(self, function, inputs, upstream):
        def step(upstream, *inputs):
            with self.tf.GradientTape() as tape:
                tape.watch(inputs)
                out = function(*inputs)
            sources = [*inputs, *tape.watched_variables()]
            return out, *tape.gradient(out, sources, upstream)

        compiled = self._compile(step, (upstream, *inputs))
        return lambda: compiled(upstream, *inputs)

    def _compile(self, function, inputs):
        compiled = self.tf.function(function, jit_compile=self.xla, autograph=False)
        return compiled.get_concrete_function(*inputs)

    def numpy(self, x):
        return self.tf.cast(x, "float32").numpy()


class Jax:
    def __init__(self, job, xla):
        import jax

        self.jax, self.dtype = jax, job.dtype

    def tensor(self, x):
        return self.jax.numpy.asarray(x, self.dtype)

    def forward(self, function, inputs):
        compiled = self.jax.jit(lambda *inputs: (function(*inputs),))
        return lambda: self.jax.block_until_ready(compiled(*inputs))

    def training(self, function, inputs, upstream):
        @self.jax.jit
        def step(upstream, *inputs):
            out, gradients = self.jax.vjp(function, *inputs)
            return out, *gradients(upstream)

        return lambda: self.jax.block_until_ready(step(upstream, *inputs))

    def numpy(self, x):
        return np.asarray(x, "float32")

    def device_memory(self):
        """Bytes in use on the accelerator, and the most that ever were."""
        stats = self.jax.devices()[0].memory_stats()
        return stats["bytes_in_use"], stats["peak_bytes_in_use"]


class Torch:
    def __init__(self, job, xla):
        import torch

        self.torch, self.dtype = torch, getattr(torch, job.dtype)
        self.device = "cuda" if job.device == "gpu" else "cpu"
        torch.set_num_threads(len(os.sched_getaffinity(0)))

    def tensor(self, x):
        return self.torch.from_numpy(x).to(self.device, self.dtype)

    def forward(self, function, inputs):
        def call():
            with self.torch.inference_mode():
                return self._done((function(*inputs),))

        return call

    def training(self, function, inputs, upstream):
        parameters = getattr(function, "parameters", tuple)()
        sources = [*[x.requires_grad_() for x in inputs], *parameters]

        def call():
            out = function(*inputs)
            gradients = self.torch.autograd.grad(out, sources, upstream)
            return self._done((out.detach(), *gradients))

        return call

    def _done(self, results):
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return results

    def numpy(self, x):
        return x.to("cpu", self.torch.float32).numpy()

    def device_memory(self):
        """Bytes in use on the accelerator, and the most since the last question."""
        cuda = self.torch.cuda
        found = cuda.memory_allocated(), cuda.max_memory_allocated()
        cuda.reset_peak_memory_stats()
        return found


FRAMEWORKS = {"tensorflow": TensorFlow, "jax": Jax, "torch": Torch}
