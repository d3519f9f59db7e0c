"""`dylora eval`: problems, prompts, answers, and real processes that are killed and go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from reference.exams import NUM_TASKS, checkpoint_and_mirror, lines_of
from reference.paths import ROOT
from reference.texts import CHAT, PLAIN, write_rows
from reference.tiny import tiny_moe, tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dylo_moe.cli import main
from dylo_moe.commands.eval.request import parse_eval
from dylo_moe.data.encoding import encode_prompt, text_format
from dylo_moe.evaluation.answers import Decoding, StopAtText, answer_batch, batch_seed, continuation, row_end
from dylo_moe.evaluation.benchmark import Benchmark
from dylo_moe.evaluation.problems import Problem, called_names, load_examples, load_problems
from dylo_moe.evaluation.prompts import HUMANEVAL_STOPS, Asking, chat_code, cut, to_judge
from dylo_moe.evaluation.samples import Completion, SampleFile, VerdictFile
from dylo_moe.evaluation.sandbox.isolation import Limits
from dylo_moe.evaluation.sandbox.sandbox import Verdict, open_sandbox
from dylo_moe.utils.errors import UsageError

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
GREEDY = Decoding("greedy")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(checkpoint, mirror)."""
    return checkpoint_and_mirror(tmp_path_factory.mktemp("exams"))


@pytest.fixture(scope="module")
def humaneval():
    """The real one, from its package."""
    return load_problems("humaneval", None)


# --- problems and prompts


def test_humaneval_s_problems_are_those_of_its_package(humaneval):
    assert [problem.task_id for problem in humaneval] == [f"HumanEval/{number}" for number in range(164)]
    for problem in humaneval:
        space: dict = {}
        exec(problem.prompt + problem.solution + "\n" + problem.tests[0], space)  # the package's own code
        assert callable(space[problem.entry_point]) and callable(space["check"])
        assert Asking("humaneval", "completion").text(problem) == problem.prompt.rstrip()


def test_mbpp_is_asked_as_in_its_paper(places):
    problems, examples = load_problems("mbpp", str(places[1])), load_examples("mbpp", str(places[1]))
    assert [problem.task_id for problem in problems] == [f"Mbpp/{number}" for number in range(11, 11 + NUM_TASKS)]
    asking = Asking("mbpp", "completion", tuple(examples))
    shots = "".join(
        f"You are an expert Python programmer, and here is your task: Write a function to add {number}. Your code "
        f"should pass these tests:\n\nassert add_{number}(1) == {number + 1}\n"
        f"assert set([add_{number}(0)]) == {{{number}}}\n"
        f"[BEGIN]\ndef add_{number}(x):\n    return x + {number}\n[DONE]\n\n"
        for number in (2, 3, 4, 11)
    )
    assert asking.text(problems[0]) == shots[: shots.rindex("def add_11")]
    assert asking.program(problems[0], "x = 1\n[DONE]\n\nYou are [DONE]") == "x = 1\n"
    assert problems[0].names == ("add_11",)


def test_a_mirror_without_the_examples_is_refused(places, tmp_path):
    folder = tmp_path / "mbpp"
    shutil.copytree(places[1] / "mbpp", folder)
    prompt = folder / "full" / "prompt-00000-of-00001.parquet"
    prompt.write_bytes((folder / "full" / "test-00000-of-00001.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"has no Mbpp/2, Mbpp/3, Mbpp/4, which are shown"):
        load_examples("mbpp", str(tmp_path))
    prompt.unlink()
    with pytest.raises(ValueError, match="has no split prompt; it has"):
        load_examples("mbpp", str(tmp_path))


def test_a_chat_is_asked_with_the_ids_that_training_puts_before_an_answer(humaneval):
    asking, form = Asking("humaneval", "chat"), text_format(CHAT)
    assert asking.ids(humaneval[:1], CHAT)[0] == encode_prompt(form, asking.text(humaneval[0]))
    assert humaneval[0].prompt.rstrip() in asking.text(humaneval[0])
    with pytest.raises(ValueError, match=r"prompt is chat, but the tokenizer of .* has no chat template"):
        asking.ids(humaneval[:1], PLAIN)


BLOCK = "```python\n{}\n```"
ADD = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (f"Sure:\n{BLOCK.format(ADD)}\nIt adds.", ADD),
        (f"First\n{BLOCK.format('import math')}\nthen\n{BLOCK.format(ADD)}\nand\n{BLOCK.format('add(1, 2)')}", ADD),
        (f"```\n{ADD}\n```", ADD),
        (f"``` python\n{ADD}", ADD),  # cut off at the bound on new tokens
        (f"{BLOCK.format('x = 1')}\n{BLOCK.format('y = 2')}", "y = 2"),
        (f"Here it is.\n\n{ADD}\n\nThis adds two numbers.", ADD + "\n"),
        ("import math\n" + ADD, "import math\n" + ADD),
        ("I cannot do that.", ""),
    ],
)
def test_the_code_of_a_chat_s_answer(answer, code):
    assert chat_code(answer, ["add"]) == code


