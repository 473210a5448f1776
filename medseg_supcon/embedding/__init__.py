"""Features of a run's voxels, and how well classes separate in them: ``medseg embed``."""

from medseg_supcon.embedding.embed import AFTER, BEFORE, embed_run, heads_of, networks_of, voxel_features
from medseg_supcon.embedding.separation import class_separation, principal_components, scatter_figure, t_sne
