"""U-Net helpers."""
