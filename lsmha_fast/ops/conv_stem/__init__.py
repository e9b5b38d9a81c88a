from .op import Pool as Pool
from .op import conv_stem as conv_stem
