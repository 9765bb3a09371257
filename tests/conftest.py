"""Settings for all tests."""

import torch

# The matrices are small: a second thread costs more than it brings, above all on a busy machine.
torch.set_num_threads(1)
