"""The experiments of five papers, rerun at their scale: ``python -m bench.papers``."""
