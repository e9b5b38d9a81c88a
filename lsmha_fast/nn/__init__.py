"""Drop-in modules: parameters and state_dict keys; the arithmetic is in `lsmha_fast.ops`."""

from .attention import LSMultiHeadAttention as LSMultiHeadAttention
from .blocks import ConvBlock as ConvBlock
from .blocks import DropPath as DropPath
from .blocks import EncoderBlock as EncoderBlock
from .conv_stem import ConvStem as ConvStem
from .flash import register_flash_attention as register_flash_attention
from .prune import prune_heads as prune_heads
from .prune import prune_hidden as prune_hidden
from .replace import replace_attention as replace_attention
from .seq_pool import SeqPool as SeqPool
