"""The pool of LoRA experts and the routed linear layers that apply them."""
