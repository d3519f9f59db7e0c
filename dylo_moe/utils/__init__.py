"""What has nothing to do with models: files, processes, errors, words."""
