"""Laws of cached decoding: it equals recomputing the whole text at every step, token for token."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from reference.decoding import NEW, assert_varied, generate, positions, prompts, uncached, used_per_step
from reference.tiny import FAMILIES, padded, tiny_base, tiny_moe, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, pipeline
from transformers.utils import logging


@pytest.mark.parametrize("router_layer", ["embeddings", 1])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_recomputing_the_whole_text(family, top_k, router_layer):
    model = tiny_moe(family, top_k=top_k, router_layer=router_layer)
    ids, mask = prompts()
    expected, logits = uncached(model, ids, mask)
    out = generate(model, ids, mask)
    assert torch.equal(out.sequences, expected)
    torch.testing.assert_close(torch.stack(out.logits, 1), logits, rtol=1e-4, atol=1e-4)
    assert_varied(out.routing)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_sampling_equals_recomputing_the_whole_text(family, seed):
    model = tiny_moe(family, top_k=2)
    ids, mask = prompts()
    torch.manual_seed(seed)
    expected, _ = uncached(model, ids, mask, sample=True)
    torch.manual_seed(seed)
    assert torch.equal(generate(model, ids, mask, do_sample=True, top_k=0).sequences, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=str,
)
def test_beams_and_several_answers_equal_the_same_without_a_cache(family, options):
    model = tiny_moe(family, top_k=2)
    ids, mask = prompts()
    results = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        results.append(generate(model, ids, mask, use_cache=use_cache, **options))
    assert torch.equal(results[0].sequences, results[1].sequences)
    routing = results[0].routing
    rows = options.get("num_return_sequences", 1)
    assert routing.weights.shape[:2] == results[0].sequences.shape == (3 * rows, ids.shape[1] + NEW)
    repeated = torch.cat([mask.repeat_interleave(rows, 0), torch.ones(3 * rows, NEW, dtype=mask.dtype)], 1)
    expected = model.route(results[0].sequences, repeated, position_ids=positions(repeated))
    torch.testing.assert_close(routing.weights, expected.weights)


@pytest.mark.parametrize("mode", ["gate", "forced", "nascent"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_reported_routing_is_what_every_cached_step_used(family, mode):
    model = tiny_moe(family, top_k=2)
    model.experts[1].mature = mode != "nascent"
    ids, mask = prompts()
    forced = model.route_to(["expert_2", None, "expert_0"]) if mode == "forced" else nullcontext()
    with used_per_step(model) as seen, forced:
        out = generate(model, ids, mask)
    assert [step.weights.shape[1] for step in seen[:NEW]] == [ids.shape[1]] + [1] * (NEW - 1)
    used = torch.cat([step.weights for step in seen[:NEW]], 1)
    torch.testing.assert_close(out.routing.weights[:, :-1], used, rtol=1e-4, atol=1e-4)
    assert out.routing.names == seen[0].names
    assert not out.routing.weights[:, : ids.shape[1]][mask == 0].any()


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_way_of_decoding_gives_the_same_tokens(family, options):
    """Reported: a static cache that the router's memory was appended to was no longer masked as one."""
    model = tiny_moe(family, top_k=2)
    ids = tokens(1 if "prompt_lookup_num_tokens" in options else 3, 9)
    expected, _ = uncached(model, ids, torch.ones_like(ids))
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, **options), expected)


def test_after_a_row_has_ended_its_tokens_are_not_routed():
    model = tiny_moe("llama")
    ids, mask = prompts()
    sequence, _ = uncached(model, ids, mask)
    end = int(sequence[0, ids.shape[1] + 2])
    expected, _ = uncached(model, ids, mask, end=end)
    out = generate(model, ids, mask, eos_token_id=end, pad_token_id=0)
    assert torch.equal(out.sequences, expected)
    new = out.sequences[:, ids.shape[1] :]
    for row in range(3):
        ended = (new[row] == end).nonzero()
        last = int(ended[0]) if len(ended) else new.shape[1] - 1
        assert out.routing.mask[row, ids.shape[1] :].tolist() == [t <= last for t in range(new.shape[1])]


