"""What `pytest --nbval` gives the kernels: sample data and the quick budget, whatever this machine has."""

import os

os.environ |= {
    "UNET_DATA": "sample",
    "UNET_BUDGET": "quick",
    "HF_HUB_OFFLINE": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
}
os.environ.pop("MPLBACKEND", None)  # kernels draw into the notebook; with Agg they would show nothing
if "PYTEST_XDIST_WORKER" in os.environ:  # kernels side by side, each on all cores, would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
