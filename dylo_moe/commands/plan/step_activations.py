"""The bytes that a training step computes and keeps for a while, found without computing anything.

The model's own forward, loss and backward run on PyTorch's fake tensors, which have shapes and dtypes but no values. A
dispatch mode follows the memory that they would take. Where the model asks for a value, the mode answers, so that the
model need not know of any of this.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dylo_moe.base.stack import decoder_layers
from dylo_moe.commands.plan.outline import Outline
from dylo_moe.commands.plan.workload import Batch
from dylo_moe.model.loss import chunk_loss
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.training.metrics import Meter, token_losses

MOST_CHUNKS, MOST_ROWS = 1024, 4096
"""The most chunks of a loss, and the most rows, that are followed: each takes about a millisecond."""


Events = list[tuple[str, int]]
"""The operations that were run, by name, each with the bytes that all tensors took when it was done."""


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


class Trace(NamedTuple):
    """What tensors took in the course of a training step, at its two moments; see `StepActivations`."""

    forward: Events
    backward: Events


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
        self.events: Events = []
        """What was run since the beginning."""
        self._storages: dict[int, tuple[weakref.ref, int]] = {}
        """Each storage, by its address, and the bytes that it counts."""

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Count these no longer, because they are weights or gradients, which are counted by other means."""
        for tensor in tensors:
            self._follow(tensor, 0)

    def restart(self) -> int:
        """Look for another peak from now on; returns the one before."""
        before, self.peak = self.peak, self.live
        self.events.append(("restart", self.live))
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
        name = func._schema.name
        if name == ASKS_DEVICE and isinstance(args[0], FakeTensor):  # half of all calls, and the most frequent question
            return args[0].fake_device
        answer = ANSWERS.get(name)
        if answer is not None and isinstance(args[0], FakeTensor):
            output = answer(*args)
        else:
            output = func(*args, **(kwargs or {}))
        for item in tree_iter(output):
            if isinstance(item, Tensor) and item.untyped_storage()._cdata not in self._storages:
                self._follow(item, item.untyped_storage().nbytes())
        self.events.append((name, self.live))
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