def test_padding_is_inferred_from_its_token_as_transformers_does():
    model = tiny_moe("llama")
    ids, mask = prompts()
    told, inferred = generate(model, ids, mask), generate(model, ids, None)
    assert torch.equal(told.sequences, inferred.sequences)
    assert torch.equal(told.routing.weights, inferred.routing.weights)
    positional = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(positional, told.sequences)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_a_list_of_experts_is_each_row_with_its_own(options):
    model = tiny_moe("llama")
    ids, mask = prompts()
    experts = ["expert_2", None, "expert_0"]
    with model.route_to(experts):
        torch.testing.assert_close(
            model(input_ids=ids, attention_mask=mask).logits,
            torch.cat([alone(model, expert, ids[i : i + 1], mask[i : i + 1]) for i, expert in enumerate(experts)]),
        )
        together = generate(model, ids, mask, **options)
    if "do_sample" in options:
        with model.route_to([expert for expert in experts for _ in range(2)]):
            logits = model(input_ids=together.sequences, attention_mask=together.routing.mask.long()).logits
        torch.testing.assert_close(logits[:, -2].float(), together.logits[-1], rtol=1e-4, atol=1e-4)
        return
    for index, expert in enumerate(experts):
        with model.route_to(expert):
            single = generate(model, ids[index : index + 1], mask[index : index + 1], **options)
        assert torch.equal(single.sequences[0], together.sequences[index])


def alone(model, expert, ids, mask):
    with model.route_to(expert):
        return model(input_ids=ids, attention_mask=mask).logits


def test_route_to_nests_and_is_restored_after_an_exception():
    model, ids = tiny_moe("llama"), tokens(2, 8)
    free = model(input_ids=ids).logits
    one, other = alone(model, "expert_0", ids, None), alone(model, "expert_1", ids, None)
    assert not torch.allclose(one, other, atol=1e-2) and not torch.allclose(one, free, atol=1e-2)
    with model.route_to("expert_0"):
        with model.route_to("expert_1"), pytest.raises(ZeroDivisionError), model.route_to(None):
            raise ZeroDivisionError
        assert torch.equal(model(input_ids=ids).logits, one)
        with model.route_to("expert_1"):
            assert torch.equal(model(input_ids=ids).logits, other)
            with model.disable_adapter():
                assert not torch.allclose(model(input_ids=ids).logits, other, atol=1e-2)
        with pytest.raises(ValueError, match="nobody"), model.route_to("nobody"):
            pass
        assert torch.equal(model(input_ids=ids).logits, one)
    assert torch.equal(model(input_ids=ids).logits, free)


@pytest.mark.parametrize("call", ["forward", "generate", "beams"])
@pytest.mark.parametrize("experts", [[], ["expert_0"], ["expert_0"] * 2, ["expert_0"] * 3, ["expert_0"] * 8], ids=len)
def test_a_list_of_the_wrong_length_is_refused_with_both_numbers(call, experts):
    """Reported: in generate, a list that divides the batch was spread over it."""
    model, ids = tiny_moe("llama"), tokens(4, 5)
    with pytest.raises(ValueError, match=rf"given {len(experts)} experts? .* 4"), model.route_to(experts):
        if call == "forward":
            model(input_ids=ids)
        else:
            model.generate(input_ids=ids, max_new_tokens=2, num_beams=2 if call == "beams" else 1)
    assert model(input_ids=ids).routing.logits is not None


@pytest.mark.parametrize("experts", ["nobody", ["expert_0", "nobody"], [None, "nobody"]], ids=str)
def test_an_unknown_expert_is_refused_by_name(experts):
    model = tiny_moe("llama")
    with pytest.raises(ValueError, match=r"'nobody'.*expert_0, expert_1, expert_2"), model.route_to(experts):
        raise AssertionError("not reached")


# --- the cache by hand


