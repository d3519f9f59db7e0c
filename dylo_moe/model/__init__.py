"""DyLoRAMoE: a frozen base, a pool of experts and a router in one PeftModel; its forward, loss and checkpoints."""
