"""Names in the folders of runs that several layers know; this module imports nothing."""

MANIFEST = "dylora.json"
"""The file by which a checkpoint is known: it lists all others, with their hashes."""

RESULT = "checkpoint"
"""The folder of the final checkpoint in the folder of a run, a stream or a stage of a stream."""
