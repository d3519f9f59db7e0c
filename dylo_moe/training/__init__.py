"""The Hugging Face Trainer for routed models: runs, checkpoints, resumption, metrics, several processes."""
