"""The bytes that a training step computes and keeps for a while, found without computing anything.

The model's own forward, loss and backward run on PyTorch's fake tensors, which have shapes and dtypes but no values. A
dispatch mode follows the memory that they would take. Where the model asks for a value, the mode answers, so that the
model need not know of any of this.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dylo_moe.base.frozen import decoder_layers
from dylo_moe.commands.plan.outline import Outline
from dylo_moe.commands.plan.workload import Batch
from dylo_moe.model.loss import chunk_loss
from dylo_moe.training.metrics import Meter, token_losses


class StepActivations(NamedTuple):
    """Bytes of activations, logits and temporary tensors at the two moments at which a step can be largest.

    While the backward goes down the layers, what was saved for it is freed and the gradients of the experts appear.
    Both change by as much in each layer, so that their sum is largest at the beginning or at the end.
    """

    forward: int
    """The most before the backward reaches the lowest layer with experts. Hardly any gradient is there at that time."""
    backward: int
    """The most from then on, when nearly all gradients are there."""

    def plus(self, other: StepActivations, times: int) -> StepActivations:
        """These and `times` the others."""
        return StepActivations(*(mine + times * more for mine, more in zip(self, other, strict=True)))


class TensorTracker(TorchDispatchMode):
    """Follows the bytes of all tensors that operations make inside, until they are freed.

    A storage counts once, however many views it has. As in `torch.distributed._tools.mem_tracker`, storages are
    followed by weak references. Memory that a kernel takes and gives back within one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes at this moment."""
        self.peak = 0
        """The most that `live` was since `restart`."""
        self._storages: dict[int, tuple[weakref.ref, int]] = {}
        """Each storage, by its address, and the bytes that it counts."""

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Count these no longer, because they are weights or gradients, which are counted by other means."""
        for tensor in tensors:
            self._follow(tensor, 0)

    def restart(self) -> int:
        """Look for another peak from now on; returns the one before."""
        before, self.peak = self.peak, self.live
        return before

    def _follow(self, tensor: Tensor, num_bytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        reference, before = self._storages.get(key, (None, 0))
        self._storages[key] = (reference or weakref.ref(storage, partial(self._freed, key)), num_bytes)
        self.live += num_bytes - before
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, _: weakref.ref) -> None:
        self.live -= self._storages.pop(key)[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run one operation, or answer it, and count the storages that it makes."""
        answer = ANSWERS.get(func._schema.name)
        if answer is not None and isinstance(args[0], FakeTensor):
            output = answer(*args)
        else:
            output = func(*args, **(kwargs or {}))
        for item in tree_iter(output):
            if isinstance(item, Tensor) and item.untyped_storage()._cdata not in self._storages:
                self._follow(item, item.untyped_storage().nbytes())
        return output


def _zero(tensor: Tensor) -> float | int | bool:
    """A number out of a tensor: nothing is NaN, and where nothing is compared, nothing is found."""
    return 0.0 if tensor.is_floating_point() else False if tensor.dtype == torch.bool else 0


def _equal_shares(selected_N: Tensor, weights: None, num_counts: int) -> Tensor:
    """How many tokens each expert was selected by: an equal share. The first count is that of padding, of which there
    is none. The dispatch of tokens to experts needs numbers here, so that these are the only values of the step."""
    total, members = selected_N.numel(), num_counts - 1
    shares = [total * (index + 1) // members - total * index // members for index in range(members)]
    with unset_fake_temporarily():
        return torch.tensor([0, *shares])


def _all_positions(tensor: Tensor) -> Tensor:
    """The positions of a tensor that are not zero: all, because every token is predicted."""
    return tensor.new_empty(tensor.numel(), tensor.dim(), dtype=torch.int64)


def _grouped_product(rows: Tensor, matrices: Tensor, *_: Any) -> Tensor:
    """PyTorch knows its shape in bf16 alone."""
    return rows.new_empty(rows.shape[0], matrices.shape[-1])


ANSWERS: dict[str, Callable[..., Any]] = {
    "aten::_local_scalar_dense": _zero,
    "aten::bincount": _equal_shares,
    "aten::nonzero": _all_positions,
    "aten::equal": lambda *_: False,  # the tokens that experts selected are not in their order
    "aten::allclose": lambda *_: True,  # a base's own loss is taken to be the cross-entropy of its logits
    "aten::_grouped_mm": _grouped_product,
}
"""What is answered instead of being run."""


class FakeStep:
    """Steps and evaluations of a model on fake tensors, with all of its layers or some.

    The tensors of the model are replaced for good, so that it can be used for nothing else afterwards.

    Args:
        outline: of the model. Its device does not matter: all is taken to be on the CPU, whose attention keeps as
            much as the kernels of a GPU that never have a matrix of tokens times tokens.
    """

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self.model = outline.few
        train = outline.arguments.train
        if getattr(train, "activation_checkpointing", False) or train.gradient_checkpointing:  # newer name, older name
            self.model.gradient_checkpointing_enable()
        self._layers = list(decoder_layers(self.model.base)[1])
        self._fake = FakeTensorMode()
        replace_tensors(self.model, self._fake)
        with self._fake, self._tracker():
            chunk_loss(self.model, outline.arguments.model.loss_chunk_size)

    def training(self, batch: Batch) -> StepActivations:
        """The activations of one forward and backward of the whole model.

        They are those of two layers of each kind, and for each further layer as much as a third one of its kind adds.
        """
        self.model.train()
        start, *grown = self.outline.arrangements
        pairs = self._train(start.positions, batch)
        whole = pairs
        for more in grown:
            third = self._train(more.positions, batch)
            whole = whole.plus(third.plus(pairs, -1), more.missing)
        return whole

    def _train(self, positions: Sequence[int], batch: Batch) -> StepActivations:
        self.outline.arrange(self._layers, positions)
        lowest = next(place for place, position in enumerate(positions) if position >= self.outline.first_routed)
        tracker, before_lowest = self._tracker(), []
        gradients = [
            item.register_post_accumulate_grad_hook(lambda item: tracker.leave_out([item.grad]))
            for item in self.model.parameters()
            if item.requires_grad
        ]
        if lowest + 1 < len(positions):
            above = self._layers[positions[lowest + 1]]
            gradients.append(_as_backward_leaves(above, lambda: before_lowest.append(tracker.restart())))
        try:
            with self._fake, tracker:
                self._loss(batch, label_smoothing=self.outline.arguments.train.label_smoothing_factor).backward()
                self.model.zero_grad(set_to_none=True)
        finally:
            for handle in gradients:
                handle.remove()
        return StepActivations(before_lowest[0] if before_lowest else tracker.peak, tracker.peak)

    def evaluation(self, batch: Batch) -> int:
        """Bytes at the peak of the evaluation of one batch; as nothing is saved, all layers take what a few do."""
        self.model.eval()
        self.outline.arrange(self._layers, range(len(self._layers)))
        tracker = self._tracker()
        with self._fake, tracker, torch.no_grad():
            self._loss(batch)
        return tracker.peak

    def _tracker(self) -> TensorTracker:
        tracker = TensorTracker()
        tracker.leave_out([*self.model.parameters(), *self.model.buffers()])
        return tracker

    def _loss(self, batch: Batch, **options: Any) -> Tensor:
        """The loss as our Trainer computes it: forward, and the meter while all logits are there, if they ever are."""
        ids = torch.zeros(batch.rows, batch.seq, dtype=torch.int64)
        inputs = {"input_ids": ids, "labels": ids}
        if batch.packed or batch.rows > 1:  # a lone row has no padding, and attention needs no mask then
            inputs["attention_mask"] = torch.ones_like(ids)
        if batch.packed:  # Transformers sees at the positions that texts begin within the row, and makes a mask for it
            inputs["position_ids"] = torch.zeros_like(ids)
        count = torch.ones((), dtype=torch.int64)
        autocast = self.outline.autocast
        forward = self.model if autocast is None else convert_outputs_to_fp32(self.model.forward)
        with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            out = forward(**inputs, num_items_in_batch=count, num_tokens_in_batch=count, **options)
        domain = ids if batch.packed else torch.zeros(batch.rows, dtype=torch.int64)
        losses = token_losses(out, ids)
        Meter(["all"], self.model.router.names).add(losses=losses, labels=ids, routing=out.routing, domain=domain)
        return out.loss


def _as_backward_leaves(layer: nn.Module, act: Callable[[], Any]) -> Any:
    """Call `act` each time the gradient of what enters a layer is complete; returns the handle that ends it."""

    def watch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: act())

    return layer.register_forward_pre_hook(watch, with_kwargs=True)


def replace_tensors(model: nn.Module, fake: FakeTensorMode) -> None:
    """Every parameter and buffer of a model becomes a fake tensor; those that shared memory still do."""
    made: dict[int, nn.Parameter] = {}
    device = torch.device("cpu")
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    inner = FakeTensor(fake, parameter.data.to("meta"), device)
                    made[id(parameter)] = nn.Parameter(inner, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(fake, buffer.to("meta"), device)