def test_a_chat_s_program_has_what_the_prompt_has_before_the_function(humaneval):
    asking, problem = Asking("humaneval", "chat"), humaneval[32]  # whose prompt defines poly, too
    whole = f"def {problem.entry_point}(xs):\n    return poly(xs, 0)"
    program = asking.program(problem, BLOCK.format(whole))
    assert program.startswith("import math") and "def poly" in program and program.endswith(whole)
    assert program.count(f"def {problem.entry_point}") == 1
    body = asking.program(problem, BLOCK.format("return 0"))
    assert body == problem.prompt + "    return 0\n"


@pytest.mark.parametrize("style", ["completion", "chat"])
@needs_bubblewrap
def test_reference_solutions_pass_however_they_are_answered(humaneval, places, style):
    """HumanEval/32, /38 and /50 are judged with helpers from their prompts."""
    sandbox = open_sandbox("bubblewrap", Limits(timeout_seconds=20))
    asked = [(problem, Asking("humaneval", style)) for problem in (humaneval[i] for i in (0, 32, 38, 50))]
    asked += [(problem, Asking("mbpp", style)) for problem in load_problems("mbpp", str(places[1]))[:2]]
    for problem, asking in asked:
        answer = ("\n" if problem.entry_point else "") + problem.solution
        if style == "chat":
            whole = problem.prompt + problem.solution if problem.entry_point else problem.solution
            answer = f"So:\n```python\n{whole}\n```\nDone."
        assert sandbox.judge(to_judge(problem, asking.program(problem, answer))) == Verdict(True, "passed")
        wrong = answer.replace("return", "return None #")
        assert not sandbox.judge(to_judge(problem, asking.program(problem, wrong))).passed


@needs_bubblewrap
def test_mbpp_s_tests_find_what_the_program_defines():
    """Task 367's kind, whose tests build on a class of the program, and task 126's, whose function is called `sum`."""
    sandbox = open_sandbox("bubblewrap", Limits(timeout_seconds=20))
    tree = "class Node:\n    def __init__(self, x): self.x, self.left = x, None\n"
    tree += "def depth(root): return 0 if root is None else 1 + depth(root.left)"
    setup = "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)"
    for problem in (
        Problem("Mbpp/1", "depth of a tree", ("assert depth(root) == 3",), None, setup, tree),
        Problem(
            "Mbpp/2", "least divisors", ("assert sum(10, 15) == 25",), None, "", "def sum(a, b):\n    return a + b"
        ),
    ):
        assert sandbox.judge(to_judge(problem, problem.solution)) == Verdict(True, "passed")
        assert not sandbox.judge(to_judge(problem, problem.solution.replace("+", "-"))).passed


def test_called_names_leaves_builtins_out():
    assert called_names("assert set(near((1, 2), f(3))) == set((4, 5))") == ("near", "f")
    assert called_names("assert (") == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("    return 1\n\ndef f", "    return 1\n"), ("    if x:\n", "    if x:\n"), ("\n#", ""), ("a\nprint\ndef", "a")],
)
def test_a_completion_ends_before_the_first_stop(text, expected):
    assert cut(text, HUMANEVAL_STOPS) == expected


# --- answers


