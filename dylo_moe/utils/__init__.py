"""Helpers that have nothing to do with models: files, processes, errors, words."""
