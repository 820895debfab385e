"""What a result was measured on, without names of hosts or folders."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path

LIBRARIES = ("keras", "tensorflow", "jax", "torch", "local_attention", "transformers", "numpy")


def machine(gpu=None):
    """A dict of str: processor, cores, memory and system; the GPU if one is named."""
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    total = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    found = {
        "processor": processor[1] if processor else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(total[1]) * 1024 / 1e9:.0f} GB",
        "system": platform.system(),
    }
    return {**found, "GPU": gpu} if gpu else found


def versions():
    """The versions of Python, of this package and of what it is compared with."""
    packages = metadata.packages_distributions()
    found = {"Python": platform.python_version(), "sparse_attn": metadata.version("sparse_attn")}
    for name in LIBRARIES:
        for distribution in packages.get(name, [])[:1]:
            found[name] = metadata.version(distribution)
    return found
