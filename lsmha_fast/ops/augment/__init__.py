from .op import augment as augment
from .op import erase_mix as erase_mix
