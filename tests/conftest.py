"""Makes the helper modules beside the tests importable and keeps the runs reproducible."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # the networks are so small that a second thread only adds waiting
