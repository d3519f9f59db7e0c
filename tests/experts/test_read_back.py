"""Every matrix of an expert is read back: PEFT's loader leaves out in silence what Transformers renames."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel

from dylo_moe import DyLoRAMoE

pytestmark = pytest.mark.skipif(not hasattr(transformers, "LagunaForCausalLM"), reason="Transformers has no Laguna yet")
SHARED = "mlp.shared_experts.down_proj"
CONFIG = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["full_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}


def laguna():
    torch.manual_seed(0)
    return transformers.LagunaForCausalLM(transformers.LagunaConfig(**CONFIG)).eval()


def test_linears_that_peft_would_not_find_again_are_left_out_and_refused_where_they_are_named():
    base = laguna()
    model = DyLoRAMoE.from_base(laguna(), num_experts=2)
    assert not any(SHARED in name for name, _ in model.named_parameters() if ".lora_" in name)
    with pytest.raises(ValueError, match=f"{SHARED}.*renames"):
        DyLoRAMoE.from_base(base, num_experts=2, lora=LoraConfig(target_modules=["shared_experts.down_proj"]))


def test_the_others_come_back_here_and_in_stock_peft(tmp_path):
    """Reported: a saved expert came back without its matrices of some linears, here and in stock PEFT."""
    model = DyLoRAMoE.from_base(laguna(), num_experts=2, lora=LoraConfig(r=4))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(str(tmp_path))
    ids = torch.arange(3, 15)[None]
    stock = PeftModel.from_pretrained(laguna(), str(tmp_path / "experts" / "expert_1")).eval()
    for ours in (model, DyLoRAMoE.from_pretrained(str(tmp_path), base=laguna()).eval()):
        with ours.route_to("expert_1"), torch.no_grad():
            torch.testing.assert_close(ours(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
