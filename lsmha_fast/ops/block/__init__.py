from .op import norm_linear as norm_linear
from .op import norm_pool_linear as norm_pool_linear
from .op import project_mlp as project_mlp