ASKS_DEVICE = "prim::device"

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
        model: which of the outline's models of few layers.
    """

    def __init__(self, outline: Outline, model: DyLoRAMoE) -> None:
        self.outline = outline
        self.model = model
        self._has_checkpointing = False
        self._layers = list(decoder_layers(self.model.base)[1])
        self._fake = FakeTensorMode()
        replace_tensors(self.model, self._fake)
        with self._fake, self._tracker():
            chunk_loss(self.model, outline.arguments.model.loss_chunk_size)

    def traces(self, batch: Batch, *, checkpointing: bool, num_arrangements: int | None = None) -> list[Trace]:
        """What happens in one forward and backward of the model, in each of the outline's arrangements of its layers.

        Args:
            checkpointing: whether layers are computed again in the backward.
            num_arrangements: of so many of these; None: of all.

        Raises:
            ValueError: for a batch that would be followed for too long.
        """
        check_can_be_followed(batch, self.model.loss_chunk_size)
        self.model.train()
        self._set_checkpointing(checkpointing)
        return [
            self._train(arrangement.positions, batch) for arrangement in self.outline.arrangements[:num_arrangements]
        ]

    def _set_checkpointing(self, wanted: bool) -> None:
        """Let the layers be computed again in the backward, or not."""
        if wanted == self._has_checkpointing:
            return
        self._has_checkpointing = wanted
        self.outline.arrange(self.model, self._layers, range(len(self._layers)))  # it is a switch of each layer
        if wanted:
            self.model.gradient_checkpointing_enable()
        else:
            base: Any = self.model.base
            getattr(base, "activation_checkpointing_disable", base.gradient_checkpointing_disable)()

    def _train(self, positions: Sequence[int], batch: Batch) -> Trace:
        self.outline.arrange(self.model, self._layers, positions)
        lowest = next(place for place, position in enumerate(positions) if position >= self.outline.first_routed)
        tracker, at_lowest = self._tracker(), []

        def mark() -> None:
            at_lowest.append(len(tracker.events))
            tracker.restart()

        handles = [
            item.register_post_accumulate_grad_hook(lambda item: tracker.leave_out([item.grad]))
            for item in self.model.parameters()
            if item.requires_grad
        ]
        if lowest + 1 < len(positions):
            handles.append(_as_backward_leaves(self._layers[positions[lowest + 1]], mark))
        try:
            with self._fake, tracker:
                self._loss(batch, label_smoothing=self.outline.arguments.train.label_smoothing_factor).backward()
                self.model.zero_grad(set_to_none=True)
        finally:
            for handle in handles:
                handle.remove()
        events = tracker.events
        return Trace(events[: at_lowest[0]], events[at_lowest[-1] :]) if at_lowest else Trace(events, events)

    def evaluation(self, batch: Batch) -> Events:
        """What happens in the evaluation of one batch; as nothing is saved, all layers take what two of each kind do.

        Raises:
            ValueError: for a batch that would be followed for too long.
        """
        check_can_be_followed(batch, self.model.loss_chunk_size)
        self.model.eval()
        self.outline.arrange(self.model, self._layers, self.outline.arrangements[0].positions)
        tracker = self._tracker()
        with self._fake, tracker, torch.no_grad():
            self._loss(batch)
        return tracker.events

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


def activations(of: Outline, traces: Sequence[Sequence[Trace]]) -> StepActivations:
    """The activations of one training step of the whole model: all of its layers and experts.

    They are those of two layers of each kind, and for each further layer as much as a third one of its kind adds.

    Args:
        traces: what `FakeStep.traces` found for each of the outline's models of few layers; or for the first alone,
            for the activations with its experts. Without those of a third layer, of two layers of each kind.
    """
    pairs, *thirds = [
        StepActivations(*(most_of_all_experts(of, events) for events in zip(*arranged, strict=True)))
        for arranged in zip(*traces, strict=True)
    ]
    whole = pairs
    for third, arrangement in zip(thirds, of.arrangements[1:], strict=False):
        whole = whole.plus(third.plus(pairs, -1), arrangement.missing)
    return whole


def most_of_all_experts(of: Outline, found: Sequence[Events]) -> int:
    """The most that tensors took, in bytes, with all experts.

    What each further expert adds differs from operation to operation, and with many experts another operation can be
    the largest. So events are cut at the operations that are not run once for each expert. What a further expert adds
    is found for the largest of each piece, and for the last of each name in it: the largest may be larger with few
    experts, because each of them has more tokens.

    Args:
        found: the events with each of the outline's numbers of experts.
    """
    counts = [Counter(name for name, _ in events) for events in found]
    cuts = {name for name in counts[0] if all(count[name] == counts[0][name] for count in counts)}
    pieces = zip(*(_pieces(events, cuts) for events in found), strict=True)
    return max(
        of.on_line([piece[name] for piece in alike])
        for alike in pieces
        for name in alike[0]
        if all(name in piece for piece in alike)
    )


def _pieces(events: Events, cuts: Collection[str]) -> list[dict[str, int]]:
    """For each piece of events, the most bytes in it (under no name), and those at the last operation of each name."""
    pieces: list[dict[str, int]] = [{"": 0}]
    for name, live in events:
        pieces[-1][""] = max(pieces[-1][""], live)
        pieces[-1][name] = live
        if name in cuts:
            pieces.append({"": 0})
    return pieces


def check_can_be_followed(batch: Batch, chunk_size: int | None) -> None:
    """Raises ValueError for a batch whose loss has so many parts that following them would take minutes."""
    tokens = batch.rows * batch.seq
    chunks = 1 if chunk_size is None else math.ceil(tokens / chunk_size)
    if chunks > MOST_CHUNKS or batch.rows > MOST_ROWS:
        parts = f"its loss is computed in {chunks:,} chunks" if chunks > MOST_CHUNKS else f"it has {batch.rows:,} rows"
        raise ValueError(
            f"a batch of {batch.rows:,} x {batch.seq:,} tokens is too large to be planned: {parts}, and a plan follows "
            f"at most {MOST_CHUNKS if chunks > MOST_CHUNKS else MOST_ROWS:,}; use a smaller "
            "per_device_train_batch_size (or per_device_eval_batch_size) or max_seq_length"
        )


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
