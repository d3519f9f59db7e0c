"""The routing of each token: features, gate, routing, and the layout of tokens for the experts."""
