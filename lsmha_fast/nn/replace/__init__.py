"""Attention of models that others wrote, computed by `lsmha_fast.ops`, weights untouched."""

from .account import Account as Account
from .account import Skip as Skip
from .account import Swap as Swap
from .swap import replace_attention as replace_attention