def test_the_newest_tokens_tell_a_stop_as_soon_as_the_whole_text_does():
    """Tokens of one byte and of several, a stop that spans tokens, and one within a token."""
    stops = ["\ndef", "[DONE]", "the"]
    bits = ["\nde", "f", "[DON", "E]", "th", "e", "é", "x", "\n", "\n\n\n", "d", "ef", "]]"]
    ids = [CHAT(bit, add_special_tokens=False)["input_ids"] for bit in bits]
    picks = torch.randint(len(bits), (200, 30), generator=torch.Generator().manual_seed(1)).tolist()
    found = 0
    for row in picks:
        new = [token for pick in row for token in ids[pick]]
        prompt = CHAT("\ndef [DONE]", add_special_tokens=False)["input_ids"]
        criterion = StopAtText(CHAT, stops, prompt_length=len(prompt))
        for length in range(1, len(new) + 1):
            text = CHAT.decode(new[:length], clean_up_tokenization_spaces=False)
            done = bool(criterion(torch.tensor([prompt + new[:length]]), None))
            assert done == any(stop in text for stop in stops), text
            if done:
                found += 1
                assert criterion.done_at == [length] and row_end(new[:length], [-1], length) == (length, "stop")
                break
    assert 50 < found < 150  # both, with and without a stop, many times


