"""Networks from their definitions, their dense features, and a projection head."""

from medseg_supcon.networks.build import build_network, round_patch, size_divisor
from medseg_supcon.networks.definition import chain, definition_problem
from medseg_supcon.networks.features import ContrastiveNetwork, ProjectionHead, classifier_name
