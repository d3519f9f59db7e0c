"""Generated programs run in isolation, and a judge that they cannot reach."""
