"""Segmentation of 3-D medical scans from few labels, with a supervised contrastive loss per voxel."""

__version__ = "0.1.0"
