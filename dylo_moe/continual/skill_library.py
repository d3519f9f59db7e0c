"""The statistics of each skill's router features, which are all that is kept of its text.

Shapes: N tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dylo_moe.routing.config import BASE

SHRINKAGE = 0.2
"""How much of the covariance's mean variance is added in all directions, because a hundred texts cannot estimate
them."""

METRIC_SHRINKAGE = 1.0
"""The shrinkage of the metric of `distance`, which must serve skills that have not been seen yet."""

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Calibration scores are kept for batches of so many texts, as far as a skill's sample goes."""

MIN_SAMPLE_PER_BATCH = 4
"""How many times a batch's texts each half of a sample must hold for that size to be calibrated on it."""

SCORES_PER_SIZE = 256
"""Calibration scores kept of one skill for each size: in the first half of a sample as in the second."""


SCATTER_STEP = 2.0**-16
"""The pooled scatter is kept in fp64, in multiples of this. Sums of such numbers are exact up to 2^37, so that the
order in which skills are learned changes no bit of a gate."""


@dataclass(frozen=True)
class Skill:
    """The statistics of one skill."""

    name: str
    expert: str
    """The expert that learns the skill, to which its tokens should be routed."""
    mean: Tensor
    """fp32 [hidden]: of the features of all its tokens."""
    num_texts: int
    num_tokens: int
    scores: Tensor
    """fp32 [sizes, scores]: `distance` of batches of the skill's own texts, of each of `BATCH_SIZES`, from a mean that
    they had no part in. NaN for sizes that the sample was too small for."""
    shares: dict[str, float]
    """Which members of the pool its tokens chose when it was last learned, as fractions."""
    calibration: Tensor
    """fp64 [places, temperatures + 1]: the losses from which the gate's temperatures follow, see `calibration.py`;
    empty where none was measured."""


