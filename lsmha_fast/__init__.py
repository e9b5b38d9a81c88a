"""Large-scale multi-head attention for vision transformers: kernels, models, training, analysis.

Names load on first use, so that `import lsmha_fast` (and `lsmha --help`) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import analysis as analysis
    from . import data as data
    from . import models as models
    from . import nn as nn
    from . import ops as ops
    from .models import CCT as CCT
    from .models import create_model as create_model
    from .nn import ConvBlock as ConvBlock
    from .nn import ConvStem as ConvStem
    from .nn import EncoderBlock as EncoderBlock
    from .nn import LSMultiHeadAttention as LSMultiHeadAttention
    from .nn import SeqPool as SeqPool

_HOME = {
    "LSMultiHeadAttention": "nn",
    "ConvStem": "nn",
    "ConvBlock": "nn",
    "SeqPool": "nn",
    "EncoderBlock": "nn",
    "CCT": "models",
    "create_model": "models",
}
_MODULES = ("analysis", "data", "models", "nn", "ops", "train")

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
