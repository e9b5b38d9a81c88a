"""What a CUDA graph does, on a CPU: operators recorded with their tensors, then run again on them.

Python does not run in a replay, so a number that is no tensor stays what it was, and a result goes
where it lay. Waiting for the device raises, as it does while CUDA records.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lsmha_fast.train.graph import Recording

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}


class Recorder(TorchDispatchMode):
    """Notes every operator; what they change can be put back, since recording computes nothing."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in WAITS:
            raise RuntimeError(f"{function} waits for the device, which no graph can record")
        self._keep_what_changes(function, args, kwargs or {})
        out = function(*args, **kwargs or {})
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def _keep_what_changes(self, function, args, kwargs):
        arguments = function._schema.arguments
        given = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
        for argument in arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name in ("running_mean", "running_var"):  # of no schema's word
                for t in tree_leaves(given.get(argument.name)):
                    self.before.setdefault(t.data_ptr(), (t.detach(), t.detach().clone()))

    @torch.no_grad()
    def undo(self):
        for t, value in self.before.values():
            t.copy_(value)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            if any(r.alias_info is not None for r in function._schema.returns):
                continue  # a view, or a tensor changed in place
            for kept, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(new)


def record(function):
    """Stands in for `lsmha_fast.train.graph.record_cuda_graph`."""
    recorder, state = Recorder(), torch.get_rng_state()
    with recorder:
        output = function()
    recorder.undo()
    torch.set_rng_state(state)
    return Recording(recorder.replay, output)
