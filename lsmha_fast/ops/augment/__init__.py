from .op import augment as augment
from .op import mix_and_erase as mix_and_erase
