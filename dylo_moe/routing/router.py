"""The router: features of the frozen base -> gate logits -> routing, and the losses that shape it.

Shapes: B batch, S sequence, D hidden, E experts, K top-k.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dylo_moe.routing.belief import evidence_of, filtered
from dylo_moe.routing.config import BASE, SHARED, UNIFORM, RouterConfig
from dylo_moe.routing.dispatch import Dispatch, Layout, add_shared, dispatch_to_all, dispatch_to_selected
from dylo_moe.routing.features import RouterState, places_of
from dylo_moe.routing.initial_gate import START_MARGIN, kmeans
from dylo_moe.utils.distributed import are_joined, is_first

GATE_WIDTH = 64
"""The gate's product is padded to a multiple of this many rows, because products of different widths
differ in the last bit: a new expert must not move the logits of the old ones."""

GATE_INIT_STD = 0.1
"""Standard deviation of a random gate row. A zero gate would send everything to the first expert."""

RANDOM_TURNS = 300.0
"""What multiplies a gate logit and the half-life where routing is random: then one more token turns the sine's angle by
tens of radians, and the choices of neighbours are independent; a last bit of rounding turns it by 1e-4."""


class Routing(NamedTuple):
    """The experts and weights of each token of one forward. All tensors are fp32 unless said otherwise."""

    names: tuple[str, ...]
    """The experts, in gate order: the columns of the tensors below."""
    weights: Tensor
    """[batch, seq, experts]; zero where not selected and on tokens that are not routed; else a distribution."""
    mask: Tensor
    """bool [batch, seq]; the tokens that are routed: not padding, and with response granularity only answers."""
    logits: Tensor | None
    """[batch, seq, experts] gate logits; None where the gate did not decide: by `route_to`, or with a policy of the
    router that is not learned."""

    @property
    def probabilities(self) -> Tensor:
        """softmax over all experts: [batch, seq, experts]. Raises ValueError where the gate did not decide."""
        if self.logits is None:
            raise ValueError("this routing was forced by route_to or a policy, so the gate has no probabilities")
        return self.logits.softmax(-1)


class RouterLosses(NamedTuple):
    """Scalars, unweighted; each a mean over the real tokens of the batch or of the optimizer step."""

    balance: Tensor
    z: Tensor
    entropy: Tensor


class Router(nn.Module):
    """One gate for the whole model: logits_e = ((f - mean) * scale) . g_e + b_e.

    Sparse delegation takes the top-k of the experts, with a softmax over the selected logits (an expert
    that is not selected has no influence at all). At k = 1 the forward weight is exactly 1 and the
    gradient reaches the gate straight through the full softmax probability (Bengio et al. 2013,
    arXiv:1308.3432; the probability as in Switch Transformers, Fedus et al. 2021, arXiv:2101.03961,
    eq. 2, which scales the output by it: we do not). Dense collaboration is a softmax over all experts.

    With another policy than "learned" (see `RouterConfig`) the gate is frozen as it was drawn, and routings have no
    logits, so that no loss reaches it.

    `base` may be a member: its row sends tokens to the unchanged base, and is never trained by gradients.

    The rows start small and random, and mean and scale neutral, until `initialize` sets all of them from
    text. The features of all texts share a large common part that a gate would first have to learn to
    ignore, and rows that start at the clusters of the text give each expert its own kind of text from
    the first step on.

    Args:
        config: see `RouterConfig`.
        hidden_size: of the base.
        names: the experts, in gate order.
    """

    feature_mean: Tensor
    feature_scale: Tensor
    shares: Tensor
    step_counts: Tensor
    seen_values: Tensor
    place_temperatures: Tensor | None

    def __init__(self, config: RouterConfig, *, hidden_size: int, names: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.temperature = config.temperature
        """The temperature of dense collaboration; training may anneal it."""
        self.hidden_size = hidden_size
        self.gate = nn.ParameterDict()
        self.gate_bias = nn.ParameterDict()
        self.register_buffer("feature_mean", torch.zeros(hidden_size))
        self.register_buffer("feature_scale", torch.full((hidden_size,), hidden_size**-0.5))
        self.register_buffer("shares", torch.zeros(0))
        self.register_buffer("step_counts", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("seen_values", torch.zeros(0), persistent=False)
        self.register_buffer("place_temperatures", None)
        self._seen_version: int | None = None
        for name in names:
            self.add_row(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The experts, in gate order; `base` among them where it is a member."""
        return tuple(self.gate.keys())

    @property
    def has_base(self) -> bool:
        """Whether tokens can be sent to the unchanged base."""
        return BASE in self.gate

    def add_base(self) -> None:
        """Make `base` a member, with a row of zeros: what the other rows are measured against."""
        self.add_row(BASE)
        self.set_row(BASE, torch.zeros(self.hidden_size), torch.zeros(()))
        self.gate[BASE].requires_grad_(False)
        self.gate_bias[BASE].requires_grad_(False)

    def add_row(self, name: str) -> None:
        """A new gate row, small and random. The old rows and their logits stay bit for bit."""
        device = self.feature_mean.device
        row, learns = torch.randn(self.hidden_size, device=device) * GATE_INIT_STD, self.config.is_learned
        self.gate[name] = nn.Parameter(row, requires_grad=learns)
        self.gate_bias[name] = nn.Parameter(torch.zeros((), device=device), requires_grad=learns)
        self._reset_shares()

    def arrange(self, names: Sequence[str]) -> None:
        """Put the members into this order; `base` among them becomes one."""
        if BASE in names and not self.has_base:
            self.add_base()
        self.gate = nn.ParameterDict(OrderedDict((name, self.gate[name]) for name in names))  # a dict would be sorted
        self.gate_bias = nn.ParameterDict(OrderedDict((name, self.gate_bias[name]) for name in names))

    @torch.no_grad()
    def set_row(self, name: str, row: Tensor, bias: Tensor) -> None:
        """Give a gate row its values, fp32 [hidden] and a scalar; the others stay bit for bit."""
        self.gate[name].copy_(row)
        self.gate_bias[name].copy_(bias)

    def set_place_temperatures(self, temperatures: Tensor) -> None:
        """Divide the logits of sparse delegation by a temperature for each place of a text, so that their softmax is as
        sure as the mean of so few tokens can be; fp32 [places], see `dylo_moe.routing.features.PLACE_ENDS`."""
        self.place_temperatures = temperatures.float().to(self.feature_mean.device)

    def remove_row(self, name: str) -> None:
        """Drop a gate row; the others stay bit for bit."""
        del self.gate[name], self.gate_bias[name]
        self._reset_shares()

    def _reset_shares(self) -> None:
        count = len(self.gate)
        self.shares = torch.full((count,), 1.0 / max(count, 1), device=self.feature_mean.device)
        self.step_counts = torch.zeros(count, dtype=torch.int64, device=self.feature_mean.device)
        self.seen_values = torch.full_like(self._values(), torch.nan)  # unlike any, so that what follows begins a step

    @torch.no_grad()
    def initialize(self, texts: Sequence[Tensor], *, seed: int) -> None:
        """Start from text: mean and scale of its features, and a gate row at each of its clusters.

        Scaled features have unit variance over sqrt(hidden). The rows make the logits those of a mixture
        of equal Gaussians around the centres: g_e = c_e / t, b_e = -|c_e|^2 / 2t, with t such that a
        text's first expert leads its second by `START_MARGIN` on average. Only before training: it
        moves every logit.

        Args:
            texts: features of each text, fp32 [tokens, hidden]; at least one text per expert.
            seed: of the clustering.
        """
        tokens = torch.cat(list(texts))
        self.feature_mean.copy_(tokens.mean(0))
        deviation = tokens.std(0, correction=min(1, len(tokens) - 1))  # 0 where all texts are alike
        self.feature_scale.copy_(self.hidden_size**-0.5 / torch.where(deviation > 1e-6, deviation, 1.0))
        settled = int(self.config.router_half_life)
        points = torch.stack([text[min(settled, len(text) - 1) :].mean(0) for text in texts])
        points = (points - self.feature_mean) * self.feature_scale
        centres = kmeans(points, len(self.names), seed=seed)
        squared = torch.cdist(points, centres) ** 2
        if len(self.names) > 1:
            nearest = squared.topk(2, largest=False).values
            spread = float((nearest[:, 1] - nearest[:, 0]).mean()) / (2 * START_MARGIN)
        else:
            spread = 1.0
        for name, centre in zip(self.names, centres / max(spread, 1e-6), strict=True):
            self.gate[name].copy_(centre)
            self.gate_bias[name].copy_(-0.5 * max(spread, 1e-6) * centre.square().sum())

    def logits(self, features: Tensor) -> Tensor:
        """Gate logits, fp32 [..., experts], of features fp32 [..., hidden]."""
        names = self.names
        rows, biases = self.gate._parameters, self.gate_bias._parameters  # a ParameterDict's own look-up is slow
        rows_ED = torch.stack([cast(Tensor, rows[name]) for name in names]).float()
        bias_E = torch.stack([cast(Tensor, biases[name]) for name in names]).float()
        padding = -len(names) % GATE_WIDTH
        with torch.autocast(features.device.type, enabled=False):
            scaled = (features - self.feature_mean.float()) * self.feature_scale.float()
            logits = F.linear(scaled, F.pad(rows_ED, (0, 0, 0, padding)), F.pad(bias_E, (0, padding)))
        return logits[..., : len(names)]

    @torch.no_grad()
    def believe(
        self, tokens: Tensor, *, mask: Tensor | None = None, belief: Tensor | None = None, starts: Tensor | None = None
    ) -> Tensor | None:
        """The logarithms of the members' probabilities after each token, fp32 [batch, seq, members]; None where the
        router does not filter (`RouterConfig.change_rate`).

        Args:
            tokens: fp32 [batch, seq, hidden], see `dylo_moe.routing.features.read_tokens`.
            mask: bool [batch, seq], False on padding; None: no padding.
            belief: [batch, members], after the last token of the call before; of another pool's members it is let go.
            starts: bool [batch, seq], True on the first token of another packed text.
        """
        if not self.config.change_rate:
            return None
        if belief is not None and belief.shape[-1] != len(self.names):
            belief = None
        evidence = evidence_of(self.logits(tokens))
        return filtered(evidence, mask=mask, change_rate=self.config.change_rate, belief=belief, starts=starts)

    def reread(self, text: RouterState) -> RouterState:
        """The same states of one text, with what the gate of now believes of them.

        Args:
            text: total [tokens, hidden], mass [tokens, 1], of a text from its first token on.
        """
        belief = self.believe(text.tokens(self.config.router_half_life)[None])
        return text._replace(belief=None if belief is None else belief[0])

    def posterior_logits(self, states: RouterState) -> Tensor:
        """The filter's logarithms of probabilities, or without a filter the gate's logits of the mean, divided by the
        temperature of each token's place where the gate has temperatures: fp32 [..., members].

        Args:
            states: total [..., hidden], mass [..., 1], belief [..., members] or None.
        """
        logits = self.logits(states.mean) if states.belief is None else states.belief
        if self.place_temperatures is None:
            return logits
        places = places_of(states.mass[..., 0], half_life=self.config.router_half_life)
        return logits / self.place_temperatures[places][..., None]

    def non_finite(self) -> list[str]:
        """The experts whose gate row holds NaN or infinity."""
        rows = {name: torch.cat([self.gate[name], self.gate_bias[name][None]]) for name in self.names}
        return [name for name, row in rows.items() if not row.isfinite().all()]

    def forward(self, states: RouterState, *, mask: Tensor, dense: bool) -> tuple[Routing, Tensor | None]:
        """Route the tokens of one forward.

        Args:
            states: what each token is routed by: total [batch, seq, hidden], mass [batch, seq, 1], and where the router
                filters belief [batch, seq, members].
            mask: bool [batch, seq], the tokens that are routed.
            dense: all experts for every token (some expert is nascent), else the top-k.

        Returns:
            The routing, and the selected experts, int64 [batch, seq, top_k], as positions in its names, -1 where a
            token has fewer (None where all are selected).
        """
        if not self.config.is_learned:
            return self._fixed(states.mean, mask=mask)
        logits_BSE = self.posterior_logits(states)
        names, top_k, top_p = self.names, self.config.top_k, self.config.top_p
        selected_BSK = None
        if dense:
            weights_BSE = (logits_BSE / self.temperature).softmax(-1)
        elif top_k >= len(names) and top_p == 1:
            weights_BSE = logits_BSE.softmax(-1)
        else:
            weights_BSE, selected_BSK = select_top_k(logits_BSE, top_k=min(top_k, len(names)), top_p=top_p)
        weights_BSE = weights_BSE * mask[..., None]
        return Routing(names, weights_BSE, mask, logits_BSE), selected_BSK

    @torch.no_grad()
    def _fixed(self, features: Tensor, *, mask: Tensor) -> tuple[Routing, Tensor | None]:
        """`forward` with a policy that learns nothing."""
        names, top_k = self.names, self.config.top_k
        if self.config.policy == UNIFORM or top_k >= len(names):
            weights_BSE, selected_BSK = features.new_full((*mask.shape, len(names)), 1 / len(names)), None
        else:
            turns = RANDOM_TURNS * self.config.router_half_life  # one more token moves a long memory less
            selected_BSK = (turns * self.logits(features)).sin().topk(top_k, dim=-1).indices
            weights_BSE = features.new_zeros((*mask.shape, len(names))).scatter(-1, selected_BSK, 1 / top_k)
        return Routing(names, weights_BSE * mask[..., None], mask, None), selected_BSK

    # The balance loss: f of the last optimizer step, P of the tokens at hand.

    @torch.no_grad()
    def observe(self, routing: Routing) -> None:
        """Count this forward's selections towards the running optimizer step.

        A step is over when the gate has changed; this needs no callback, so any training loop, any optimizer
        and any number of micro-batches are counted right. Nothing here waits for the device or branches on values,
        so that it can be compiled; compiled code cannot see versions, and there a step at learning rate 0 is
        counted together with the next one.
        """
        changed = self._has_changed()
        total_E = self.step_counts.clone()
        if are_joined():
            torch.distributed.all_reduce(total_E)
        count = total_E.sum()
        self.shares.copy_(torch.where(changed & (count > 0), total_E / count.clamp_min(1), self.shares))
        selected_E = (routing.weights.detach() > 0).flatten(0, 1).sum(0)
        self.step_counts.copy_(torch.where(changed, 0, self.step_counts) + selected_E)

    @torch.no_grad()
    def collect_counts(self) -> None:
        """Give the first rank what all have counted of the running step, as a checkpoint holds it."""
        if are_joined():
            torch.distributed.all_reduce(self.step_counts)
        self.keep_counts_on_first()

    @torch.no_grad()
    def keep_counts_on_first(self) -> None:
        """What every rank holds of the running step, as read from a checkpoint, is counted once."""
        if are_joined() and not is_first():
            self.step_counts.zero_()

    def _values(self) -> Tensor:
        """All gate rows, stacked."""
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters()])

    def _has_changed(self) -> Tensor:
        """bool scalar: whether an optimizer has stepped since the last call."""
        # Fused optimizers do not raise the versions; a step at learning rate 0 does not move the values.
        values = self._values()
        changed = (values != self.seen_values).any()
        self.seen_values.copy_(values)
        if not torch.compiler.is_compiling():
            version = sum(parameter._version for parameter in self.parameters())
            changed = changed | (version != self._seen_version)
            self._seen_version = version
        return changed

    def losses(self, routing: Routing, *, tokens: Tensor | None, num_tokens: Tensor | int | None) -> RouterLosses:
        """Balance loss E * sum_e f_e P_e (Fedus et al. 2021, eq. 4), router z-loss (Zoph et al. 2022,
        arXiv:2202.08906, eq. 5) and mean entropy of a token's probabilities.

        f is the share of the optimizer step before (uniform before the first), so that it does not
        depend on how a step is cut into micro-batches; P, z and entropy come from the tokens at hand.

        Args:
            tokens: bool [batch, seq], the tokens to average over; None: all real ones.
            num_tokens: how many such tokens the whole optimizer step has; None: those at hand.
        """
        logits_BSE = routing.logits
        if logits_BSE is None:
            zero = routing.weights.new_zeros(())
            return RouterLosses(zero, zero, zero)
        tokens = routing.mask if tokens is None else tokens & routing.mask
        count = (tokens.sum() if num_tokens is None else torch.as_tensor(num_tokens)).clamp_min(1)
        logits_BSE = logits_BSE.masked_fill(~tokens[..., None], 0.0)
        log_p_BSE = logits_BSE.log_softmax(-1)
        p_BSE = log_p_BSE.exp() * tokens[..., None]
        mean_p_E = p_BSE.sum((0, 1)) / count
        balance = len(routing.names) * (self.shares.to(mean_p_E, copy=True) * mean_p_E).sum()
        z = (logits_BSE.logsumexp(-1) ** 2 * tokens).sum() / count
        entropy = -(p_BSE * log_p_BSE).sum() / count
        return RouterLosses(balance, z, entropy)


