"""Stateless ops. Each folder holds one op: public function, reference, backends."""

from .attention import attention as attention
from .attention import attention_decompositions as attention_decompositions
from .attention import attention_packed as attention_packed
from .attention import attention_weights as attention_weights
from .attention import attention_with_weights as attention_with_weights
from .augment import augment as augment
from .augment import mix_and_erase as mix_and_erase
from .block import norm_linear as norm_linear
from .block import norm_pool_linear as norm_pool_linear
from .block import project_mlp as project_mlp
from .conv_stem import conv_stem as conv_stem
from .head_class_sums import HeadClassSums as HeadClassSums
from .head_class_sums import head_class_sums as head_class_sums
from .residual_norm import residual_norm as residual_norm
from .seq_pool import seq_pool as seq_pool
