"""What the router believes a text is about, token by token: a hidden Markov filter over the gate's evidence.

An exponential mean must choose between two faults: with a long memory it follows a change of subject late, with a short
one it is unsure inside a text. A filter does not forget with time; it forgets when the text speaks against it.

Shapes: B batch, S sequence, C chunk of the sequence, D hidden, E members.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64
"""Tokens whose transitions are multiplied at once; bounds the filter's working memory at B x CHUNK x E x E."""

MOST_MULTIPLIED = 32
"""The most members for which that is done: its work grows with their cube. With more, tokens are read one by one."""

TOKENS_A_WITNESS = 48.0
"""How many neighbouring tokens say as much as one independent draw. The gate's logits are those of a mean of many
tokens, and the tokens of a text resemble each other, so that each of them counts for this part of its logits."""

MOST_EVIDENCE = 1.5
"""A token makes no member of the pool more than e^1.5 times as likely as another one: single tokens, such as the end of
a text or a lone letter, can lie far from the means of all skills, and then say nothing."""


def evidence_of(logits: Tensor) -> Tensor:
    """How much each token alone speaks for each member of the pool: nats, at most 0, the best one at 0.

    Args:
        logits: of the gate for the tokens themselves, not for their mean: [..., members].
    """
    shares = logits / TOKENS_A_WITNESS
    return (shares - shares.amax(-1, keepdim=True)).clamp_min(-MOST_EVIDENCE)


def filtered(
    evidence: Tensor,
    *,
    change_rate: float,
    mask: Tensor | None = None,
    belief: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """The probability of each member after each token, given all tokens so far (the forward algorithm; Rabiner 1989).

    p_t(e) is proportional to exp(evidence_t(e)) ((1 - r) p_(t-1)(e) + r / E), with r the probability that the subject
    changes at a token. The recursion is linear in p but for the factor that makes it sum to 1, so that the tokens of a
    chunk can be computed together, by multiplying their transitions in log2(CHUNK) steps. Padding changes nothing.

    Args:
        evidence: [batch, seq, members], see `evidence_of`.
        change_rate: r, above 0 and below 1.
        mask: bool [batch, seq], False on padding; None: no padding.
        belief: [batch, members], the result after the last token of the call before; None: all members alike.
        starts: bool [batch, seq], True on the first token of another packed text.

    Returns:
        Logarithms of the probabilities: [batch, seq, members], of `evidence`'s dtype.
    """
    batch, seq, members = evidence.shape
    p_BE = evidence.new_full((batch, members), 1 / members) if belief is None else belief.to(evidence.dtype).exp()
    if mask is None:
        mask = torch.ones(batch, seq, dtype=torch.bool, device=evidence.device)
    starts = torch.zeros_like(mask) if starts is None else starts
    read = _one_by_one if members > MOST_MULTIPLIED else _together
    log_p = []
    for start in range(0, seq, CHUNK):
        part = slice(start, start + CHUNK)
        p_BCE = read(evidence[:, part].exp(), p_BE, mask[:, part], starts[:, part], change_rate)
        log_p.append(p_BCE.log())
        p_BE = p_BCE[:, -1]
    return torch.cat(log_p, 1)


def _together(likely_BCE: Tensor, p_BE: Tensor, mask_BC: Tensor, starts_BC: Tensor, change_rate: float) -> Tensor:
    """The probabilities after each token of a chunk, from the products of the tokens' transitions."""
    members = p_BE.shape[-1]
    stay_EE = torch.eye(members, dtype=p_BE.dtype, device=p_BE.device)
    anew_EE = torch.full_like(stay_EE, 1 / members)
    move_EE = (1 - change_rate) * stay_EE + change_rate * anew_EE
    move_BCEE = torch.where(starts_BC[..., None, None], anew_EE, move_EE)
    # Row e, column e': how much of e' before a token is e after it.
    step_BCEE = torch.where(mask_BC[..., None, None], likely_BCE[..., None] * move_BCEE, stay_EE)
    p_BCE = (_running_products(step_BCEE) @ p_BE[:, None, :, None])[..., 0]
    return p_BCE / p_BCE.sum(-1, keepdim=True)


def _running_products(steps_BCEE: Tensor) -> Tensor:
    """The product of the steps up to each one, the latest on the left, scaled so that the largest entry is 1."""
    length = steps_BCEE.shape[1]
    products = steps_BCEE
    for doubling in range((length - 1).bit_length()):
        reach = 2**doubling
        longer = products[:, reach:] @ products[:, :-reach]
        products = torch.cat([products[:, :reach], longer / longer.amax((-2, -1), keepdim=True)], 1)
    return products


def _one_by_one(likely_BCE: Tensor, p_BE: Tensor, mask_BC: Tensor, starts_BC: Tensor, change_rate: float) -> Tensor:
    """The same, by the recursion."""
    share = 1 / p_BE.shape[-1]
    found = []
    for likely_BE, mask_B, starts_B in zip(likely_BCE.unbind(1), mask_BC.unbind(1), starts_BC.unbind(1), strict=True):
        prior_BE = torch.where(starts_B[:, None], share, (1 - change_rate) * p_BE + change_rate * share)
        new_BE = likely_BE * prior_BE
        p_BE = torch.where(mask_B[:, None], new_BE / new_BE.sum(-1, keepdim=True), p_BE)
        found.append(p_BE)
    return torch.stack(found, 1)
