"""Where each token goes: features, gate, routing, and the layout of tokens for the experts."""
