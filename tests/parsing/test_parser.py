"""How a command line and a recipe are read: bare switches, other trainers' names, what YAML makes of a value."""

from __future__ import annotations

import shlex

import pytest

from dylo_moe.commands.compare.arguments import COMPARE_LINE
from dylo_moe.commands.compare.request import parse_compare
from dylo_moe.commands.eval.arguments import EVAL_LINE
from dylo_moe.commands.eval.request import parse_eval
from dylo_moe.commands.export.arguments import EXPORT_LINE
from dylo_moe.commands.export.request import parse_export
from dylo_moe.commands.plan.arguments import PLAN_LINE
from dylo_moe.commands.plan.request import parse_plan
from dylo_moe.commands.stream.arguments import STREAM_LINE
from dylo_moe.commands.stream.request import build_stream_parser, parse_stream
from dylo_moe.commands.submit.arguments import SUBMIT_LINE
from dylo_moe.commands.submit.request import parse_submit
from dylo_moe.commands.train.arguments import TRAIN_LINE
from dylo_moe.commands.train.request import build_train_parser, parse_train
from dylo_moe.parsing.other_names import NO_FLAGS, OTHER_NAMES, OTHER_VALUES
from dylo_moe.parsing.parser import Parser
from dylo_moe.parsing.recipe_file import shipped_recipes
from dylo_moe.training.run_folder import CONFIG_FILE
from dylo_moe.utils.errors import UsageError


@pytest.fixture(scope="module")
def parser() -> Parser:
    return build_train_parser()


def switches(parser: Parser) -> list[str]:
    return [name for name in parser._option_string_actions if name.startswith("--") and parser.is_switch(name)]


def test_every_switch_may_stand_bare_before_any_word(parser):
    """Bare means true, whatever follows; a typed value is still the value."""
    for option in switches(parser):
        for after in (["--model", "m"], ["RUN/checkpoint"], []):
            assert parser.with_values([option, *after])[0] == f"{option}=True"
        assert parser.with_values([option, "false", "--seed", "1"]) == [f"{option}=false", "--seed=1"]
    assert {"--bf16", "--fp16", "--interleaved_sampling", "--packing", "--allow_code_execution"} <= {*switches(parser)}


