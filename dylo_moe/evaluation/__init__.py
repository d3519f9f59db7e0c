"""How good a model is: held-out losses with intervals, and pass@k of generated programs."""