@pytest.mark.parametrize(
    ("new", "done_at", "expected"),
    [
        ([5, 6, 7], None, (3, "length")),
        ([5, 2, 0], None, (2, "end")),
        ([5, 6, 2], 2, (2, "stop")),
        ([5, 2, 2], 3, (2, "end")),
    ],
)
def test_what_of_a_row_is_its_own(new, done_at, expected):
    assert row_end(new, [2], done_at) == expected


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama's first: a space is part of the word after it, and the first one of a text is not written."""
    words = ["<unk>", "</s>", "▁▁▁▁return", "▁x", "▁def", "▁"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def test_a_continuation_keeps_the_space_it_begins_with():
    tokenizer = spaced_tokenizer()
    assert tokenizer.decode([3]) == "x"
    assert continuation(tokenizer, [4], [3]) == " x"
    assert continuation(tokenizer, [4], [2, 3]) == "    return x"


def test_a_batch_is_greedy_and_says_which_expert_wrote_what():
    """Against one forward a token, without a cache, each row alone."""
    model = tiny_moe("llama")
    rows = [tokens(9, seed=1).tolist(), tokens(4, seed=2).tolist(), tokens(6, seed=3).tolist()]
    state = torch.get_rng_state()
    answers = answer_batch(model, PLAIN, rows, decoding=GREEDY, stops=[], end_ids=[96], max_new_tokens=12, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    used = set()
    for row, answer in zip(rows, answers, strict=True):
        ids, writers = torch.tensor([row]), []
        while ids.shape[1] < len(row) + 12 and (ids.shape[1] == len(row) or ids[0, -1] != 96):
            out = model(input_ids=ids)
            writers.append(out.routing.names[int(out.routing.weights[0, -1].argmax())])
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
        new = ids[0, len(row) :].tolist()
        assert answer.tokens == len(new) and answer.finish == ("end" if new[-1] == 96 else "length")
        assert answer.text == PLAIN.decode([token for token in new if token != 96])
        expected = {name: writers.count(name) / len(writers) for name in set(writers)}
        assert answer.experts == pytest.approx(expected, abs=1e-4)
        used |= expected.keys()
    assert len(used) > 1  # else the shares were never put to the test


def test_one_expert_for_all_and_the_base_are_named():
    model, rows = tiny_moe("llama"), [tokens(5, seed=1).tolist()]
    options = {"decoding": GREEDY, "stops": [], "end_ids": [96], "max_new_tokens": 4, "seed": 0}
    for expert, name in (("expert_1", "expert_1"), (None, "base")):
        with model.route_to(expert):
            assert answer_batch(model, PLAIN, rows, **options)[0].experts == {name: 1.0}


def test_samples_follow_from_the_seed_and_a_tiny_nucleus_is_greedy():
    model, rows = tiny_moe("llama").train(), [tokens(5, seed=1).tolist(), tokens(7, seed=2).tolist()]
    options = {"stops": [], "end_ids": [96], "max_new_tokens": 10}

    def texts(decoding, seed):
        torch.rand(3)  # whatever was drawn before
        return [answer.text for answer in answer_batch(model, PLAIN, rows, decoding=decoding, seed=seed, **options)]

    sampled = Decoding("sampled", 2, temperature=1.5, top_p=1.0)
    assert texts(sampled, batch_seed(1, 0)) == texts(sampled, batch_seed(1, 0)) != texts(sampled, batch_seed(1, 1))
    assert texts(Decoding("sampled", 2, temperature=1.0, top_p=1e-6), 5) == texts(GREEDY, 0)
    assert model.training


# --- files


def a_sample(number: int, solution: str = "x") -> Completion:
    return Completion(f"t/{number // 2}", number % 2, "c", solution, 3, "end", {"a": 1.0}, 3, 0.5)


KEYS = [(f"t/{number // 2}", number % 2) for number in range(7)]


@pytest.mark.parametrize("whole", range(8))
def test_only_whole_batches_are_kept_and_what_was_torn_is_counted(tmp_path, whole):
    path = tmp_path / "x.jsonl"
    file = SampleFile(path, KEYS, batch_size=3)
    for number in range(whole):
        file.append([a_sample(number)])
    before = path.read_bytes() if path.exists() else b""
    with open(path, "ab") as opened:
        opened.write(b'{"task_id": "t/')
    again = SampleFile(path, KEYS, batch_size=3)
    kept = whole if whole == 7 else whole - whole % 3
    assert again.samples == [a_sample(number) for number in range(kept)]
    assert again.num_dropped == 1 + whole - kept
    assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:kept])
    starts = [start for start in (0, 3, 6) if start >= kept]
    assert again.batches == [(start // 3, KEYS[start : start + 3]) for start in starts]


def test_samples_of_another_run_are_refused(tmp_path):
    SampleFile(tmp_path / "x.jsonl", KEYS, batch_size=3).append([a_sample(0), a_sample(1)])
    with pytest.raises(ValueError, match="holds samples of another run"):
        SampleFile(tmp_path / "x.jsonl", KEYS[1:], batch_size=3)


def test_a_verdict_counts_for_the_program_that_it_was_about(tmp_path):
    path = tmp_path / "v.jsonl"
    VerdictFile(path).append(a_sample(0), Verdict(True, "passed"))
    with open(path, "ab") as opened:
        opened.write(b'{"task_id"')
    again = VerdictFile(path)
    assert again.num_dropped == 1 and again.of(a_sample(0)) == Verdict(True, "passed")
    assert again.of(a_sample(1)) is None and again.of(a_sample(0, "another")) is None
    again.append(a_sample(1), Verdict(False, "timed out"))
    assert VerdictFile(path).of(a_sample(1)) == Verdict(False, "timed out")


def test_an_outcome_is_counted_by_hand():
    problems = [Problem(f"t/{number}", "", (), "f", "", "") for number in range(2)]
    benchmark = Benchmark(
        problems, Asking("humaneval", "completion"), Decoding("sampled", 2), batch_size=3, max_new_tokens=5, seed=0
    )
    samples = [
        Completion("t/0", 0, "", "", 10, "stop", {"a": 1.0}, 10, 1.0),
        Completion("t/0", 1, "", "", 30, "length", {"a": 0.5, "b": 0.5}, 30, 1.0),
        Completion("t/1", 0, "", "", 5, "end", {"b": 1.0}, 30, 2.0),
        Completion("t/1", 1, "", "", 5, "end", {"b": 1.0}, 30, 1.0),
    ]
    verdicts = [Verdict(True, "passed"), *[Verdict(False, "timed out")] * 2, Verdict(False, "failed: x")]
    found = benchmark.outcome(list(zip(samples, verdicts, strict=True)), [1, 2]).as_json()
    assert (found["pass@1"], found["pass@2"], found["num_tasks"]) == (0.25, 0.5, 2)
    counts = {"samples": 4, "passed": 1, "failed": 1, "timed out": 2, "stop": 1, "end": 2, "length": 1}
    assert found["counts"] == counts
    assert found["experts"] == {"a": 0.5, "b": 0.5}
    assert (found["tokens_per_second"], found["row_steps_per_second"]) == (10.0, 20.0)


# --- the command


def words(places, output: Path, *more: str) -> list[str]:
    checkpoint, mirror = places
    return [
        *("eval", str(checkpoint), "--data_dir", str(mirror), "--output_dir", str(output)),
        *("--batch_size", "4", "--max_new_tokens", "24", "--timeout_seconds", "20", *more),
    ]


CODE = ("--allow_code_execution", "--tasks")


@needs_bubblewrap
def test_what_it_says_and_keeps(places, tmp_path, capsys):
    """Tasks of our own: every second one of HumanEval must pass, whatever is written; of MBPP none."""
    assert main(words(places, tmp_path / "out", *CODE, "humaneval,mbpp", "--export", "evalplus")) == 0
    said = "".join(capsys.readouterr())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    greedy = results["humaneval"]["greedy"]
    assert greedy["pass@1"] == 3 / 5 and greedy["counts"]["passed"] == 3 and greedy["num_tasks"] == NUM_TASKS
    assert results["mbpp"]["greedy"]["pass@1"] == 0
    assert sum(greedy["experts"].values()) == pytest.approx(1, abs=1e-3) and len(greedy["experts"]) == 2
    samples = lines_of(tmp_path / "out" / "humaneval-greedy.jsonl")
    for shown in (
        "prompt (completion)",
        "program that is judged",
        repr("\nclass"),
        samples[0]["completion"].split()[0],
    ):
        assert shown in said
    assert "HumanEval greedy: 5/5 answers, pass@1 0.600 of 5 judged" in said
    assert "MBPP+ also has tasks of MBPP's other splits" in said.replace("\n", " ")
    exported = lines_of(tmp_path / "out" / "humaneval-greedy-evalplus.jsonl")
    assert exported == [{"task_id": line["task_id"], "solution": line["solution"]} for line in samples]
    assert lines_of(tmp_path / "out" / "mbpp-greedy-evalplus.jsonl")[0]["task_id"] == "Mbpp/11"
    verdicts = {
        line["task_id"]: line["passed"] for line in lines_of(tmp_path / "out" / "humaneval-greedy-verdicts.jsonl")
    }
    assert verdicts == {f"HumanEval/{number}": number % 2 == 0 for number in range(NUM_TASKS)}


@needs_bubblewrap
def test_a_killed_process_goes_on_to_the_same_samples(places, tmp_path):
    """SIGKILL in the midst of the samples, and lines that were cut off by it."""
    more = (*CODE, "humaneval", "--num_samples", "20", "--k", "1,5", "--batch_size", "4")

    def start(output):
        command = [sys.executable, "-m", "dylo_moe.cli", *words(places, output, *more)]
        with open(tmp_path / "said", "ab") as said:
            return subprocess.Popen(
                command, stdout=said, stderr=said, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
            )

    assert start(tmp_path / "whole").wait(timeout=300) == 0, (tmp_path / "said").read_text()
    process, sampled = start(tmp_path / "killed"), tmp_path / "killed" / "humaneval-sampled.jsonl"
    while process.poll() is None and not (sampled.exists() and sampled.read_bytes().count(b"\n") >= 8):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    there = sampled.read_bytes().count(b"\n")
    assert there < 100  # else it was not killed in the midst
    for path in (sampled, sampled.with_name("humaneval-sampled-verdicts.jsonl")):
        with open(path, "ab") as file:
            file.write(b'{"task_id": "HumanEval/')
    assert start(tmp_path / "killed").wait(timeout=300) == 0, (tmp_path / "said").read_text()
    said = (tmp_path / "said").read_text()
    assert "resuming: 5 of 5 answers" in said and f"resuming: {there} of 100 answers" in said
    assert "1 answer was cut off when the last run was killed" in said and "1 verdict was cut off" in said
    for name in ("humaneval-greedy.jsonl", "humaneval-sampled.jsonl"):
        assert lines_of(tmp_path / "killed" / name) == lines_of(tmp_path / "whole" / name)
    for name in ("humaneval-greedy-verdicts.jsonl", "humaneval-sampled-verdicts.jsonl"):
        ours, theirs = (lines_of(tmp_path / run / name) for run in ("killed", "whole"))
        assert sorted(map(repr, ours)) == sorted(map(repr, theirs)) and len(ours) == (5 if "greedy" in name else 100)
    ours, theirs = (
        json.loads((tmp_path / run / "results.json").read_text())["humaneval"]["sampled"] for run in ("killed", "whole")
    )
    assert (ours["pass@1"], ours["pass@5"], ours["counts"]) == (theirs["pass@1"], theirs["pass@5"], theirs["counts"])
    assert ours["pass@1"] == pytest.approx(0.6)


@needs_bubblewrap
def test_other_settings_do_not_mix_with_what_is_there(places, tmp_path, capsys):
    assert main(words(places, tmp_path / "out", *CODE, "humaneval", "--limit", "2")) == 0
    assert main(words(places, tmp_path / "out", *CODE, "humaneval", "--limit", "3", "--expert", "base")) == 2
    said = capsys.readouterr().err
    assert "expert is 'base', was None" in said and "limit is 3, was 2" in said and "new --output_dir" in said
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert main(words(places, tmp_path / "mine", *CODE, "humaneval")) == 2
    assert "is not empty, and holds no evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tasks", "humaneval"), "--allow_code_execution to let each of them run"),
        (("--tasks", "mbpp,losses"), "mbpp runs programs that the model writes"),
        ((*CODE, "humanevil"), "tasks is humanevil; it must be some of losses, humaneval, mbpp"),
        (("--tasks", "losses", "--num_samples", "3"), "--num_samples would change nothing: tasks is losses"),
        ((*CODE, "humaneval", "--top_p", "0.9"), "--top_p would change nothing: num_samples is 0"),
        ((*CODE, "humaneval", "--datasets", "mbpp"), "--datasets would change nothing"),
        ((*CODE, "humaneval", "--num_samples", "5", "--k", "1,10"), "k is 10; it must be 1 to num_samples, which is 5"),
        (
            (*CODE, "humaneval", "--limit", "0", "--batch_size", "0"),
            "limit is 0; it must be a whole number of at least 1; batch_size is 0",
        ),
        (
            (*CODE, "humaneval", "--num_samples", "2", "--temperature", "0"),
            "temperature is 0.0; it must be a finite number above 0",
        ),
        (
            ("--seed", "-1", "--eval_subset", "nan"),
            "seed is -1; it must be a whole number of at least 0 and below 4,294,967,296; eval_subset is nan",
        ),
        ((*CODE, "humaneval", "--export", "y"), "export is 'y'; it must be evalplus, or be left out"),
        ((*CODE, "humaneval", "--timeout_seconds", "-1"), "timeout_seconds is -1.0"),
        ((*CODE, "humaneval", "--num_sample", "2"), "there is no flag --num_sample; did you mean --num_samples?"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(flags, said):
    with pytest.raises(UsageError) as error:
        parse_eval(["there/is/no/such/checkpoint", *flags])
    assert said in str(error.value)


def test_pass_at_k_is_of_what_num_samples_allows():
    def k(*flags):
        return parse_eval(["x", *CODE, "humaneval", *flags]).options.sampled_k

    assert k("--num_samples", "9") == [1] and k("--num_samples", "10") == [1, 10]
    assert k("--num_samples", "200") == [1, 10, 100] and k("--num_samples", "9", "--k", "5,1") == [1, 5]


def test_an_expert_that_is_not_there_is_refused(places, tmp_path, capsys):
    assert main(words(places, tmp_path / "out", *CODE, "humaneval", "--expert", "nobody")) == 2
    assert "expert is 'nobody'; the checkpoint has expert_0, expert_1" in capsys.readouterr().err
    assert main(words(places, tmp_path / "out", *CODE, "humaneval", "--expert", "nobody", "--limit", "0")) == 2
    assert re.search("limit is 0; .*; expert is 'nobody'", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_refused_evaluation_binds_no_later_one(places, tmp_path, capsys, monkeypatch):
    """Data that is not there is told before anything is written, and settings with which nothing was measured do not
    count: those of answers that failed, beside losses that did not."""
    folder, text = tmp_path / "out", write_rows(tmp_path / "mine.jsonl", [{"text": f"w{i} w1"} for i in range(40)])
    losses = ["eval", str(places[0]), "--output_dir", str(folder), "--batch_size", "4", "--datasets"]
    assert main([*losses, "nope"]) == 2
    assert "unknown dataset 'nope'" in capsys.readouterr().err and not folder.exists()
    monkeypatch.setattr("dylo_moe.commands.eval.run.run_exam", lambda *args: 1 / 0)
    both = words(places, folder, *CODE, "losses,humaneval", "--sandbox", "rlimits_only", "--datasets", text)
    assert main([*both, "--limit", "2"]) == 1
    monkeypatch.setattr("dylo_moe.commands.eval.run.run_exam", lambda *args: None)
    assert main([*both, "--limit", "1"]) == 0
    assert json.loads((folder / "settings.json").read_text())["losses"]["datasets"] == [text]
    capsys.readouterr()
    assert main([*losses, text, "--eval_subset", "50"]) == 2
    assert "eval_subset is 50.0, was None" in capsys.readouterr().err
