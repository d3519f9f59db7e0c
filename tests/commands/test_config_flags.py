"""A knob is declared once: the fields of the config classes are the flags."""

from dataclasses import fields

import pytest

from dylo_moe import RouterConfig
from dylo_moe.commands.stream.arguments import STREAM_CONFIGS
from dylo_moe.commands.stream.request import build_stream_parser
from dylo_moe.commands.train.arguments import TRAIN_CONFIGS
from dylo_moe.commands.train.request import build_train_parser, parse_train, settings_of
from dylo_moe.experts.config import ExpertConfig
from dylo_moe.parsing.flags import config_from, flags_of, values_of
from dylo_moe.parsing.recipe import as_words, in_full
from dylo_moe.routing.config import GrowingRouterConfig


@pytest.mark.parametrize(
    ("parser", "kinds"), [(build_train_parser(), TRAIN_CONFIGS), (build_stream_parser(), STREAM_CONFIGS)]
)
def test_the_parser_has_each_field_with_its_default(parser, kinds):
    defaults = vars(parser.parse_args([]))
    assert parser.kinds[:-1] == kinds
    for kind in kinds:
        chosen = {item.name for item in flags_of(kind).values() if item.default is None}  # by the config, from others
        expected = values_of(kind())
        assert {name: defaults[name] for name in expected} == {
            name: None if flags_of(kind)[name].name in chosen else value for name, value in expected.items()
        }
        assert config_from(kind, expected) == kind() == config_from(kind, {name: defaults[name] for name in expected})


def test_each_field_of_the_router_is_a_flag_but_for_the_temperature():
    names = {item.name: flag for flag, item in flags_of(RouterConfig).items()}
    assert {item.name for item in fields(RouterConfig)} - names.keys() == {"temperature", "change_rate", "turns"}
    growing = {item.name: flag for flag, item in flags_of(GrowingRouterConfig).items()}
    assert growing == names | {"change_rate": "router_change_rate"}  # which a gate that is trained does not have
    assert {name: flag for name, flag in names.items() if flag != name} == {
        "policy": "router_policy",
        "top_p": "router_top_p",  # as dylora eval samples with --top_p
    }
    assert "--policy" not in build_train_parser()._option_string_actions


@pytest.mark.parametrize(
    ("typed", "value", "saved"),
    [("7", 7, "7"), ("0.50", 0.5, "0.5"), ("final", "final", "final"), ("embeddings", "embeddings", "embeddings")],
)
def test_where_the_router_reads_is_text_in_a_recipe_and_a_value_in_the_config(typed, value, saved):
    words = ["--router_layer", typed, "--granularity", "sequence", "--datasets", "cmake"]
    arguments = parse_train(words)
    assert arguments.router == RouterConfig(router_layer=value, granularity="sequence")
    settings = settings_of(arguments)
    assert settings["router_layer"] == saved
    assert settings_of(parse_train(as_words(settings))) == settings
    assert in_full({**settings, "router_layer": typed}, TRAIN_CONFIGS) == in_full(settings, TRAIN_CONFIGS)


def test_the_problems_of_all_configs_come_in_one_message():
    words = [
        "--lora_r",
        "0",
        "--num_experts",
        "0",
        "--top_k",
        "0",
        "--router_half_life",
        "-1",
        "--loss_chunk_size",
        "-1",
    ]
    with pytest.raises(ValueError) as caught:
        parse_train([*words, "--max_seq_length", "1"])
    for name in ("loss_chunk_size", "lora_r", "num_experts", "top_k", "router_half_life", "max_seq_length"):
        assert f"{name} is " in str(caught.value)


def test_names_of_linears_may_be_separated_by_commas():
    assert ExpertConfig(lora_targets=["q_proj,v_proj", "o_proj"]).lora_targets == ["q_proj", "v_proj", "o_proj"]
    with pytest.raises(ValueError, match="lora_targets is 'q_proj'; it must be a list"):
        ExpertConfig(lora_targets="q_proj")