@pytest.mark.parametrize("borders", [[5], [1, 2, 3], [4, 11], list(range(1, 12))], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_split_of_a_text_over_a_cache_changes_nothing(family, borders):
    model, (ids, mask) = tiny_moe(family), padded([tokens(12, seed=1), tokens(7, seed=2)], side="left")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole, cache, parts = model(input_ids=ids, attention_mask=mask, position_ids=positions), None, []
    for start, stop in itertools.pairwise([0, *borders, 12]):
        out = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        parts.append(out)
    real = mask.bool()
    weights = torch.cat([part.routing.weights for part in parts], 1)
    torch.testing.assert_close(weights[real], whole.routing.weights[real], rtol=1e-4, atol=1e-4)
    logits = torch.cat([part.logits for part in parts], 1)
    torch.testing.assert_close(logits[real], whole.logits[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_switching_experts_while_a_cache_grows_keeps_the_memory_right(family):
    """The router's memory continues while `route_to` decides, so that the gate can take over again."""
    model, ids = tiny_moe(family), tokens(2, 12)
    with model.route_to("expert_1"):
        cache = model(input_ids=ids[:, :7], use_cache=True).past_key_values
    out = model(input_ids=ids[:, 7:], past_key_values=cache)
    torch.testing.assert_close(out.routing.weights, model.route(ids).weights[:, 7:], rtol=1e-4, atol=1e-4)


def test_a_cache_that_the_router_did_not_see_from_its_start_is_refused():
    model, ids = tiny_moe("llama"), tokens(1, 6)
    foreign = tiny_base("llama")(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 6 tokens, but the router has seen 0"):
        model(input_ids=ids, past_key_values=foreign)
    ours = model(input_ids=ids, use_cache=True).past_key_values
    ours.reset()
    fresh = model(input_ids=ids, use_cache=True)
    torch.testing.assert_close(model(input_ids=ids, past_key_values=ours).logits, fresh.logits)


@pytest.mark.parametrize("router_layer", ["embeddings", 1])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_a_cache_without_config_works_for_a_router_at_any_layer(family, router_layer):
    """Its layers do not say that they slide, also where the base's attention does."""
    model, ids = tiny_moe(family, router_layer=router_layer), tokens(1, 9)
    cache, expected = DynamicCache(), model(input_ids=ids)
    for start, stop in ((0, 4), (4, 6), (6, 9)):
        out = model(input_ids=ids[:, start:stop], past_key_values=cache)
        torch.testing.assert_close(out.logits, expected.logits[:, start:stop], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.routing.weights, expected.routing.weights[:, start:stop])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_memory_follows_rows_that_are_repeated_selected_and_reordered(family):
    model, ids = tiny_moe(family), tokens(3, 12)
    for change, rows in (
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ):
        cache = model(input_ids=ids[:, :7], use_cache=True).past_key_values
        change(cache)
        out, expected = model(input_ids=ids[rows, 7:], past_key_values=cache), model(input_ids=ids[rows])
        torch.testing.assert_close(out.logits, expected.logits[:, 7:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.routing.weights, expected.routing.weights[:, 7:], rtol=1e-4, atol=1e-4)


def test_a_copied_cache_goes_its_own_way():
    model, ids = tiny_moe("llama"), tokens(1, 9)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    branch = copy.deepcopy(cache)
    model(input_ids=tokens(1, 3, seed=9), past_key_values=branch)
    out = model(input_ids=ids[:, 5:], past_key_values=cache)
    torch.testing.assert_close(out.logits, model(input_ids=ids).logits[:, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "gemma2", "qwen2"])
def test_a_base_whose_layers_all_slide_decodes_as_without_a_cache(family):
    """Reported: Transformers took the router's memory for the first layer with full attention."""
    sliding = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 6}
    model = tiny_moe(tiny_base(family, **sliding, **({"use_sliding_window": True} if family == "qwen2" else {})))
    ids, mask = prompts()
    expected, _ = uncached(model, ids, mask)
    assert torch.equal(generate(model, ids, mask).sequences, expected)


def test_a_pipeline_generates_what_the_model_does_and_says_nothing(caplog):
    """Reported: a line of 4,000 characters said that the model is not supported."""
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0", unk_token="w0")
    model = tiny_moe("llama")
    logging.enable_propagation()
    try:
        made = pipeline("text-generation", model=model, tokenizer=tokenizer)(
            "w5 w6 w7", max_new_tokens=4, do_sample=False
        )
    finally:
        logging.disable_propagation()
    ids = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert made[0]["generated_text"] == "w5 w6 w7" + tokenizer.decode(ids[0, 3:])
    assert "not supported" not in caplog.text
