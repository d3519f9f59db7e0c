"""From named datasets to training batches: read, format, encode, split, mix, pack."""
