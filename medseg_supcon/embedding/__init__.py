"""What a network makes of voxels: ``medseg embed``."""

from medseg_supcon.embedding._embed import embed_run
from medseg_supcon.embedding._voxels import voxel_features

__all__ = ["embed_run", "voxel_features"]