class SkillLibrary:
    """Mean, calibration scores and expert of each skill, and one within-skill covariance for all of them.

    The covariance is pooled as in a linear discriminant (Fisher 1936), so that a skill costs one mean more and
    nothing of the others changes but what they share. Nothing of a single text is kept but its distance.

    The entry `base`, if there is one, is of text that the base itself should handle: rows are fitted against it, but
    it is no skill, and its texts do not enter the covariance.

    Args:
        hidden_size: of the features.
    """

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self._skills: dict[str, Skill] = {}
        self._scatter = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
        self._num_pooled = 0
        self._whitening: Tensor | None = None
        self._root: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All entries, in the order in which they were first learned; `base` among them where it is one."""
        return tuple(self._skills)

    @property
    def skills(self) -> tuple[str, ...]:
        """The entries that are skills."""
        return tuple(name for name in self._skills if name != BASE)

    def __len__(self) -> int:
        return len(self._skills)

    def __contains__(self, name: object) -> bool:
        return name in self._skills

    def __getitem__(self, name: str) -> Skill:
        if name not in self._skills:
            known = ", ".join(self._skills) or "none"
            raise KeyError(f"the library has no skill {name!r}; it knows: {known}")
        return self._skills[name]

    # Learning

    @torch.no_grad()
    def learn(self, name: str, texts: Sequence[Tensor], *, expert: str, seed: int = 0) -> None:
        """Store the statistics of a sample of a skill; a known skill's are pooled with those that are there.

        The texts are cut into a first and a second half, and batches of each are scored against the mean of the other.
        Texts of one document should stand together, so that a text is not judged by its own document.

        Args:
            name: of the skill.
            texts: router features of each text, fp32 [tokens, hidden], at least two.
            expert: the expert that learns it.
            seed: of the batches that are scored for calibration.

        Raises:
            ValueError: for fewer than two texts, an empty one, another width, or a value that is not finite.
        """
        self._check(name, texts)
        texts = [text.detach().cpu().float() for text in texts]
        counts_N = torch.tensor([len(text) for text in texts])
        sums_ND = torch.stack([text.double().sum(0) for text in texts])
        old = self._skills.get(name)
        old_count = 0 if old is None else old.num_tokens
        old_sum_D = torch.zeros_like(sums_ND[0]) if old is None else old.mean.double() * old_count
        count = old_count + int(counts_N.sum())
        mean_D = (old_sum_D + sums_ND.sum(0)) / count
        scores = torch.full((len(BATCH_SIZES), SCORES_PER_SIZE), torch.nan)
        if name != BASE:
            self._pool(texts, sums_ND.sum(0) / counts_N.sum(), old)
            scores = self._calibrate(texts, sums_ND, counts_N, old, seed)
            if self._whitening is None:
                self._whitening = _whitening(self._scatter, self._num_pooled)
        self._skills[name] = Skill(
            name=name,
            expert=expert,
            mean=mean_D.float(),
            num_texts=len(texts) + (0 if old is None else old.num_texts),
            num_tokens=count,
            scores=scores,
            shares={} if old is None else old.shares,
            calibration=torch.zeros(0, dtype=torch.float64) if old is None else old.calibration,
        )

    def note_shares(self, name: str, shares: dict[str, float]) -> None:
        """Which members of the pool the tokens of a skill chose, as fractions; known once its gate row is fitted."""
        self._skills[name] = replace(self[name], shares=dict(shares))

    def note_calibration(self, name: str, nats: Tensor) -> None:
        """Keep the losses of some held-out texts of a skill beside those of earlier ones; fp64 [places, ...]."""
        old = self[name].calibration
        self._skills[name] = replace(self[name], calibration=old + nats if old.shape == nats.shape else nats)

    def _check(self, name: str, texts: Sequence[Tensor]) -> None:
        problems = []
        if len(texts) < 2:
            problems.append(f"skill {name!r} needs at least two texts, one to judge the other by; got {len(texts)}")
        for index, text in enumerate(texts):
            if text.dim() != 2 or text.shape[1] != self.hidden_size or not len(text):
                problems.append(
                    f"text {index} of {name!r} must be [tokens, {self.hidden_size}] with at least one token; "
                    f"it is {list(text.shape)}"
                )
            elif not text.isfinite().all():
                problems.append(f"text {index} of {name!r} holds NaN or infinity; look at the base's hidden states")
        if problems:
            raise ValueError("; ".join(problems))

    def _pool(self, texts: Sequence[Tensor], new_mean_D: Tensor, old: Skill | None) -> None:
        """Add the scatter of a sample around its skill's mean (the merge of Chan et al. 1979 for a known skill)."""
        scatter_DD = scatter_around(torch.cat(list(texts)), new_mean_D)
        count = sum(len(text) for text in texts)
        if old is not None:
            weight = old.num_tokens * count / (old.num_tokens + count)
            shift_D = new_mean_D - old.mean.double()
            scatter_DD = scatter_DD + weight * torch.outer(shift_D, shift_D)
        self._scatter = self._scatter + (scatter_DD / SCATTER_STEP).round() * SCATTER_STEP
        self._num_pooled += count
        self._root = None

    def _calibrate(
        self, texts: Sequence[Tensor], sums_ND: Tensor, counts_N: Tensor, old: Skill | None, seed: int
    ) -> Tensor:
        """Batches of each half of a sample against the mean of the other half and of what was known."""
        scores = torch.empty(len(BATCH_SIZES), SCORES_PER_SIZE)
        is_first = torch.arange(len(texts)) * 2 < len(texts)
        for half, chosen in enumerate((is_first, ~is_first)):
            sum_D, count = sums_ND[~chosen].sum(0), int(counts_N[~chosen].sum())
            if old is not None:
                sum_D, count = sum_D + old.mean.double() * old.num_tokens, count + old.num_tokens
            mean_D = sum_D / count
            whitening_DD = self._whitening
            if whitening_DD is None:
                others = [text for text, is_chosen in zip(texts, chosen, strict=True) if not is_chosen]
                whitening_DD = _whitening(scatter_around(torch.cat(others), mean_D), count)
            vectors_ND = sums_ND[chosen] / counts_N[chosen, None]
            whitened_ND = (vectors_ND - mean_D) @ whitening_DD.double()
            scores[:, half::2] = _batch_scores(whitened_ND, SCORES_PER_SIZE // 2, seed)
        return scores if old is None else _merge_scores(old.scores, scores)

    def forget(self, name: str) -> None:
        """Drop an entry; the pooled covariance stays, and so does every other entry."""
        self[name]
        del self._skills[name]

    def reassign(self, experts: Sequence[str], expert: str) -> None:
        """Let one expert know all skills of some others, in whose place it has come; its shares are their sum."""
        for name, skill in self._skills.items():
            shares = {member: share for member, share in skill.shares.items() if member not in experts}
            if len(shares) < len(skill.shares):
                shares[expert] = sum(skill.shares[member] for member in experts if member in skill.shares)
            owner = expert if skill.expert in experts else skill.expert
            self._skills[name] = replace(skill, expert=owner, shares=shares)

    # Looking

    @property
    def covariance(self) -> Tensor:
        """fp64 [hidden, hidden]: of a token's features within its skill, pooled over all skills, and shrunk.

        Raises:
            ValueError: before the first skill.
        """
        if not self._num_pooled:
            raise ValueError("the library has learned no skill yet, so it has no covariance; learn() one first")
        return _shrunk(self._scatter, self._num_pooled, SHRINKAGE)

    @property
    def pooled(self) -> tuple[Tensor, int]:
        """The sum over all skills' tokens of the outer products of their differences from their skill's mean, fp64
        [hidden, hidden], and the number of these tokens."""
        return self._scatter, self._num_pooled

    def discriminants(
        self,
        experts: Sequence[str],
        *,
        origin: Tensor | None = None,
        covariance: tuple[Tensor, int] | None = None,
        means: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The linear discriminant of each member of the pool against the base (Fisher 1936), with one covariance.

        With m the mean of a member's skills and m_0 that of the entry `base` (or `origin`), its logit of
        features f is (f - m_0) . C^-1 (m - m_0) - |m - m_0|^2 / 2, lengths being measured by C^-1. It depends on no
        other member's mean, and on no order.

        Args:
            experts: members with a skill in the library; `base` too.
            origin: fp64 [hidden], the mean of the text that the base should handle; default the entry `base`, or zeros
                where there is none.
            covariance: a scatter and the number of its tokens, instead of `pooled`.
            means: of skills, instead of those that are kept.

        Returns:
            Rows, fp64 [experts, hidden], and biases, fp64 [experts].
        """
        root_DD = self.root if covariance is None else torch.linalg.cholesky(_shrunk(*covariance, SHRINKAGE))
        origin_D = origin
        if origin_D is None:
            origin_D = self[BASE].mean.double() if BASE in self else torch.zeros(self.hidden_size, dtype=torch.float64)
        differences = []
        for expert in experts:
            names = sorted(name for name in self.names if self[name].expert == expert)
            own = [(means or {}).get(name, self[name].mean).double() for name in names]
            differences.append(torch.stack(own).mean(0) - origin_D)
        difference_ED = torch.stack(differences)
        rows_ED = torch.stack(
            [torch.cholesky_solve(difference_D[:, None], root_DD)[:, 0] for difference_D in differences]
        )
        return rows_ED, -rows_ED @ origin_D - 0.5 * (rows_ED * difference_ED).sum(1)

    @property
    def root(self) -> Tensor:
        """fp64 [hidden, hidden]: the lower Cholesky factor of `covariance`; computed once after each `learn`."""
        if self._root is None:
            self._root = torch.linalg.cholesky(self.covariance)
        return self._root

    def draw(self, name: str, count: int, generator: torch.Generator) -> Tensor:
        """Features of imagined tokens of a skill: fp32 [count, hidden], from N(its mean, `covariance`)."""
        noise_ND = torch.randn(count, self.hidden_size, generator=generator, dtype=torch.float64)
        return (self[name].mean.double() + noise_ND @ self.root.T).float()

    def distances(self, texts: Sequence[Tensor]) -> dict[str, float]:
        """The distance of a batch of texts from each skill.

        For two texts or more it is an unbiased estimate of the squared distance between the batch's kind and the
        skill: the mean of <u_i, u_j> over all pairs of different texts, u being the whitened difference of a text's
        mean features from the skill's. What is particular to one text cancels; the mean of |u_i|^2, the usual
        Mahalanobis score, is mostly that. For one text it is |u|^2.

        The whitening is that of the first skill's covariance and never changes, so that scores which were kept do not
        go stale as skills are added. Its own skill's scores are taken with the other half's whitening.

        Args:
            texts: router features of each text, fp32 [tokens, hidden].
        """
        if self._whitening is None:
            return {}
        whitened_ND = self.whitened(torch.stack([text.detach().cpu().double().mean(0) for text in texts]))
        means_SD = self.whitened(torch.stack([self[name].mean for name in self.skills]))
        return {
            name: float(spread_from_zero(whitened_ND - mean_D))
            for name, mean_D in zip(self.skills, means_SD, strict=True)
        }

    def whitened(self, vectors_ND: Tensor) -> Tensor:
        """Features in the coordinates in which `distances` measures: fp64 [vectors, hidden]."""
        if self._whitening is None:
            raise ValueError("the library has learned no skill yet, so it has no metric; learn() one first")
        return vectors_ND.double() @ self._whitening.double()

    # Keeping

    def tensors(self) -> dict[str, Tensor]:
        """All that is not text or number, for a safetensors file; `record` has the rest."""
        tensors = {"scatter": self._scatter}
        if self._whitening is not None:
            tensors["whitening"] = self._whitening
        for name, skill in self._skills.items():
            tensors[f"mean.{name}"] = skill.mean
            tensors[f"scores.{name}"] = skill.scores
            if len(skill.calibration):
                tensors[f"calibration.{name}"] = skill.calibration
        return tensors

    def record(self) -> dict[str, Any]:
        """The rest, for a json file."""
        return {
            "hidden_size": self.hidden_size,
            "num_pooled": self._num_pooled,
            "skills": [
                {
                    "name": skill.name,
                    "expert": skill.expert,
                    "num_texts": skill.num_texts,
                    "num_tokens": skill.num_tokens,
                    "shares": skill.shares,
                }
                for skill in self._skills.values()
            ],
        }

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], record: dict[str, Any]) -> SkillLibrary:
        """The library that `tensors` and `record` were taken from, bit for bit.

        Raises:
            ValueError: if the two do not belong together.
        """
        library = cls(record["hidden_size"])
        names = [entry["name"] for entry in record["skills"]]
        expected = {"scatter", *(f"{part}.{name}" for name in names for part in ("mean", "scores"))}
        expected |= {"whitening"} if record["num_pooled"] else set()
        calibrated = {f"calibration.{name}" for name in names} & set(tensors)
        if expected | calibrated != set(tensors):
            raise ValueError(
                f"the skill library's tensors are not those of its record: missing {sorted(expected - set(tensors))}, "
                f"unexpected {sorted(set(tensors) - expected - calibrated)}"
            )
        # Tensors read from a file have any alignment in memory, which can change the order of sums over them.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        library._scatter, library._whitening = tensors["scatter"].double(), tensors.get("whitening")
        library._num_pooled = record["num_pooled"]
        for entry in record["skills"]:
            name = entry["name"]
            library._skills[name] = Skill(
                **entry,
                mean=tensors[f"mean.{name}"],
                scores=tensors[f"scores.{name}"],
                calibration=tensors.get(f"calibration.{name}", torch.zeros(0, dtype=torch.float64)),
            )
        return library


def _batch_scores(whitened_ND: Tensor, count: int, seed: int) -> Tensor:
    """Score random batches of some texts, for each size: fp32 [sizes, count]; NaN if there are too few texts."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.full((len(BATCH_SIZES), count), torch.nan)
    for row, size in enumerate(BATCH_SIZES):
        # A batch that is a large part of the sample varies less than one of new texts would.
        if size * MIN_SAMPLE_PER_BATCH <= len(whitened_ND) or size == 1:
            chosen = torch.rand(count, len(whitened_ND), generator=generator).argsort(1)[:, :size]
            scores[row] = torch.stack([spread_from_zero(whitened_ND[indices]) for indices in chosen]).float()
    return scores


def scatter_around(tokens_ND: Tensor, mean_D: Tensor) -> Tensor:
    """Sum of the outer products of tokens' differences from a mean: multiplied in fp32, returned as fp64 [D, D]."""
    centred_ND = tokens_ND.float() - mean_D.float()
    return (centred_ND.T @ centred_ND).double()


def _whitening(scatter_DD: Tensor, count: int) -> Tensor:
    """The matrix by which differences are multiplied to whiten them, from a scatter's shrunk covariance; fp32."""
    inverse_DD = torch.linalg.inv(_shrunk(scatter_DD, count, METRIC_SHRINKAGE))
    return torch.linalg.cholesky(inverse_DD).float().contiguous()


def spread_from_zero(vectors_ND: Tensor) -> Tensor:
    """Mean of <u_i, u_j> over the pairs of different rows; of one row |u|^2."""
    count = len(vectors_ND)
    squares = vectors_ND.square().sum()
    return squares if count == 1 else (vectors_ND.sum(0).square().sum() - squares) / (count * (count - 1))


def _merge_scores(old: Tensor, new: Tensor) -> Tensor:
    """Every other score from each, where both have them."""
    mixed = old.clone()
    mixed[:, 1::2] = new[:, 1::2]
    return torch.where(old.isnan(), new, torch.where(new.isnan(), old, mixed))


def _shrunk(scatter_DD: Tensor, count: int, shrinkage: float) -> Tensor:
    """The covariance of a scatter, fp64, with a part of its mean variance added in all directions."""
    covariance_DD = scatter_DD.double() / count
    covariance_DD = (covariance_DD + covariance_DD.T) / 2
    variance = covariance_DD.diagonal().mean().clamp_min(1e-12)
    return covariance_DD + shrinkage * variance * torch.eye(len(scatter_DD), dtype=torch.float64)
