"""Costs measured on accelerators."""

import subprocess
import sys

import pytest
import torch

from gpipe.testing import accelerators

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator, and this machine has none"),
    pytest.mark.skipif(accelerators.started(), reason="simulated in test_simulated_profile.py"),
]

MODELS = """
import torch
from torch import nn
from gpipe.partitioning.profile import profile

device = torch.accelerator.current_accelerator()
first, second = profile(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), torch.ones(8, 256), device=device)
print(abs(first.workspace_bytes - second.workspace_bytes))
"""


# The first product of a thread takes a workspace that the library keeps, and the first cell was charged with it.
def test_the_first_cell_is_not_charged_with_workspaces_of_libraries():
    ran = subprocess.run([sys.executable, "-c", MODELS], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 2**20
