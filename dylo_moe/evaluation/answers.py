"""Generate answers in batches: prompts are padded on the left, rows end at stop sequences, and each token's expert is
kept."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from dylo_moe.evaluation.samples import END, LENGTH, STOP
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.routing.config import BASE
from dylo_moe.routing.router import Routing

AS_TEXT: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
"""The options with which token ids are decoded, so that the text holds what they stand for and nothing else."""


class Decoding(NamedTuple):
    """How answers are drawn."""

    name: str
    """The name of the decoding in files and tables, "greedy" or "sampled"."""
    num_samples: int = 1
    """The number of samples of each task."""
    temperature: float = 0.0
    """The sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability (Holtzman et al. 2020, arXiv:1904.09751)."""

    def options(self) -> dict[str, Any]:
        """The options for `generate`; they also switch off what the base's own generation config would add."""
        plain = {"num_beams": 1, "repetition_penalty": 1.0}
        if self.temperature == 0:
            return {**plain, "do_sample": False}
        return {**plain, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


class Answer(NamedTuple):
    """The answer in one row of a batch; its fields are those of `Completion`."""

    text: str
    tokens: int
    finish: str
    experts: dict[str, float]
    steps: int
    seconds: float


class StopAtText(StoppingCriteria):
    """Ends a row as soon as its new text holds a stop sequence.

    Only the newest tokens are decoded: a stop's last character came with the last token, and a token stands for at
    least one byte, so as many tokens as the longest stop has bytes contain it.

    Args:
        prompt_length: the length of the padded prompts, in which stop sequences do not count.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], *, prompt_length: int) -> None:
        self.tokenizer, self.stops, self.prompt_length = tokenizer, tuple(stops), prompt_length
        self.window = max(len(stop.encode()) for stop in stops)
        self.done_at: list[int | None] = []
        """For each row the number of new tokens after which it held a stop; None if it holds none yet."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row has ended, bool [batch]."""
        length = input_ids.shape[1]
        self.done_at = self.done_at or [None] * len(input_ids)
        rows = [row for row, done in enumerate(self.done_at) if done is None]
        tails = input_ids[rows, max(self.prompt_length, length - self.window) :].tolist()
        for row, text in zip(rows, self.tokenizer.batch_decode(tails, **AS_TEXT), strict=True):
            if any(stop in text for stop in self.stops):
                self.done_at[row] = length - self.prompt_length
        return torch.tensor([done is not None for done in self.done_at], device=input_ids.device)


@torch.no_grad()
def answer_batch(
    model: DyLoRAMoE,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    decoding: Decoding,
    stops: Sequence[str],
    end_ids: Sequence[int],
    max_new_tokens: int,
    seed: int,
) -> list[Answer]:
    """Generate the answers to one batch of prompts. The random state and the model's mode stay as they were.

    Args:
        prompts: the token ids of each prompt.
        stops: texts that end an answer.
        end_ids: tokens that end an answer.
        seed: the seed of the sampling, which follows from the run's seed and the batch (`batch_seed`).
    """
    width = max(map(len, prompts))
    pad = int(end_ids[0])
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    criteria = [StopAtText(tokenizer, stops, prompt_length=width)] if stops else []
    was_training, started = model.training, time.monotonic()
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(end_ids),
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList(criteria),
                return_dict_in_generate=True,
                **decoding.options(),
            )
    finally:
        model.train(was_training)
    seconds = (time.monotonic() - started) / len(prompts)
    done_at = criteria[0].done_at if criteria else [None] * len(prompts)
    steps = output.sequences.shape[1] - width
    answers = []
    for row, prompt in enumerate(prompts):
        new = output.sequences[row, width:].tolist()
        tokens, finish = row_end(new, end_ids, done_at[row])
        shares = writers(output.routing, row, range(width - 1, width - 1 + tokens))
        text = continuation(tokenizer, prompt, new[: tokens - (finish == END)])
        answers.append(Answer(text, tokens, finish, shares, steps, round(seconds, 4)))
    return answers


def row_end(new: list[int], end_ids: Sequence[int], done_at: int | None) -> tuple[int, str]:
    """The number of a row's new tokens up to its end, after which there is only padding, and why it ended.

    Args:
        done_at: the number of new tokens after which the row held a stop sequence; None if it holds none.
    """
    end = next((place for place, token in enumerate(new, 1) if token in end_ids), None)
    if end is not None and (done_at is None or end <= done_at):
        return end, END
    return (len(new), LENGTH) if done_at is None else (done_at, STOP)


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens after a prompt. Decoded alone, many tokenizers would drop the space before the first
    token."""
    before, whole = (str(tokenizer.decode(ids, **AS_TEXT)) for ids in ([*prompt], [*prompt, *new]))
    return whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode([*new], **AS_TEXT))


def writers(routing: Routing, row: int, places: range) -> dict[str, float]:
    """The share of a row's tokens that each expert generated: a token is predicted by the expert of the token before.

    Args:
        places: the positions of the tokens from which the counted ones were predicted.
    """
    weights = routing.weights[row, places.start : places.stop].double().mean(0).tolist()
    shares = {name: round(weight, 4) for name, weight in zip(routing.names, weights, strict=True)}
    rest = 1.0 - sum(weights)
    if rest > 1e-3:  # if route_to sends all to the base alone, no expert has a weight
        shares[BASE] = round(shares.get(BASE, 0.0) + rest, 4)
    return {name: share for name, share in shares.items() if share > 0}


def batch_seed(seed: int, batch: int) -> int:
    """The seed of a batch, derived from the run's seed and the number of the batch."""
    return int.from_bytes(hashlib.sha256(f"{seed} {batch}".encode()).digest()[:6], "big")
