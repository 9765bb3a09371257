"""Entries: what the state of a tagged parameter holds beside that of the base."""

__all__ = ["MASTER", "START", "STEP"]

STEP, MASTER, START = "retraction_step", "master", "sketch_directions"
