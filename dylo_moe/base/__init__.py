"""The frozen base model: how it is found, loaded, checked, and identified by its fingerprint."""
