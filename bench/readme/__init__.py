"""The numbers of README and of the pages beside it, from the commands that make them."""
