from .op import seq_pool as seq_pool
