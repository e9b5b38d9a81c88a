from .decompose import attention_decompositions as attention_decompositions
from .op import attention as attention
from .op import attention_packed as attention_packed
from .op import attention_weights as attention_weights
from .op import attention_with_weights as attention_with_weights
