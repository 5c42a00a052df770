"""What `pytest --nbval` gives the kernels: sample data and the quick budget, whatever this machine has."""

import os

os.environ |= {
    "UNET_DATA": "sample",
    "UNET_BUDGET": "quick",
    "HF_HUB_OFFLINE": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
}
os.environ.pop("MPLBACKEND", None)  # kernels draw into the notebook; with Agg they would show nothing