def test_a_bare_resume_swallows_nothing(tmp_path, monkeypatch):
    """It means the run in --output_dir, wherever it stands, and without that flag the newest run in runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / CONFIG_FILE).write_text(f"seed: {len(name)}\nnum_experts: 3\n")
    (tmp_path / "runs" / "a_stream").mkdir()
    for name in (CONFIG_FILE, "stream.json"):
        (tmp_path / "runs" / "a_stream" / name).write_text("{}")
    for words in (
        ["--resume_from_checkpoint", "--model", "m", "--output_dir", "runs/new"],
        ["--output_dir=runs/new", "--model", "m", "--resume_from_checkpoint"],
        ["--model", "m", "--resume_from_checkpoint"],
        ["--resume_from_checkpoint", "latest", "--model=m"],
    ):
        arguments = parse_train(words)
        assert arguments.resumed.run.resolve() == (tmp_path / "runs" / "new").resolve()
        assert (arguments.model.model, arguments.experts.num_experts) == ("m", 3)
    with pytest.raises(ValueError, match=r"no run in elsewhere to resume"):
        parse_train(["--resume_from_checkpoint", "--output_dir", "elsewhere"])
    with pytest.raises(ValueError, match=r"is a stream: resume it with `dylora stream"):
        parse_train(["--resume_from_checkpoint", "runs/a_stream"])


def test_a_checkpoint_may_stand_behind_the_flags(tmp_path):
    for words in (
        ["RUN", "--tasks", "humaneval", "--allow_code_execution"],
        ["--tasks", "humaneval", "--allow_code_execution", "RUN"],
        ["--allow_code_execution", "RUN", "--tasks=humaneval"],
    ):
        request = parse_eval(words)
        assert request.checkpoint == "RUN"
        assert request.options.allow_code_execution
    with pytest.raises(UsageError, match="one checkpoint at a time; 'OTHER' belongs to no flag"):
        parse_eval(["RUN", "OTHER"])
    with pytest.raises(UsageError, match="'stray' belongs to no flag; --bf16 takes true or false, or no value"):
        parse_train(["--bf16", "stray", "--seed", "1"])


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--lr", "here it is called --learning_rate"),
        ("--batch_size", "here it is called --per_device_train_batch_size"),
        ("--lora_rank", "here it is called --lora_r"),
        ("--epochs", "here it is called --num_train_epochs"),
        ("--cutoff_len", "here it is called --max_seq_length"),
        ("--cutoff-len", "here it is called --max_seq_length"),
        ("--output", "here it is called --output_dir"),
        ("--tokenizer", "the tokenizer is always that of --model"),
        ("--model_name_or_path", "here it is called --model"),
        ("--micro_batch_size", "here it is called --per_device_train_batch_size"),
        ("--zq_zq", "--help lists the flags"),
    ],
)
def test_names_of_other_trainers_are_understood(typed, message):
    with pytest.raises(UsageError, match=f"no flag {typed}") as raised:
        parse_train([typed, "1"])
    assert message in str(raised.value)


def test_only_flags_of_the_command_are_proposed():
    """No answer names a flag that the command does not have, and none shadows a flag of ours."""
    for parser, refusal in ((build_train_parser(), TRAIN_LINE.refusal), (build_stream_parser(), TRAIN_LINE.refusal)):
        known = {option[2:] for option in parser._option_string_actions}
        for name, flags in OTHER_NAMES.items():
            assert name not in flags.split()
            assert any(flag in known | {"output", "batch_size", *EVAL_FLAGS} for flag in flags.split()), name
        assert not {name for name in known & NO_FLAGS.keys() if not refusal(name)}
    with pytest.raises(UsageError, match="here it is called --batch_size"):
        parse_eval(["RUN", "--bs", "1"])
    with pytest.raises(UsageError) as raised:
        parse_eval(["RUN", "--epochs", "1"])
    assert "--num_train_epochs" not in str(raised.value)


def test_values_of_other_trainers_are_understood(parser):
    for flag, values in OTHER_VALUES.items():
        choices = {str(getattr(one, "value", one)) for one in parser._option_string_actions[f"--{flag}"].choices}
        assert {*values.values()} <= choices and not choices & values.keys()
    with pytest.raises(UsageError, match=r"^optim is 'adamw'; did you mean adamw_torch\?$"):
        parse_train(["--optim", "adamw"])


def test_all_problems_of_a_command_line_come_in_one_message():
    with pytest.raises(UsageError) as raised:
        parse_train(["--learning_rte", "1", "--bf16", "stray", "--max_steps", "0", "--lora_r", "x", "--push-to-hub"])
    for part in ("--learning_rte; did you mean", "'stray' belongs", "max_steps is 0", "lora_r is 'x'", "--push-to-hub"):
        assert part in str(raised.value)


def test_what_must_be_given_is_named_and_what_was_given_is_not():
    with pytest.raises(UsageError, match=r"^to is 'x'; it must be .*; --output must be given$"):
        parse_export(["RUN", "--to", "x"])


EVAL_FLAGS = ("max_new_tokens", "num_samples", "tasks", "expert", "timeout_seconds")


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return ["--config", str(path), "--use_cpu"]


def test_a_recipe_holds_the_words_that_would_be_typed(tmp_path):
    """YAML reads no as false, 1:30 as 90 and 010 as 8; a recipe means what is written in it."""
    train = parse_train(recipe(tmp_path, "save_strategy: no\neval_strategy: no\nseed: 010\nbf16: off\n")).train
    assert (train.save_strategy, train.eval_strategy, train.seed, train.bf16) == ("no", "no", 10, False)
    train = parse_train(
        recipe(
            tmp_path,
            "report_to: [none]\nbf16: yes\nlr_scheduler_type: cosine_with_min_lr\n"
            "lr_scheduler_kwargs: {min_lr: 1.0e-5}\nmax_steps:\nrun_name: ~\nlearning_rate: 1e-3\n",
        )
    ).train
    assert train.bf16 and train.lr_scheduler_kwargs == {"min_lr": 1e-5} and train.learning_rate == 1e-3
    assert (train.max_steps, train.run_name, train.report_to) == (-1, None, [])
    with pytest.raises(UsageError, match="1:30"):
        parse_train(recipe(tmp_path, "max_steps: 1:30\n"))


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("columns: {prompt: task, response: no}\n", ["prompt=task", "response=no"]),
        ("columns:\n  prompt: 'a'\n  mine:\n    system: s\n", ["prompt=a", "mine.system=s"]),
        ("columns: prompt=task,response=done\n", ["prompt=task", "response=done"]),
    ],
)
def test_the_columns_of_a_recipe_may_be_a_mapping(tmp_path, text, typed):
    assert parse_train(recipe(tmp_path, text)).data.columns == typed
    shares = parse_train(recipe(tmp_path, "datasets: [a, b]\nmix: {a: 0.7, b: 0.3}\n")).data.shares
    assert shares == {"a": 0.7, "b": 0.3}


def test_a_mapping_holds_numbers_as_they_are_written(tmp_path):
    """YAML reads 1e-5 as a word, 010 as 8 and 1:30 as 90."""
    text = "{min_lr: 1e-5, a: 010, b: 1:30, d: no, e: null, f: [1.5, x], g: {h: -3}}"
    given = parse_train(recipe(tmp_path, f"lr_scheduler_type: cosine\nlr_scheduler_kwargs: {text}\n")).train
    expected = {"min_lr": 1e-5, "a": 10, "b": "1:30", "d": False, "e": None, "f": [1.5, "x"], "g": {"h": -3}}
    assert given.lr_scheduler_kwargs == expected


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(UsageError, match="it is a folder, not a file, and no recipe has that name; those that come"):
        parse_train(["--config", str(tmp_path)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nseed: [1, 2\n", "line 3, column 1, is not valid YAML: while parsing a flow sequence, expected"),
        ("model: m\n\tseed: 1\n", "line 2, column 1, is not valid YAML: there is a tab; YAML is indented with spaces"),
        ("model: a: b\n", "line 1, column 9, is not valid YAML: mapping values are not allowed here"),
        ("seed: 1\nlr: 2\nnum_expert: 3\n", "line 2: there is no flag lr; here it is called learning_rate; line 3: "),
        ("seed: 1\nmodel: m\nseed: 2\n", "line 3: seed is there already, in line 1"),
        ("just text\n", "it is one value"),
        ("num_experts: [1, 2]\nlora_r: x\n", "line 1: num_experts takes one value; line 2: lora_r is 'x'; it must be"),
        ("datasets: [{path: cmake}]\n", "line 1: datasets takes words, separated by commas or as a list"),
        ("model: {name: m}\n", "line 1: model takes one value, and no mapping"),
        ("columns: {prompt: [a, b]}\n", "line 1: in columns prompt has a list; it must be one value"),
        ("--model: m\n", "line 1: --model is written without dashes in a recipe"),
        ("zq_zq: 1\n", "line 1: there is no flag zq_zq; --help lists the flags"),
        ("", "it is empty"),
    ],
)
def test_a_mistake_in_a_recipe_has_its_line_and_its_rule(tmp_path, text, message):
    with pytest.raises(UsageError) as raised:
        parse_train(recipe(tmp_path, text))
    assert message in str(raised.value)
    assert "recipe.yaml" in str(raised.value)


def test_no_item_of_a_list_becomes_a_flag(tmp_path):
    with pytest.raises(UsageError, match=r"--bf16"):
        parse_train(recipe(tmp_path, "datasets: [a, --bf16]\n"))


def test_every_shipped_recipe_is_read():
    for name in shipped_recipes():
        read = {"stream": parse_stream, "compare": parse_compare}.get(name, parse_train)
        assert read(["--config", name, "--output_dir", "out"]), name


def test_every_example_of_a_help_is_read(tmp_path, monkeypatch):
    """As it stands, from the folder of somebody who has trained runs/code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "code").mkdir(parents=True)
    (tmp_path / "runs" / "code" / CONFIG_FILE).write_text("{}")
    readers = {
        TRAIN_LINE: parse_train, STREAM_LINE: parse_stream, COMPARE_LINE: parse_compare, PLAN_LINE: parse_plan,
        EVAL_LINE: parse_eval, EXPORT_LINE: parse_export, SUBMIT_LINE: parse_submit,
    }  # fmt: skip
    for line, read in readers.items():
        assert line.examples
        for example in line.examples:
            assert example.startswith(f"{line.prog} ")
            read(shlex.split(example)[2:])


def test_dashes_are_no_second_spelling():
    """They were read, but not seen where the command line is looked at for what was typed."""
    with pytest.raises(UsageError, match="no flag --resume-from-checkpoint; did you mean --resume_from_checkpoint"):
        parse_train(["--resume-from-checkpoint", "nowhere"])
