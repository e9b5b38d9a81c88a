from .op import HeadClassSums as HeadClassSums
from .op import head_class_sums as head_class_sums
