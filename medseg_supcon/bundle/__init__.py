"""The run folder as a MONAI bundle: configs, recipes, trust, model, documents, export."""

from medseg_supcon.bundle.configs import (
    cases_of,
    innermost,
    is_code,
    leaves,
    plain_text,
    read_config,
    read_yaml,
    read_yaml_file,
    settings_at_fault,
)
from medseg_supcon.bundle.documents import write_metadata, write_model_card, write_network, write_twins
from medseg_supcon.bundle.export import export_model, self_contained
from medseg_supcon.bundle.folder import (
    TEMPLATE,
    at_work_in,
    drafted,
    is_planned,
    is_started,
    refuse_others,
    shared_folder,
)
from medseg_supcon.bundle.metadata import SCHEMA, metadata_of, scores, value_range
from medseg_supcon.bundle.model import (
    Model,
    inference_of_cases,
    load_model,
    load_tensors,
    scan_preprocessing,
)
from medseg_supcon.bundle.settings import (
    describe_recipe,
    dump_commented,
    load_commented,
    merge,
    parse_setting,
    read_recipe,
    recipe_names,
    set_key,
)
from medseg_supcon.bundle.trust import (
    check_configs_trusted,
    check_network_trusted,
    check_plan_trusted,
    is_plain_run,
    record_run,
)
