"""Names of the entries that this package adds to the state of a tagged parameter."""

__all__ = ["COORDINATES", "MASTER", "OWN", "START", "STEP"]

# The number of steps, the single-precision master copy of a half-precision parameter, the rows that
# start the next sketch, and the name of the coordinates of the base's state.
STEP, MASTER, START = "retraction_step", "master", "sketch_directions"
COORDINATES = "coordinates"
OWN = {STEP, MASTER, START, COORDINATES}
