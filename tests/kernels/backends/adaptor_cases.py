"""Stand-ins in place of the adaptors' packages, the packages themselves where they are, and comparisons.

The stand-ins (fake_kernels.py) are ours, so the tests with them show that conventions are translated, not that a
package has them; that is for the tests marked `cuda`.
"""

import sys

import pytest
import torch

from stages.kernels.adaptors import nvdiffrast as adaptor_nvdiffrast
from stages.kernels.adaptors import tinycudann as adaptor_tinycudann
from stages.kernels.backend import Selection, probe, selected
from tests.kernels.backends import fake_kernels

FAMILY = {"tinycudann": ("hash", "mlp"), "nvdiffrast": ("raster",), "kaolin": ("marching",)}


def forget():
    for cached in (adaptor_tinycudann._all_levels, adaptor_tinycudann._one_level, adaptor_tinycudann._network):
        cached.cache_clear()
    adaptor_nvdiffrast.context.cache_clear()


def stand_ins(monkeypatch):
    """Yield install(name): put a stand-in in a package's place and let its families choose it on the CPU."""

    def install(name):
        forget()
        for module, stand_in in getattr(fake_kernels, name)().items():
            monkeypatch.setitem(sys.modules, module, stand_in)
        return selected(Selection("cpu", dict.fromkeys(FAMILY[name], name)))

    yield install
    forget()


def assert_close(actual, expected, relative):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = float(b.detach().abs().max()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=relative * max(scale, 1e-30))


def real(name):
    """Skip unless the package imports here."""
    forget()
    status = probe(name)
    if status.state != "ok":
        pytest.skip(f"{name}: {status.detail}")
