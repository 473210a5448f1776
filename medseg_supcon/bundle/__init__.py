"""The run folder as a MONAI bundle: configs, recipes, trust, model, documents, export."""

from medseg_supcon.bundle.configs import innermost, settings_at_fault
from medseg_supcon.bundle.documents import write_metadata, write_model_card, write_network, write_twins
from medseg_supcon.bundle.export import export_model, self_contained
from medseg_supcon.bundle.folder import TEMPLATE, at_work_in, drafted, is_planned, is_started, refuse_others
from medseg_supcon.bundle.metadata import SCHEMA, metadata_of, read_config, scores, value_range
from medseg_supcon.bundle.model import Model, load_model, scan_preprocessing
from medseg_supcon.bundle.plain import is_code, leaves, plain_text, read_plain
from medseg_supcon.bundle.recipes import describe_recipe, read_recipe, recipe_names, shared_folder
from medseg_supcon.bundle.settings import (
    dump_commented,
    load_commented,
    merge,
    parse_setting,
    read_yaml,
    read_yaml_file,
    set_key,
)
from medseg_supcon.bundle.tensors import load_tensors
from medseg_supcon.bundle.trust import (
    check_configs_trusted,
    check_network_trusted,
    check_plan_trusted,
    is_plain_run,
    record_run,
)
