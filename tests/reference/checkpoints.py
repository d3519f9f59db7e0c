"""A model that has lived a little, and its checkpoint."""

import torch
from reference.tiny import tiny_base, tiny_moe, tokens

from dylo_moe import DyLoRAMoE


def grown(base="llama", **router):
    """Experts of several ranks, one nascent, one frozen, one with a skill; trained a step, so buffers are not new."""
    model = tiny_moe(base, num_experts=2, top_k=2, balance_coefficient=0.07, **router)
    model.add_expert("wide", rank=7, skill="sql")
    model.add_expert("young", rank=1)
    model.mature("wide")
    model.freeze("expert_1")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for seed in range(2):
        ids = tokens(3, 9, seed=seed)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def load(folder, base=None):
    return DyLoRAMoE.from_pretrained(str(folder), tiny_base() if base is None else base)


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
