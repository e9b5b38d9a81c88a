"""Large-scale multi-head attention for vision transformers: kernels, models, training, analysis.

Names load on first use, so that `import lsmha_fast` (and `lsmha --help`) does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import lazy_exports
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import analysis as analysis
    from . import data as data
    from . import deploy as deploy
    from . import models as models
    from . import nn as nn
    from . import ops as ops
    from . import train as train
    from .models import CCT as CCT
    from .models import create_model as create_model
    from .nn import ConvBlock as ConvBlock
    from .nn import ConvStem as ConvStem
    from .nn import EncoderBlock as EncoderBlock
    from .nn import LSMultiHeadAttention as LSMultiHeadAttention
    from .nn import SeqPool as SeqPool
    from .nn import register_flash_attention as register_flash_attention
    from .nn import replace_attention as replace_attention

_HOMES = {
    **dict.fromkeys(("analysis", "data", "deploy", "models", "nn", "ops", "train"), ""),
    **dict.fromkeys(
        (
            "LSMultiHeadAttention",
            "ConvStem",
            "ConvBlock",
            "SeqPool",
            "EncoderBlock",
            "register_flash_attention",
            "replace_attention",
        ),
        "nn",
    ),
    **dict.fromkeys(("CCT", "create_model"), "models"),
}
__all__ = list(_HOMES)
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
