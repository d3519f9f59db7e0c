"""Laws of packing: nothing is lost, texts do not see each other, and what is learned is the same."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.texts import PLAIN, numbered, write_rows
from reference.tiny import FAMILIES, assert_same_gradients, gradients, padded, tiny_base, tiny_moe, tokens
from transformers import AttentionInterface, TrainingArguments

from dylo_moe.data import packing as packing_module
from dylo_moe.data.collator import Collator
from dylo_moe.data.config import DataConfig
from dylo_moe.data.loading import load_data
from dylo_moe.data.packing import PackedTexts, check_texts_kept_apart, pack_lengths, padding_share
from dylo_moe.training.trainer import DyLoRATrainer


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 64), max_size=80), window=st.sampled_from([7, 1000]))
def test_every_text_is_in_one_row_and_no_row_is_over_full(lengths, window):
    packing_module.WINDOW = window
    try:
        rows = pack_lengths(np.array(lengths, np.int32), 64)
    finally:
        packing_module.WINDOW = 100_000
    assert sorted(place for row in rows for place in row.tolist()) == list(range(len(lengths)))
    totals = [sum(lengths[place] for place in row) for row in rows]
    assert all(0 < total <= 64 for total in totals)
    if window == 1000:  # best fit never leaves two rows that would fit into one
        assert sum(sorted(totals)[:2]) > 64 or len(totals) < 2
        assert [min(row) for row in rows] == sorted(min(row) for row in rows)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_rows_are_those_of_a_naive_best_fit(lengths):
    rows: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fitting = [row for row in rows if sum(lengths[i] for i in row) + lengths[place] <= 30]
        if fitting:
            max(fitting, key=lambda row: sum(lengths[i] for i in row)).append(place)
        else:
            rows.append([place])
    found = pack_lengths(np.array(lengths, np.int32), 30)

    def fills(rows):
        return sorted(sum(lengths[i] for i in row) for row in rows)

    assert fills(found) == fills(rows)


def test_a_text_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a text of 65 tokens does not fit into a row of 64"):
        pack_lengths(np.array([3, 65]), 64)


@pytest.fixture
def data(tmp_path):
    asked = numbered(tmp_path / "asked.jsonl", 40, "cube")
    plain = write_rows(tmp_path / "plain.jsonl", [{"text": f"the {i} " * (1 + i % 5)} for i in range(40)])
    return load_data(DataConfig(datasets=[asked, plain], max_seq_length=64), PLAIN)


def test_a_packed_row_is_its_texts_behind_one_another(data):
    packed = PackedTexts(data.train, 64)
    texts = {tuple(row["input_ids"]): row for row in data.train}
    seen = []
    for row in packed:
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0] + [
            len(row["input_ids"])
        ]
        for start, stop in itertools.pairwise(starts):
            text = texts[tuple(row["input_ids"][start:stop])]
            seen.append(tuple(text["input_ids"]))
            assert row["labels"][start:stop] == [-100, *text["labels"][1:]]
            assert row["position_ids"][start:stop] == list(range(stop - start))
            assert set(row["domain"][start:stop]) == {text["domain"]}
    assert sorted(seen) == sorted(texts)
    assert len(packed) < len(texts) and packed.fill == sum(map(len, texts)) / (64 * len(packed))


def test_the_share_of_padding_is_that_of_the_batches():
    lengths = np.array([5, 30, 12, 3, 21, 8, 17, 40, 9])
    shuffled = np.random.default_rng(0).permutation(lengths).tolist()
    batches = [padded([torch.zeros(n) for n in shuffled[i : i + 4]], side="right")[1] for i in range(0, 9, 4)]
    real = sum(float(mask.sum()) for mask in batches)
    assert padding_share(lengths, 4) == pytest.approx(1 - real / sum(mask.numel() for mask in batches))


# Padded batches of packed rows


def packed_batch():
    """Two rows of two and three texts, of different length, with labels but on each text's first token."""
    rows = [[tokens(n, seed=n) for n in lengths] for lengths in ((7, 5), (4, 9, 6))]
    ids, mask = padded([torch.cat(row) for row in rows], side="right")
    positions = padded([torch.cat([torch.arange(len(text)) for text in row]) for row in rows], side="right")[0]
    labels = ids.masked_fill((mask == 0) | (positions == 0), -100)
    return rows, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_packed_texts_are_each_text_alone(laws, family, attention):
    """Reported: with a mask beside the positions, Transformers lets packed texts see each other."""
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("Gemma 2 has no sdpa attention")
    rows, batch = packed_batch()
    model = tiny_moe(tiny_base(family, attn_implementation=attention), top_k=2, balance_coefficient=1.0)
    out = model(**batch)
    law = "padded packed texts are each text alone"
    summed, count = 0.0, 0
    for row, texts in enumerate(rows):
        start = 0
        for text in texts:
            alone = model(input_ids=text[None], labels=text[None])
            stop = start + len(text)
            laws.close(law, out.logits[row, start:stop], alone.logits[0], family=family, atol=1e-5)
            laws.close(law, out.routing.weights[row, start:stop], alone.routing.weights[0], family=family, atol=1e-5)
            summed, count, start = summed + alone.lm_loss * (len(text) - 1), count + len(text) - 1, stop
        assert not out.routing.weights[row, start:].any()
    laws.close(law, out.lm_loss, summed / count, family=family, atol=1e-5)


