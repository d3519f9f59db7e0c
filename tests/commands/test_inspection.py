"""`dylora data`: what is shown is what is trained."""

import io
import re
import statistics
from pathlib import Path

import pytest
from reference.mirrors import ROWS, write_mirror
from reference.texts import CHAT, END, PLAIN, numbered, write_rows
from reference.tiny import tiny_base
from rich.console import Console

from dylo_moe.cli import main
from dylo_moe.commands.data.run import PROMPT_STYLE, SPECIAL_STYLE, TRAINED_SPECIAL_STYLE, TRAINED_STYLE, coloured
from dylo_moe.data.config import DataConfig
from dylo_moe.data.encoding import encode, text_format
from dylo_moe.data.loading import load_data
from dylo_moe.data.sources.catalog import CATALOG
from dylo_moe.data.sources.examples import ask
from dylo_moe.report.terminal import COUNT_TITLES
from dylo_moe.utils.screen import Screen


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    return write_mirror(tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_base("llama", vocab_size=len(CHAT)).save_pretrained(folder)
    CHAT.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(base, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> str:
        status = main(["data", *words, *(["--model", base] if words[0] != "list" else [])])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out + err

    return run


def styled(row, tokenizer, *, marked=False):
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    text = coloured(row.input_ids, row.labels, tokenizer, special, marked=marked)
    return text.plain, [(text.plain[span.start : span.end], span.style) for span in text.spans]


def test_prompt_trained_template_and_end_tokens_have_a_style_each():
    row = encode(text_format(CHAT), ask("a ü\nb", "the é answer"), max_seq_length=100)
    plain, parts = styled(row, CHAT)
    assert plain == CHAT.decode(row.input_ids)
    assert parts[-2:] == [("the é answer", TRAINED_STYLE), (END, TRAINED_SPECIAL_STYLE)]
    assert ("user\na ü\nb", PROMPT_STYLE) in parts and ("<|im_start|>", SPECIAL_STYLE) in parts
    assert styled(row, CHAT, marked=True)[0] == plain[: -len("the é answer" + END)] + "⟦the é answer" + END + "⟧"


def test_what_is_green_is_what_the_loss_sees():
    """Also of a plain text, whose first token is predicted from nothing."""
    from dylo_moe.data.sources.examples import Example

    row = encode(text_format(PLAIN), Example((), "abc the"), max_seq_length=100)
    _, parts = styled(row, PLAIN)
    assert parts == [("a", PROMPT_STYLE), ("bc the", TRAINED_STYLE), (END, TRAINED_SPECIAL_STYLE)]


def test_list_names_every_dataset_with_its_facts(run):
    shown = run("list")
    for source in CATALOG.values():
        for fact in (source.name, source.description, source.size, source.format, source.licence, source.origin):
            assert fact in shown
        assert source.revision is None or source.revision[:10] in shown
    assert shown.count("not for commercial use") == 2 and shown.count("never trained on") == 1


def test_show_prints_examples_that_are_really_trained(run, mirror):
    shown = run("show", "code_alpaca", "--data_dir", str(mirror), "--examples", "4")
    assert f"{ROWS + 2} rows read, {ROWS} usable" in shown and str(mirror / "code_alpaca") in shown
    data = load_data(DataConfig(datasets=["code_alpaca"], data_dir=str(mirror)), CHAT)
    rows = [*data.train, *data.evaluation["code_alpaca"]]
    texts = {CHAT.decode(row["input_ids"]): CHAT.decode([i for i in row["labels"] if i != -100]) for row in rows}
    blocks = re.split(r"^row \d+ · .*$", shown, flags=re.MULTILINE)[1:]
    assert len(blocks) == 4
    for block in blocks:
        whole, trained = (
            re.search(r"(<\|im_start\|>.*⟧)", block, re.DOTALL)[1],
            re.search("⟦(.*)⟧", block, re.DOTALL)[1],
        )
        assert texts[whole.replace("⟦", "").replace("⟧", "")] == trained
    assert "1 x output is empty (first: code_alpaca_20k.json[30])" in shown


def test_another_seed_shows_other_examples_and_the_same_one_the_same(run, mirror):
    one, again, other = (
        run("show", "code_alpaca", "--data_dir", str(mirror), "--examples", "2", "--seed", seed) for seed in "112"
    )
    assert one == again != other


def test_humaneval_may_be_looked_at(run, mirror):
    shown = run("show", "humaneval", "--data_dir", str(mirror), "--examples", "1")
    assert "For evaluation only: dylora train refuses it." in shown and "def own_" in shown


def test_columns_that_nothing_reads_are_named_once(run, tmp_path):
    rows = [{"prompt": f"what is {i}?", "response": f"{i}", "rating": i, "url": "x" * (i < 3)} for i in range(1, 9)]
    path = write_rows(tmp_path / "mine.jsonl", rows)
    for command in ("show", "check"):
        shown = " ".join(run(command, path).split())
        assert shown.count("mine has columns that nothing reads: rating (8 rows), url (2 rows).") == 1


def test_long_rows_say_what_they_were_cut_from(run, tmp_path):
    path = write_rows(tmp_path / "mine.jsonl", [{"prompt": "word " * 50, "response": f"{i}"} for i in range(4)])
    shown = run("show", path, "--max_seq_length", "32")
    assert re.search(r"row \d · 32 tokens, \d trained · cut from 2\d\d", shown)


def numbers(line: str) -> list[int]:
    return [int(cell.replace(",", "")) for cell in re.findall(r"[\d,]+", line)]


def test_check_prints_the_counts_lengths_padding_and_overlaps_of_the_very_rows(run, mirror, tmp_path):
    from reference.mirrors import answer, task

    config = {"data_dir": str(mirror), "max_seq_length": 150}
    copies = [{"prompt": f"full: {task(12, 'mbpp')}", "response": answer(12, "mbpp")}]
    copies += [{"prompt": f"{i}?", "response": "x" * i} for i in range(1, 40)]
    mine = write_rows(tmp_path / "mine.jsonl", [*copies, copies[3], {"prompt": "a"}])
    names = ["code_alpaca", "mbpp", mine]
    shown = run("check", *names, "--data_dir", str(mirror), "--max_seq_length", "150")
    data = load_data(DataConfig(datasets=names, **config), CHAT, seed=42)
    for field, title in COUNT_TITLES.items():
        values = [getattr(count, field) for count in data.counts]
        lines = [line for line in shown.splitlines() if re.match(rf"{title} +\d", line)]
        if any(values) or field in ("train", "evaluation"):
            assert numbers(lines[0].replace(title, "")) == values, title
        else:
            assert not lines
    reason = "no known format has its columns (prompt); say which to read with --columns"
    assert f"mine: 1 x {reason} (first: mine.jsonl:42)" in shown
    assert "Overlap with 25 test problems: 1 row, kept; --decontaminate removes them." in shown
    assert "mine: 1 x it overlaps with MBPP/12 (first: mine.jsonl:1)" in shown
    form = text_format(CHAT)
    rows = [encode(form, ask(row["prompt"], row["response"]), max_seq_length=10_000) for row in [*copies, copies[3]]]
    lengths = sorted(len(row.input_ids) for row in rows)
    (line,) = [line for line in shown.splitlines() if re.match(r"mine( +[\d.,]+%?){8}$", line)]
    assert numbers(line)[6] == lengths[-1] and numbers(line)[2] == round(statistics.median(lengths))
    over = sum(length > 150 for length in lengths) / len(lengths)
    assert over > 0 and f"{over:.1%}" in line
    removed = run("check", *names, "--data_dir", str(mirror), "--max_seq_length", "150", "--decontaminate")
    assert re.search(r"contaminated +0 +0 +1\b", removed) and "removed." in removed


def test_check_without_a_benchmark_says_that_it_did_not_compare(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dylo_moe.data.sources.hub.no_way_to_hub", lambda: True)
    shown = run("check", numbered(tmp_path / "mine.jsonl", 20, "cube"))
    assert "Overlap with mbpp: not checked." in shown and "Overlap with 164 test problems: none." in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show"], "no dataset is named"),
        (["check"], "no dataset is named"),
        (["show", "cmake", "mbpp"], "show prints one dataset at a time; leave mbpp out"),
        (["show", "cmake", "--packing"], "--packing is not offered: it does not change what is shown"),
        (["show", "cmake", "--eval_subset", "3"], "--eval_subset is not offered"),
        (["check", "cmake", "--examples", "3"], "--examples is not offered: it is for dylora data show"),
        (["check", "cmake", "--datasets", "x", "y"], "without --datasets: dylora data check cmake x y"),
        (["show", "--datasets=cmake"], "without --datasets: dylora data show cmake"),
        (["show", "nope", "--model", "/no/base"], "unknown dataset 'nope'; known are code_alpaca"),
        (["check", "cmake", "--num_experts", "3"], "there is no flag --num_experts"),
        (["show", "cmake", "--examples", "0"], "examples is 0; it must be at least 1"),
        (["show", "cmake", "--max_seq_length", "3"], "max_seq_length is 3"),
        (["show", "cmake", "--overlong", "wrap"], "overlong is 'wrap'; it must be cut or drop"),
        (["show", "nonsense"], "unknown dataset 'nonsense'"),
        (["look"], "there is no command 'data look'; there are list, show, check"),
    ],
)
def test_mistakes_are_one_line_and_status_2(base, capsys, words, message):
    assert main(["data", *words, *(["--model", base] if words[-1] != "look" and len(words) > 1 else [])]) == 2
    shown = capsys.readouterr().err.strip()
    assert message in shown and len(shown.splitlines()) == 1


@pytest.mark.parametrize("words", [[], ["--help"], ["list", "--help"], ["show", "--help"], ["check", "--help"]])
def test_help_names_the_flags_that_work_and_no_others(capsys, words):
    try:
        assert main(["data", *words]) == 0
    except SystemExit as ended:
        assert ended.code == 0
    shown = capsys.readouterr().out
    flags = set(re.findall(r"--(\w+)", shown))
    if words[:1] == ["show"]:
        assert {"examples", "max_seq_length", "loss_on", "columns"} <= flags and not {"packing", "mix"} & flags
    elif words[:1] == ["check"]:
        assert {"packing", "mix", "decontaminate"} <= flags and "examples" not in flags


def test_tables_are_readable_in_a_narrow_window(mirror):
    """Names and numbers are not cut off at 80 columns, with two datasets of long names."""
    from dylo_moe.report.terminal import show_data

    names = ["python_code_instructions_18k", "python_code_23k_sharegpt", "english_reference"]
    data = load_data(DataConfig(datasets=names, data_dir=str(mirror)), CHAT)
    stream = io.StringIO()
    show_data(Screen("test", console=Console(file=stream, width=80)), data)
    shown = stream.getvalue()
    assert "…" not in shown
    assert all(name in shown for name in names)
    assert max(map(len, re.sub(r"^.*(: |Note).*$", "", shown, flags=re.MULTILINE).splitlines())) <= 80
