"""Networks from their definitions, their dense features, and a projection head."""

from medseg_supcon.networks.build import build_network, chain, definition_problem, round_patch, size_divisor
from medseg_supcon.networks.features import ContrastiveNetwork, ProjectionHead, classifier_name
