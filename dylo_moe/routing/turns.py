"""Find the answers in a conversation's tokens: where each begins, which tokens are of it, and what it was decided on.

An answer is a function of the tokens before it alone, so that a text is routed in the same way whether it is read at
once, token by token from a cache, padded, or packed behind another.

Shapes: B batch, S sequence, L tokens that are compared at once, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dylo_moe.routing.features import RouterState
from dylo_moe.routing.turn_tokens import TurnTokens

NO_TOKEN = -1
"""Stands where fewer tokens have been read than are compared; it equals no token."""


class Answers(NamedTuple):
    """The answers among the tokens of one forward."""

    tokens: Tensor
    """bool [batch, seq]: the tokens that belong to an answer; never padding."""
    is_open: Tensor
    """bool [batch, seq]: whether an answer is open after each token, where padding changes nothing."""
    openings: Tensor
    """bool [batch, seq]: the tokens with which an answer begins."""
    opened_at: Tensor
    """int64 [batch, seq]: where in this call the answer that is open at a token begins; -1 where in a call before, or
    where none is open."""
    recent: Tensor
    """int64 [batch, seq, longest - 1]: the last real tokens up to each one, which the next call has to know."""


def find_answers(
    input_ids: Tensor,
    *,
    mask: Tensor,
    turns: TurnTokens,
    starts: Tensor | None = None,
    recent: Tensor | None = None,
    is_open: Tensor | None = None,
) -> Answers:
    """Find the answers among the tokens of one call. Padding, wherever it stands, is not seen.

    Args:
        input_ids: int64 [batch, seq].
        mask: bool [batch, seq], False on padding.
        turns: what opens and closes an answer.
        starts: bool [batch, seq], True on the first token of another packed text, to which no answer goes on.
        recent: int64 [batch, longest - 1], the last real tokens of the call before; None: there was none.
        is_open: bool [batch, 1], whether an answer was open then.
    """
    batch, seq = input_ids.shape
    device, carried = input_ids.device, turns.longest - 1
    if recent is None:
        recent = input_ids.new_full((batch, carried), NO_TOKEN)
    if is_open is None:
        is_open = torch.zeros(batch, 1, dtype=torch.bool, device=device)
    # The real tokens of each row, moved together, in their order; padding follows them, and is never looked up.
    order_BS = (~mask).long().argsort(dim=1, stable=True)
    ids_BS = input_ids.gather(1, order_BS)
    text_BS = torch.zeros_like(ids_BS) if starts is None else starts.long().gather(1, order_BS).cumsum(1)
    ids_BSL = torch.cat([recent, ids_BS], 1).unfold(1, turns.longest, 1)
    text_BSL = torch.cat([torch.zeros_like(recent), text_BS], 1).unfold(1, turns.longest, 1)
    ids_BSL = ids_BSL.masked_fill(text_BSL != text_BS[..., None], NO_TOKEN)

    def completes(ids: tuple[int, ...]) -> Tensor:
        return (ids_BSL[..., -len(ids) :] == torch.tensor(ids, device=device)).all(-1)

    opens_BS = completes(turns.recognised)
    closes_BS = torch.stack([completes(ending) for ending in turns.endings]).any(0)
    if starts is not None:
        closes_BS = closes_BS | starts.gather(1, order_BS)
    place_BS = torch.arange(1, seq + 1, device=device).expand(batch, seq)
    opened_BS = torch.where(opens_BS, place_BS, 0).cummax(1).values
    closed_BS = torch.where(closes_BS, place_BS, 0).cummax(1).values
    open_BS = (opened_BS > 0) & (opened_BS >= closed_BS) | (is_open & (closed_BS == 0))
    # Back to where the tokens stand: at padding, how it stood after the last real token before; none: the call before.
    last_BS = mask.cumsum(1)
    padded_BS = F.pad(order_BS, (1, 0), value=-1)
    place_BS = torch.where(open_BS & (opened_BS > 0), opened_BS, 0)
    opened_at_BS = padded_BS.gather(1, F.pad(place_BS, (1, 0)).gather(1, last_BS))
    recent_BSC = torch.cat([recent[:, None], ids_BSL[..., 1:]], 1)
    recent_BSC = recent_BSC.gather(1, last_BS[..., None].expand(-1, -1, carried))
    is_open_BS = torch.cat([is_open, open_BS], 1).gather(1, last_BS)
    return Answers(
        tokens=is_open_BS & mask,
        is_open=is_open_BS,
        openings=F.pad(opens_BS, (1, 0)).gather(1, last_BS) & mask,
        opened_at=opened_at_BS,
        recent=recent_BSC,
    )


class Turn(NamedTuple):
    """One answer of a text, and who wrote it."""

    start: int
    """The position of its first token, that of the header at which it was recognised; padding is counted."""
    stop: int
    """The position after its last token."""
    experts: dict[str, float]
    """The routing weight of each expert that wrote it; empty: the unchanged base."""


def list_turns(names: Sequence[str], weights: Tensor, *, answers: Answers) -> list[list[Turn]]:
    """The answers of each row, in their order.

    Args:
        names: the columns of `weights`.
        weights: [batch, seq, experts], of a call that read the rows from their beginning.
        answers: of that call.
    """
    rows = []
    for weights_SE, is_of_S, opens_S in zip(weights.cpu(), answers.tokens.cpu(), answers.openings.cpu(), strict=True):
        turns = []
        for start, end in pairwise([*opens_S.nonzero().flatten().tolist(), len(is_of_S)]):
            members = is_of_S[start:end].nonzero().flatten()
            used = {name: float(weight) for name, weight in zip(names, weights_SE[start], strict=True) if weight > 0}
            turns.append(Turn(start, start + int(members[-1]) + 1, used))
        rows.append(turns)
    return rows


class TurnState(NamedTuple):
    """The router's memory where it decides once an answer: what cached decoding carries from token to token."""

    read: RouterState
    """After each token, what was read so far: total [batch, seq, hidden], mass [batch, seq, 1]."""
    decided: RouterState
    """What the answer that is open at each token was decided on, in the same shapes; zeros where none is."""
    is_open: Tensor
    """bool [batch, seq, 1]: whether an answer is open after each token."""
    recent: Tensor
    """int64 [batch, seq, longest - 1]: the last real tokens up to each one."""

    @property
    def mass(self) -> Tensor:
        """fp32 [batch, seq, 1], of what was read."""
        return self.read.mass

    @property
    def last(self) -> TurnState:
        """The memory after the last token."""
        return self.each(lambda part: part[:, -1])

    def span(self, start: int | None, stop: int | None) -> TurnState:
        """The memory after some of the tokens."""
        return self.each(lambda part: part[:, start:stop])

    def each(self, change: Callable[[Tensor], Tensor]) -> TurnState:
        """All parts, changed in the same way."""
        return TurnState(self.read.each(change), self.decided.each(change), change(self.is_open), change(self.recent))


def decide_answers(read: RouterState, answers: Answers, *, before: TurnState | None) -> TurnState:
    """What each answer's tokens are routed by: what the router had read as the answer began.

    Args:
        read: the router's memory after each token of this call, without a belief.
        answers: of this call.
        before: the memory after the last token of the call before; None: there was none.
    """
    is_here_BS1, is_open_BS1 = (answers.opened_at >= 0)[..., None], answers.is_open[..., None]
    at_BS1 = answers.opened_at.clamp_min(0)[..., None]

    def decided(read_BSD: Tensor, before_BD: Tensor | None) -> Tensor:
        here_BSD = read_BSD.gather(1, at_BS1.expand_as(read_BSD))
        carried = read_BSD.new_zeros(()) if before_BD is None else before_BD[:, None]
        return torch.where(is_here_BS1, here_BSD, carried) * is_open_BS1

    total, mass = (None, None) if before is None else before.decided[:2]
    return TurnState(
        read, RouterState(decided(read.total, total), decided(read.mass, mass)), is_open_BS1, answers.recent
    )
