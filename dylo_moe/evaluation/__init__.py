"""The evaluation of a model: held-out losses with intervals, and pass@k of generated programs."""
