"""`Runner`: calls of an inference form from many threads, warm from the first on."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .form import InferenceCCT


class Runner:
    """Runs an optimised model on any number of images up to a maximum, thread-safe and warm.

    Calls are taken one after the other: on a CPU each uses all of PyTorch's threads, so that two
    at a time would share the cores and keep a team of threads for every caller; on a GPU they share
    the buffers of the captured graphs. Nothing is compiled or captured after the constructor.

    Args:
        model: what `optimize` returned.
        max_batch: most images of a call.

    Raises:
        ValueError: not an optimised model, or `max_batch` below 1.
    """

    def __init__(self, model: InferenceCCT, max_batch: int):
        if not isinstance(model, InferenceCCT):
            raise ValueError(f"Runner: expected what optimize returns, got {type(model).__name__}")
        if max_batch < 1:
            raise ValueError(f"Runner: max_batch must be at least 1, got {max_batch}")
        self.model, self.max_batch = model, max_batch
        self.device = model.head.scores.device
        self._lock = threading.Lock()
        on_gpu = self.device.type == "cuda"
        self._run = _Graphs(model, max_batch, self.device) if on_gpu else model
        for batch in {1, max_batch}:
            self(torch.zeros(batch, *model.image_shape, dtype=model.image_dtype))

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) on the CPU, 1 <= B <= max_batch -> logits (B, K) float32, there.

        Raises:
            ValueError: too many images, or of another shape or dtype.
        """
        model = self.model
        if images.shape[1:] != model.image_shape or not 1 <= len(images) <= self.max_batch:
            raise ValueError(
                f"Runner: expected images (1..{self.max_batch}, "
                f"{', '.join(map(str, model.image_shape))}), got {tuple(images.shape)}"
            )
        if images.dtype != model.image_dtype:
            raise ValueError(f"Runner: expected {model.image_dtype} images, got {images.dtype}")
        with self._lock:
            return self._run(images)


class _Graphs:
    """The whole model as CUDA graphs, one per power of two of the batch, in one memory pool.

    A call copies its images through pinned memory into the smallest graph they fit, replays it and
    waits for the logits. Rows beyond the call's hold older images and are not read.
    """

    def __init__(self, model: InferenceCCT, max_batch: int, device: torch.device):
        self.model, self.device = model, device
        largest = 1 << (max_batch - 1).bit_length()
        shape = (largest, *model.image_shape)
        self.pinned = torch.zeros(shape, dtype=model.image_dtype, pin_memory=True)
        self.images = torch.zeros(shape, dtype=model.image_dtype, device=device)
        self.pinned_logits = torch.empty(largest, model.num_classes, pin_memory=True)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        batch = largest  # the largest first, so that the others fit into its memory
        with torch.cuda.device(device):
            while batch:
                self.graphs[batch] = self._capture(batch, pool)
                batch //= 2

    def _capture(self, batch: int, pool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        images = self.images[:batch]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(3):  # kernels are compiled and tuned before the capture
                self.model(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph, pool=pool):
            logits = self.model(images)
        return graph, logits

    def __call__(self, images: Tensor) -> Tensor:
        n = len(images)
        graph, logits = self.graphs[1 << (n - 1).bit_length()]
        self.pinned[:n].copy_(images)
        with torch.cuda.device(self.device):
            self.images[:n].copy_(self.pinned[:n], non_blocking=True)
            graph.replay()
            self.pinned_logits[:n].copy_(logits[:n], non_blocking=True)
            torch.cuda.current_stream().synchronize()
        return self.pinned_logits[:n].clone()