@pytest.mark.parametrize("router", [{"router_layer": 1}, {"router_layer": "final"}, {"granularity": "sequence"}])
def test_padded_packed_texts_are_routed_alone_wherever_the_router_reads(laws, router):
    rows, batch = packed_batch()
    model = tiny_moe("llama", **router)
    out = model(**batch)
    for row, texts in enumerate(rows):
        start = 0
        for text in texts:
            labels = text.clone()[None]
            alone = model(input_ids=text[None], labels=labels).routing.weights[0]
            weights = out.routing.weights[row, start : start + len(text)]
            laws.close("padded packed texts are each text alone", weights, alone, atol=1e-5)
            start += len(text)


def test_padding_of_packed_rows_changes_neither_loss_nor_gradient():
    _, batch = packed_batch()
    wider = {
        name: torch.nn.functional.pad(value, (0, 5), value=-100 if name == "labels" else 0)
        for name, value in batch.items()
    }
    losses, grads = [], []
    for inputs in (batch, wider):
        model = tiny_moe("llama", balance_coefficient=1.0, z_loss_coefficient=0.1, entropy_coefficient=0.1).train()
        grads.append(gradients(model, lambda: losses.append(model(**inputs).loss) or losses[-1].backward()))  # noqa: B023
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-6)
    assert_same_gradients(grads[1], grads[0], relative=1e-5)


# Training


@pytest.mark.parametrize("router", [{}, {"granularity": "sequence"}], ids=["token", "sequence"])
def test_packed_training_is_unpacked_training(tmp_path, data, router):
    """One step over all texts, through the Trainer: the same losses, overall and per dataset, and the same weights."""
    ends, logs = [], []
    options = {"balance_coefficient": 1.0, "z_loss_coefficient": 0.1, "entropy_coefficient": 0.1, **router}
    for rows in (data.train, PackedTexts(data.train, 64)):
        model = tiny_moe(tiny_base("llama", vocab_size=len(PLAIN)), **options)
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=10, gradient_accumulation_steps=-(-len(rows) // 10), max_steps=1,
            learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, use_cpu=True,
            remove_unused_columns=False, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        trainer = DyLoRATrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=Collator(PLAIN), domains=data.names
        )
        trainer.train()
        ends.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        logs.append(next(log for log in trainer.state.log_history if "lm_loss" in log))
    assert_same_gradients(ends[1], ends[0], relative=2e-5)
    for key in ("loss", "lm_loss", "balance_loss", "loss_asked", "loss_plain", "token_entropy", "share_asked_expert_1"):
        assert logs[1][key] == pytest.approx(logs[0][key], rel=2e-4), key


# Where texts cannot be kept apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_texts_apart_when_routed_and_not_with_a_mask_alone(family, dtype):
    """The plain base is given the same mask, with which Transformers does not separate texts."""
    base = tiny_base(family, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)  # so that attention matters, as in a trained model
    with pytest.raises(ValueError, match=r"with attention 'eager', \w+ lets texts in one row see each other"):
        check_texts_kept_apart(base, base)
    routed = tiny_moe(base)
    check_texts_kept_apart(routed, routed.base)


def test_an_attention_that_mixes_texts_is_refused():
    """One without a mask function of its own: Transformers then makes no mask at all."""

    def careless(module, query, key, value, attention_mask, **kwargs):
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("careless", careless)
    base = tiny_base("llama", attn_implementation="careless")
    with pytest.raises(
        ValueError, match="with attention 'careless', LlamaForCausalLM lets texts in one row see each other"
    ):
        check_texts_kept_apart(base, base)


def test_a_recurrent_model_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    class WithoutPositions(MambaForCausalLM):
        def forward(self, *args, position_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    base = WithoutPositions(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(ValueError, match="WithoutPositions lets texts in one row see each other"):
        check_texts_kept_apart(base, base)
