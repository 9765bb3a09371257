"""Entries: what the state of a tagged parameter holds beside that of the base."""

__all__ = ["COORDINATES", "MASTER", "OWN", "START", "STEP"]

# The steps taken, the point in single precision that a half is the rounding of, the rows that
# start the next sketch, and the name of the coordinates that the base's state is in.
STEP, MASTER, START = "retraction_step", "master", "sketch_directions"
COORDINATES = "coordinates"
OWN = {STEP, MASTER, START, COORDINATES}
