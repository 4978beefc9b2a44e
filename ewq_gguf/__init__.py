"""Entropy-weighted mixed-precision GGUF files: plan, quantise, verify, measure."""

from ewq_gguf._version import __version__
from ewq_gguf.libraries import use_toolchain_libraries

use_toolchain_libraries()

__all__ = ["__version__"]
