"""What a terminal shows of a generated text, and of the machine that trains."""

from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from reference.texts import byte_tokenizer
from rich.console import Console

from dylo_moe.evaluation.continuation import RoutedText
from dylo_moe.report import terminal
from dylo_moe.report.terminal import show_device, show_sample
from dylo_moe.training import precision
from dylo_moe.training.precision import bf16_over_fp32
from dylo_moe.utils.screen import Screen


def test_without_colours_each_change_of_expert_is_written_once():
    """It was written before every token of the base, whose expert is None."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("abcdef", add_special_tokens=False)["input_ids"]
    experts = [None, None, "one", "one", None, None]
    console = Console(file=StringIO(), width=100)
    show_sample(Screen("test", console=console), RoutedText("text", ids, experts, prompt_length=1), tokenizer, ["one"])
    assert console.file.getvalue().splitlines()[-1] == "⟨base⟩a » b⟨one⟩cd⟨base⟩ef"


@pytest.mark.parametrize(
    ("device", "use_cpu", "bf16", "ratio", "said"),
    [
        ("cuda", False, True, 9.0, ""),
        ("cpu", False, False, 9.0, "there is no GPU here: training on the CPU\n"),
        ("cpu", True, True, 1.1, ""),
        ("cpu", True, True, 3.0, "a product in bf16 takes 3.0 times as long as in fp32 on this CPU: without --bf16 a "
         "base that is stored in fp32 trains faster, and takes more memory\n"),
    ],
)  # fmt: skip
def test_the_cpu_and_a_slow_bf16_are_said(device, use_cpu, bf16, ratio, said, monkeypatch):
    monkeypatch.setattr(terminal, "bf16_over_fp32", lambda: ratio)
    console = Console(file=StringIO(), width=200)
    show_device(
        Screen("test", console=console), SimpleNamespace(device=torch.device(device), use_cpu=use_cpu, bf16=bf16)
    )
    assert console.file.getvalue() == said


def test_the_ratio_of_the_precisions_is_the_median_of_the_turns(monkeypatch):
    """A turn in which the machine was busy does not count."""
    times = iter([3.0, 1.0, 3.0, 1.0, 900.0, 1.0, 3.0, 1.0, 3.0, 1.0])
    seen = []
    monkeypatch.setattr(precision, "_seconds", lambda left, right: (seen.append(left.dtype), next(times))[1])
    assert bf16_over_fp32() == 3.0
    assert seen[:2] == [torch.bfloat16, torch.float32]
