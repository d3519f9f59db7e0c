"""How much memory a training step takes, found without weights: the real step is run on tensors that hold no values.

The model's own code runs, with its shapes, dtypes and devices, on PyTorch's fake tensors (meta tensors that say they
lie on a device), so nothing is computed and nothing is allocated; a dispatch mode follows the storages that would be.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.training.metrics import Meter, token_losses

BASE = "base weights"

EXPERTS = "experts and router"

OPTIMIZER = "optimizer state"

GRADIENTS = "gradients"

ACTIVATIONS = "activations and logits"

ALLOCATOR = "kept by the C library"

PARTS = (BASE, EXPERTS, OPTIMIZER, GRADIENTS, ACTIVATIONS, ALLOCATOR)
"""What the memory of a step is made of."""

Result = TypeVar("Result")

ADAM_STATES = 2
"""Numbers that AdamW keeps of each trained one, in its dtype."""


class Heap:
    """What glibc's malloc holds of the machine's memory after the forward of a training step, on the CPU.

    PyTorch asks for aligned blocks. malloc takes such a block of n bytes out of a free piece of at least n + 96, and
    the autograd graph's small objects settle in what is left at its edges. So a block that the forward freed serves
    smaller ones only, it does not join its neighbours, and it stays resident. Blocks of 32 MiB and more are the
    exception: they are mapped on their own, and given back. The backward frees the graph, and finds room in that.
    """

    MAPPED = 32 << 20
    MARGIN = 96
    SPLINTER = 1 << 10

    def __init__(self) -> None:
        self.held = 0
        """Bytes now, used or not."""
        self.peak = 0
        self._free: list[int] = []
        """Sizes of the free pieces, sorted."""

    def allocate(self, num_bytes: int) -> None:
        """Best fit among the free pieces, else more memory of the machine."""
        place = len(self._free) if num_bytes >= self.MAPPED else bisect_left(self._free, num_bytes + self.MARGIN)
        if place < len(self._free):
            rest = self._free.pop(place) - num_bytes
            if rest >= self.SPLINTER:
                insort(self._free, rest)
        else:
            self.held += num_bytes
            self.peak = max(self.peak, self.held)

    def free(self, num_bytes: int) -> None:
        """Give a block back to malloc, or a mapped one to the machine."""
        if num_bytes >= self.MAPPED:
            self.held -= num_bytes
        elif num_bytes >= self.SPLINTER:
            insort(self._free, num_bytes)


class MemoryTracker(TorchDispatchMode):
    """Follows the bytes of all storages that are made inside, or handed to `hold`, until they are freed.

    A storage counts once, however many views it has, under the part that first claimed it; what operations make is
    `ACTIVATIONS`. As in `torch.distributed._tools.mem_tracker`, storages are followed by weak references. Memory that
    a kernel takes and gives back within one operation is not seen.

    A question about a value, which no fake tensor can answer, is answered with 0: no NaN, some padding, no packing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heap = Heap()
        """Of what operations made."""
        self._in_heap: set[int] = set()
        self._storages: dict[int, tuple[weakref.ref, str, int]] = {}
        self.live: dict[str, int] = dict.fromkeys(PARTS, 0)
        """Bytes at this moment, by part."""
        self.peak: dict[str, int] = dict(self.live)
        """Bytes by part when their sum was largest."""

    def hold(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count these under `part`, from now on until they are freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._storages:
                reference, before, num_bytes = self._storages[key]
                self.live[before] -= num_bytes
            else:
                num_bytes = storage.nbytes()
                reference = weakref.ref(storage, partial(self._freed, key))
            self._storages[key] = (reference, part, num_bytes)
            self.live[part] += num_bytes
        self._note_peak()

    def _freed(self, key: int, _: weakref.ref) -> None:
        _, part, num_bytes = self._storages.pop(key)
        self.live[part] -= num_bytes
        if key in self._in_heap:
            self._in_heap.discard(key)
            self.heap.free(num_bytes)

    def _note_peak(self) -> None:
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)

    def restart(self) -> None:
        """Look for a new peak, beginning with what lives now, and with an empty heap beside it."""
        self.peak = dict(self.live)
        self.heap = Heap()
        self._in_heap = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run one operation and count the storages that it makes."""
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0.0 if args[0].is_floating_point() else False if args[0].dtype == torch.bool else 0
        output = func(*args, **(kwargs or {}))
        for item in tree_iter(output):
            key = item.untyped_storage()._cdata if isinstance(item, Tensor) else None
            if key is not None and key not in self._storages:
                self.hold([item], ACTIVATIONS)
                self._in_heap.add(key)
                self.heap.allocate(self._storages[key][2])
        return output


class Batch(NamedTuple):
    """The largest batch of a run."""

    rows: int
    seq: int
    """Tokens of its longest row."""
    packed: bool = False
    """Whether rows hold several texts."""


class Simulation:
    """Training steps and evaluations of a model on the meta device, and the bytes that they take.

    The tensors of the model are replaced by fake ones for good: it can be used for nothing else afterwards.

    Args:
        model: on the meta device, with all experts.
        device: where training would run: "cpu", or a GPU's kind.
        autocast: as the Trainer does with `bf16` or `fp16`; None: computed in the weights' own dtypes.
    """

    def __init__(self, model: DyLoRAMoE, *, device: str = "cpu", autocast: torch.dtype | None = None) -> None:
        self.model = model
        self.autocast = autocast
        self.device = torch.device(device)
        self.fake = FakeTensorMode()
        self.tracker = MemoryTracker()
        _replace_tensors(model, self.fake, self.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        base = [parameter for name, parameter in model.base.named_parameters() if ".lora_" not in name]
        self.tracker.hold(base, BASE)
        self.tracker.hold(model.base.buffers(), BASE)
        self.tracker.hold(trained, EXPERTS)
        self.tracker.hold(model.router.buffers(), EXPERTS)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._claim_gradient)
        self._trained = trained
        self._states: list[Tensor] = []

    def _claim_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.tracker.hold([parameter.grad], GRADIENTS)

    def train_step(self, batch: Batch, *, micro_batches: int = 1, label_smoothing: float = 0.0) -> dict[str, int]:
        """Bytes by part at the peak of a step of the Trainer after the first, when AdamW has its states.

        Args:
            batch: of one forward.
            micro_batches: forwards that share an optimizer step; from the second on, gradients are there already.
            label_smoothing: as the Trainer's.
        """
        self.model.train()
        with self.fake, self.tracker:
            if not self._states:
                self._states = [torch.empty_like(item) for item in self._trained for _ in range(ADAM_STATES)]
                self.tracker.hold(self._states, OPTIMIZER)
            peaks = []
            for _ in range(min(micro_batches, 2)):
                self.tracker.restart()
                before = self.tracker.live.copy()
                loss = self._loss(batch, label_smoothing=label_smoothing)
                held = sum(before.values()) + self.tracker.heap.peak
                loss.backward()
                parts = dict(self.tracker.peak)
                if self.device.type == "cpu":
                    parts[ALLOCATOR] = max(0, held - sum(parts.values()))
                peaks.append(parts)
            self.model.zero_grad(set_to_none=True)
        return max(peaks, key=lambda parts: sum(parts.values()))

    def inside(self, act: Callable[[], Result]) -> Result:
        """What `act` returns, which may run the model as if it had values."""
        with self.fake, self.tracker:
            return act()

    def evaluation(self, batch: Batch) -> dict[str, int]:
        """Bytes by part at the peak of the evaluation of one batch."""
        self.model.eval()
        with self.fake, self.tracker, torch.no_grad():
            self.tracker.restart()
            self._loss(batch)
        return dict(self.tracker.peak)

    def _loss(self, batch: Batch, **options: Any) -> Tensor:
        """The loss as our Trainer computes it: forward, and the meter while all logits are there, if they ever are."""
        inputs = self._inputs(batch)
        count = torch.ones((), dtype=torch.int64, device=self.device)
        forward = self.model if self.autocast is None else convert_outputs_to_fp32(self.model.forward)
        with self._precision():
            out = forward(**inputs, num_items_in_batch=count, num_tokens_in_batch=count, **options)
        names = self.model.router.names
        domain = inputs["input_ids"] if batch.packed else torch.zeros(batch.rows, dtype=torch.int64, device=self.device)
        labels = inputs["labels"]
        losses = token_losses(out, labels)
        Meter(["all"], names).add(losses=losses, labels=labels, routing=out.routing, domain=domain)
        return out.loss

    def _precision(self) -> AbstractContextManager:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        ids = torch.zeros(batch.rows, batch.seq, dtype=torch.int64, device=self.device)
        inputs = {"input_ids": ids, "labels": ids}
        if batch.packed:
            # Transformers sees at the positions that texts begin within the row, and makes a mask for it.
            return {**inputs, "attention_mask": torch.ones_like(ids), "position_ids": torch.zeros_like(ids)}
        # A lone row has no padding, and attention needs no mask then; rows of several lengths need one.
        return {**inputs, "attention_mask": torch.ones_like(ids)} if batch.rows > 1 else inputs


def _replace_tensors(model: nn.Module, fake: FakeTensorMode, device: torch.device) -> None:
    """Every parameter and buffer becomes a fake tensor on `device`; those that shared memory still do."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    inner = FakeTensor(fake, parameter.data, device)
                    made[id(parameter)] = nn.Parameter(inner, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(fake, buffer.to("meta"), device)
