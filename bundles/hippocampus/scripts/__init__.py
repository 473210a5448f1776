"""What the configs of this bundle need beyond expressions; it imports MONAI, torch, nibabel and numpy, and scipy if the plan
has `smallest_mm3`, or `regions` and `keep_largest`."""
