"""The frozen base model: found, loaded, checked, and recognised by its fingerprint."""
