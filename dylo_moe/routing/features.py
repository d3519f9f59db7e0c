"""What the router reads: a causal exponential mean of the frozen base's hidden states.

Shapes: B batch, S sequence, C chunk of the sequence, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128
"""Tokens per chunk of the causal mean; bounds its working memory at B x CHUNK x CHUNK."""

PLACE_ENDS = (1, 2, 4, 8, 16, 32, 64)
"""The number of tokens with which each place of a text but the last one ends: token 1, token 2, tokens 3 and 4, 5 to 8,
and so on, and all tokens from 65 on. A mean of few tokens says less about a text than one of many."""

NUM_PLACES = len(PLACE_ENDS) + 1


class RouterState(NamedTuple):
    """The router's memory: what cached decoding carries from token to token."""

    total: Tensor
    """fp32 [batch, hidden], or of each token [batch, seq, hidden]: sum of a^(age) x over the real tokens so far."""
    mass: Tensor
    """fp32 [batch, 1], or [batch, seq, 1]: sum of a^(age), which corrects the bias of the first tokens."""
    belief: Tensor | None = None
    """fp32 [batch, members], or [batch, seq, members]: logarithms of the probabilities of the pool's members, where the
    router filters (`RouterConfig.change_rate`); else None."""

    @property
    def last(self) -> RouterState:
        """The state after the last token, where there is a state after each."""
        return self.each(lambda part: part[:, -1])

    def span(self, start: int | None, stop: int | None) -> RouterState:
        """The states after some of the tokens, where there is a state after each."""
        return self.each(lambda part: part[:, start:stop])

    @property
    def mean(self) -> Tensor:
        """The features: fp32 [..., hidden], zeros where nothing was seen yet."""
        return self.total / self.mass.clamp_min(1e-12)

    def each(self, change: Callable[[Tensor], Tensor]) -> RouterState:
        """All parts, changed in the same way."""
        belief = None if self.belief is None else change(self.belief)
        return RouterState(change(self.total), change(self.mass), belief)

    def tokens(self, half_life: float) -> Tensor:
        """What was summed, of one text with a state after each of its tokens: fp32 [tokens, hidden]."""
        before_TD = F.pad(self.total[:-1], (0, 0, 1, 0)) * 2 ** (-1 / half_life)
        is_first_T1 = self.mass <= 1  # of a text; several of them may be packed in one row
        return self.total - before_TD.masked_fill(is_first_T1, 0.0)


def places_of(mass: Tensor, *, half_life: float) -> Tensor:
    """The place of each token in its text (see `PLACE_ENDS`), from what its mean stands on: int64, of `mass`'s shape.

    Args:
        mass: fp32, `RouterState.mass`: of n tokens it is (1 - a^n) / (1 - a), with a = 2^(-1/half_life).
        half_life: in tokens.
    """
    rate = math.log(2.0) / half_life
    ends = [math.expm1(-rate * (end + 0.5)) / math.expm1(-rate) for end in PLACE_ENDS]
    return torch.bucketize(mass.float(), torch.tensor(ends, dtype=torch.float32, device=mass.device))


def joined(texts: Sequence[RouterState]) -> RouterState:
    """The states after each token of several texts, one text after another."""
    beliefs = [text.belief for text in texts if text.belief is not None]
    total, mass = (torch.cat([text[part] for text in texts]) for part in (0, 1))  # type: ignore[misc]
    return RouterState(total, mass, torch.cat(beliefs) if beliefs else None)


def read_tokens(hidden: Tensor, *, mask: Tensor) -> Tensor:
    """What the router reads of each token: fp32, the parameter-free layer norm of `hidden`, zeros on padding.

    What stands on padding may be anything, also nan: it is replaced, not multiplied by zero.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return F.layer_norm(hidden.float(), hidden.shape[-1:]).masked_fill(~mask[..., None], 0.0)


def causal_exponential_mean(
    hidden: Tensor,
    *,
    mask: Tensor,
    half_life: float,
    state: RouterState | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, RouterState]:
    """Bias-corrected exponential mean of layer-normed hidden states over the tokens up to each one.

    f_t = sum_{u<=t} a^(t-u) x_u / sum_{u<=t} a^(t-u), with a = 2^(-1/half_life), x the parameter-free
    layer norm of `hidden`, and time counted in real tokens: padding neither enters nor passes.

    Args:
        hidden: [batch, seq, hidden], any float dtype; computed in fp32 (a running sum in bf16 is wrong).
        mask: bool [batch, seq], False on padding.
        half_life: in tokens.
        state: after the last token of the call before, when this one continues it.
        starts: bool [batch, seq], True on the first token of another packed text, which forgets those before it.

    Returns:
        fp32 [batch, seq, hidden] (zeros before the first real token), and the state after each token.
    """
    tokens = read_tokens(hidden, mask=mask)
    states = causal_sums(tokens, mask=mask, half_life=half_life, state=state, starts=starts)
    return states.mean, states


def causal_sums(
    tokens: Tensor,
    *,
    mask: Tensor,
    half_life: float,
    state: RouterState | None = None,
    starts: Tensor | None = None,
) -> RouterState:
    """The router's memory after each token, without a belief; the arguments are those of `causal_exponential_mean`.

    Args:
        tokens: fp32 [batch, seq, hidden], see `read_tokens`.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        return _sums(tokens, mask, half_life, state, starts)


def _sums(
    x_BSD: Tensor, mask: Tensor, half_life: float, state: RouterState | None, starts: Tensor | None
) -> RouterState:
    batch, seq, width = x_BSD.shape
    if state is None:
        state = RouterState(x_BSD.new_zeros(batch, width), x_BSD.new_zeros(batch, 1))
    total_BD, mass_B1 = state.total, state.mass
    text_BS = None if starts is None else F.pad(starts.cumsum(1), (1, 0))  # one more, for what came before
    log_decay = -math.log(2.0) / half_life
    totals, masses = [], []
    for start in range(0, seq, CHUNK):
        x_BCD, mask_BC = x_BSD[:, start : start + CHUNK], mask[:, start : start + CHUNK]
        age_BC = mask_BC.cumsum(1).float()
        carry_BC1 = torch.exp(log_decay * age_BC)[..., None]
        decay_BCC = torch.exp(log_decay * (age_BC[:, :, None] - age_BC[:, None, :]).clamp_min(0))
        decay_BCC = torch.tril(decay_BCC * mask_BC[:, None, :])
        if text_BS is not None:
            text_BC = text_BS[:, start + 1 : start + 1 + CHUNK]
            decay_BCC = decay_BCC * (text_BC[:, :, None] == text_BC[:, None, :])
            carry_BC1 = carry_BC1 * (text_BC == text_BS[:, start : start + 1])[..., None]
        total_BCD = decay_BCC @ x_BCD + carry_BC1 * total_BD[:, None]
        mass_BC1 = decay_BCC.sum(-1, keepdim=True) + carry_BC1 * mass_B1[:, None]
        totals.append(total_BCD)
        masses.append(mass_BC1)
        total_BD, mass_B1 = total_BCD[:, -1], mass_BC1[:, -1]
    return RouterState(torch.cat(totals, 1), torch.cat(masses, 1))