def select_top_k(logits: Tensor, *, top_k: int, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sparse delegation: a softmax over the logits of the selected experts.

    Where only one is selected its weight is exactly 1, and the gradient reaches the gate straight through.

    Args:
        logits: fp32 [..., experts].
        top_k: the most experts of a token.
        top_p: of them, the fewest whose probabilities (softmax over all experts) reach this sum.

    Returns:
        weights, fp32 [..., experts], zero where not selected; and the selected, int64 [..., top_k], -1 for fewer.
    """
    values, selected = logits.topk(top_k, dim=-1)
    if top_k == 1:
        weights = _exactly_one(logits.softmax(-1).gather(-1, selected))
        return torch.zeros_like(logits).scatter(-1, selected, weights), selected
    if top_p == 1:
        return torch.zeros_like(logits).scatter(-1, selected, values.softmax(-1)), selected
    probabilities = logits.softmax(-1).gather(-1, selected)
    needed = probabilities.detach().cumsum(-1) - probabilities.detach() < top_p
    needed[..., 0] = True
    is_alone = ~needed[..., 1:].any(-1, keepdim=True)
    weights = values.masked_fill(~needed, -torch.inf).softmax(-1)
    weights = torch.where(is_alone & needed, _exactly_one(probabilities), weights)
    return torch.zeros_like(logits).scatter(-1, selected, weights), selected.masked_fill(~needed, -1)


def _exactly_one(probability: Tensor) -> Tensor:
    """1, with the gradient of the probability."""
    return (probability - probability.detach()) + 1.0


def make_dispatch(
    routing: Routing,
    selected_BSK: Tensor | None,
    *,
    layouts: Iterable[Layout],
    dtype: torch.dtype,
    is_exact: bool = False,
    uses_shared: Tensor | None = None,
) -> Dispatch:
    """Choose the kernel path, and arrange the tokens for it; every routed token uses the shared expert too.

    Args:
        selected_BSK: int64 [batch, seq, top_k], positions in `routing.names`; None: all experts.
        layouts: of the model's routed linears.
        dtype: what the adapters are computed in.
        is_exact: tokens that are not routed meet no adapter, not even with weight 0; compiled code, which knows them by
            values only, computes them so all the same.
        uses_shared: bool [batch, seq], which tokens use the shared expert; None: all that are routed.
    """
    names = routing.names
    weights_TE = routing.weights.reshape(-1, len(names))
    uses_shared = routing.mask if uses_shared is None else uses_shared
    if selected_BSK is None and is_exact:
        selected_BSK = _all_selected(routing)
    if selected_BSK is None or torch.compiler.is_compiling():  # who is at hand is known by values only
        dispatch = dispatch_to_all(names, weights_TE, layouts=layouts, dtype=dtype)
    else:
        selected_TK = selected_BSK.masked_fill(~routing.mask[..., None], -1).reshape(-1, selected_BSK.shape[-1])
        dispatch = dispatch_to_selected(
            names, weights_TE, selected_TK=selected_TK, layouts=layouts, dtype=dtype, is_exact=is_exact
        )
    return add_shared(dispatch, uses_shared.reshape(-1), is_exact=is_exact)


def _all_selected(routing: Routing) -> Tensor:
    """int64 [batch, seq, experts], where every token selects all experts."""
    everyone_E = torch.arange(len(routing.names), device=routing.mask.device)
    return everyone_E.expand(*routing.mask.shape, -1)


def _chosen(names: Sequence[str], experts: Sequence[str | None], *, device: torch.device) -> Tensor:
    """int64 [rows]: the position in `names` of what `route_to` asks for in each row; -1 for the base alone."""
    members = [BASE if name in (None, SHARED) else name for name in experts]
    chosen = [-1 if name == BASE and name not in names else names.index(name) for name in members]
    return torch.tensor(chosen, device=device)


def impose(
    routing: Routing, selected_BSK: Tensor | None, experts: Sequence[str | None], *, tokens: Tensor
) -> tuple[Routing, Tensor, Tensor]:
    """Send some tokens where `route_to` asks for, and leave the others where the gate sends them.

    Args:
        routing: of the gate; of the result the logits are None.
        selected_BSK: int64 [batch, seq, top_k], positions in `routing.names`; None: all experts.
        experts: one entry per row of the batch; None: the base alone.
        tokens: bool [batch, seq], routed tokens that are to go there.

    Returns:
        The routing, the selected experts, and bool [batch, seq], the routed tokens that use the shared expert.
    """
    chosen_B = _chosen(routing.names, experts, device=tokens.device)
    forced_BSE = (chosen_B[:, None, None] == torch.arange(len(routing.names), device=tokens.device)).float()
    weights_BSE = torch.where(tokens[..., None], forced_BSE, routing.weights)
    selected_BSK = _all_selected(routing) if selected_BSK is None else selected_BSK
    first_K = torch.arange(selected_BSK.shape[-1], device=tokens.device) == 0
    forced_BSK = torch.where(first_K, chosen_B[:, None, None], -1)
    selected_BSK = torch.where(tokens[..., None], forced_BSK, selected_BSK)
    is_alone_B1 = torch.tensor([[name is None] for name in experts], device=tokens.device)
    return Routing(routing.names, weights_BSE, routing.mask, None), selected_BSK, routing.mask & ~(tokens & is_alone_B1)


def force_routing(
    names: Sequence[str],
    experts: Sequence[str | None],
    *,
    mask: Tensor,
    layouts: Iterable[Layout],
    dtype: torch.dtype,
    is_exact: bool = False,
) -> tuple[Routing, Dispatch]:
    """The routing that `route_to` asks for: one expert a row, or None for the base alone.

    Beside an expert, tokens use the shared one, as where the router sends them; "shared" is that one alone.

    Args:
        names: the members of the pool, in gate order.
        experts: one entry per row of the batch.
        mask: bool [batch, seq], the tokens that are routed.
        layouts: of the model's routed linears.
        dtype: what the adapters are computed in.
        is_exact: other tokens go to the base alone; else they may go along, because they are padding.
    """
    names = tuple(names)
    uses_B1 = torch.tensor([[name is not None] for name in experts], device=mask.device)
    chosen_BS, uses_BS = _chosen(names, experts, device=mask.device)[:, None].expand_as(mask), uses_B1.expand_as(mask)
    if is_exact:
        chosen_BS, uses_BS = chosen_BS.masked_fill(~mask, -1), uses_BS & mask
    weights_BSE = (chosen_BS[..., None] == torch.arange(len(names), device=mask.device)).float()
    routing = Routing(names, weights_BSE * mask[..., None], mask, None)
    if torch.compiler.is_compiling():
        dispatch = dispatch_to_all(names, weights_BSE.flatten(0, 1), layouts=layouts, dtype=dtype)
    else:
        selected_TK = chosen_BS.reshape(-1, 1)
        dispatch = dispatch_to_selected(names, None, selected_TK=selected_TK, layouts=layouts, dtype=dtype)
    return routing, add_shared(dispatch, uses_BS.reshape(-1), is_exact=True)
