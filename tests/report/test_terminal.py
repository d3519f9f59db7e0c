"""What a terminal shows of a generated text."""

from io import StringIO

from reference.texts import byte_tokenizer
from rich.console import Console

from dylo_moe.evaluation.continuation import RoutedText
from dylo_moe.report.terminal import show_sample
from dylo_moe.utils.screen import Screen


def test_without_colours_each_change_of_expert_is_written_once():
    """It was written before every token of the base, whose expert is None."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("abcdef", add_special_tokens=False)["input_ids"]
    experts = [None, None, "one", "one", None, None]
    console = Console(file=StringIO(), width=100)
    show_sample(Screen("test", console=console), RoutedText("text", ids, experts, prompt_length=1), tokenizer, ["one"])
    assert console.file.getvalue().splitlines()[-1] == "⟨base⟩a » b⟨one⟩cd⟨base⟩ef"
