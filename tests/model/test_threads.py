"""Laws of one model that several threads run at once, as a server does."""

import copy
import pickle
import threading

import pytest
import torch
from reference.decoding import generate, prompts
from reference.tiny import gradients, tiny_moe, tokens
from reference.turns import answering, chat

ASKED = ["expert_0", "expert_1", "expert_2", None, "the router", ["expert_2", None, "expert_0"]]


def in_threads(works):
    """The results of several functions, each called in a thread of its own, at once."""
    found, start = {}, threading.Barrier(len(works))

    def run(index, work):
        start.wait()
        try:
            found[index] = work()
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in found.values() if isinstance(result, BaseException)]
    assert not errors, errors
    return [found[index] for index in range(len(works))]


def asking(model, asked, call):
    """A call inside `route_to`, or of the router."""

    def work():
        if asked == "the router":
            return call()
        with model.route_to(asked):
            return call()

    return work


def test_each_thread_has_the_routing_that_it_asks_for(laws):
    """Reported: two threads with different route_to got silently wrong logits in 101 of 400 calls."""
    model, ids = tiny_moe(), tokens(3, 9)

    @torch.no_grad()
    def forwards():
        return torch.stack([model(input_ids=ids).logits for _ in range(25)])

    alone = [asking(model, asked, forwards)() for asked in ASKED]
    assert len({tuple(logits.flatten().tolist()) for logits in alone}) == len(ASKED)
    for ours, theirs in zip(in_threads([asking(model, asked, forwards) for asked in ASKED]), alone, strict=True):
        laws.equal("a thread's logits = alone", ours, theirs)
    laws.equal("after the threads = before", forwards(), alone[ASKED.index("the router")])


@pytest.mark.parametrize("kind", ["token", "sequence", "response"])
def test_threads_generate_at_once(laws, kind):
    if kind == "response":
        model, ids = answering(), torch.stack([chat(5, 2, 4, 0, seed=row, closed=False) for row in range(3)])
        mask = torch.ones_like(ids)
    else:
        model, (ids, mask) = tiny_moe(granularity=kind), prompts()
    works = [asking(model, asked, lambda: generate(model, ids, mask).sequences) for asked in ASKED]
    alone = [work() for work in works]
    for ours, theirs in zip(in_threads(works), alone, strict=True):
        laws.equal("a thread's answer = alone", ours, theirs)


def test_gradients_of_threads_add_up_to_those_of_one(laws):
    model, batches = tiny_moe().train(), [tokens(2, 8, seed=seed) for seed in range(4)]
    model.gradient_checkpointing_enable()

    def backward(ids):
        return lambda: model(input_ids=ids, labels=ids).lm_loss.backward()

    expected = gradients(model, lambda: [backward(ids)() for ids in batches])
    found = gradients(model, lambda: in_threads([backward(ids) for ids in batches]))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        laws.close("gradients of threads = of one", found[name], gradient, atol=1e-5)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_asks_for_nothing_of_the_original(way):
    model, ids = tiny_moe(), tokens(2, 6)
    with model.route_to("expert_1"):
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert other(input_ids=ids).routing.logits is not None
        assert model(input_ids=ids).routing.logits is None
