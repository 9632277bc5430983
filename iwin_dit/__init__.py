"""Iwin-DiT: class-conditional latent diffusion with interleaved-window attention.

Names are resolved when first used (PEP 562), so that configs, ``--help`` and config errors load no torch.
"""

import os
from importlib import import_module

# Threads that wait for each other spin for about 0.1 ms, then sleep. By itself libgomp makes them spin for
# 3 ms, and on a shared machine that takes the cores from the very threads that they wait for; threads that
# sleep at once cost a fifth of the speed of a machine of one's own (benchmarks/contention.py). OpenMP reads
# this once, when torch is loaded. Every program of ours imports this package before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.2.0"

_HOME = {
    "FlowMatchEulerMaruyamaScheduler": "iwin_dit.diffusion.sde",
    "IdentityAutoencoder": "iwin_dit.data.identity",
    "IwinDiTTransformer2DModel": "iwin_dit.models.transformer",
    "IwinDiTTransformer3DModel": "iwin_dit.models.transformer",
    "IwinDiTPipeline": "iwin_dit.pipelines.media",
    "IwinDiTVideoPipeline": "iwin_dit.pipelines.media",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> type:
    if name not in _HOME:
        raise AttributeError(f"module 'iwin_dit' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
