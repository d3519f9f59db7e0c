"""`dylora export`: what other engines serve, and what that loses."""
