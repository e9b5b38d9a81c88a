"""CCT with large-scale multi-head attention, its named sizes and published checkpoints."""

from .cct import CCT as CCT
from .cct import CCTOutput as CCTOutput
from .convert import from_compact_transformers as from_compact_transformers
from .prune import drop_silent as drop_silent
from .prune import prune_model as prune_model
from .registry import create_model as create_model
from .registry import parse_name as parse_name
