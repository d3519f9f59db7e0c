"""Which messages of other libraries are dropped, and that nothing else is."""

import logging
import os
import warnings

import pytest
from peft import LoraConfig, get_peft_model
from reference.tiny import tiny_base

import dylo_moe  # noqa: F401 (it installs the filter)
from dylo_moe.utils.errors import DyLoRAWarning
from dylo_moe.utils.other_libraries import only_our_lines, without_peft_deprecation


def test_of_bitsandbytes_one_line_is_dropped_and_its_other_warnings_stay(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'")
    logger.warning("something is wrong")
    assert [record.getMessage() for record in caplog.records] == ["something is wrong"]


def test_in_a_command_deprecations_are_dropped_and_warnings_stay():
    told = []
    with pytest.warns(UserWarning, match="the driver is too old") as seen, only_our_lines(told.append):
        warnings.warn("old name", FutureWarning, stacklevel=1)
        warnings.warn("the driver is too old", UserWarning, stacklevel=1)
    assert len(seen) == 1
    with warnings.catch_warnings(record=True) as others, only_our_lines(told.append):
        warnings.warn("dropout differs", DyLoRAWarning, stacklevel=1)
    assert told == ["dropout differs"]
    assert others == []


def test_a_command_on_gpt2_says_nothing_of_how_its_linears_are_stored():
    """Regression: `dylora train` on a GPT-2 base began with a warning of PEFT that no flag could answer."""
    lora = LoraConfig(r=2, target_modules="all-linear")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        get_peft_model(tiny_base("gpt2"), lora)
    with warnings.catch_warnings(record=True) as seen, only_our_lines(print):
        get_peft_model(tiny_base("gpt2"), lora)
    assert [str(item.message) for item in seen] == []


def test_a_command_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_HUB_VERBOSITY", "debug")
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    before = dict(os.environ)
    with only_our_lines(print):
        assert os.environ["HF_HUB_VERBOSITY"] == "debug"
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
        assert os.environ["WANDB_MODE"] != "offline"
    assert dict(os.environ) == before


def test_beside_a_command_only_the_one_deprecation_of_peft_is_dropped():
    with pytest.warns(FutureWarning) as seen, without_peft_deprecation():
        warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("`other` is deprecated", FutureWarning, stacklevel=1)
    assert [str(item.message) for item in seen] == ["`other` is deprecated"]
