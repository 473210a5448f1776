"""What the configs of this bundle need beyond expressions; MONAI, nibabel and numpy are all it imports."""
