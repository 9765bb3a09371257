"""Settings for all tests."""

import torch
from hypothesis import settings

# The matrices are small: a second thread costs more than it brings, above all on a busy machine.
torch.set_num_threads(1)

settings.register_profile("default", max_examples=150)
settings.register_profile("slow", max_examples=500)
settings.load_profile("default")
