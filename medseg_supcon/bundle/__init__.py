"""The run folder as a MONAI bundle: configs, recipes, trust, model, documents, export."""

from medseg_supcon.bundle.documents import write_metadata, write_model_card, write_network, write_twins
from medseg_supcon.bundle.export import export_model, self_contained
from medseg_supcon.bundle.folder import (
    DRAFT,
    FOLDS,
    TEMPLATE,
    at_work_in,
    cases_of,
    drafted,
    find_run,
    has_folds,
    is_planned,
    is_started,
    member_runs,
    read_config,
    refuse_others,
    shared_folder,
    shipped_runs,
)
from medseg_supcon.bundle.model import Model, inference_of_cases, load_model, load_tensors, scan_preprocessing
from medseg_supcon.bundle.settings import (
    describe_recipe,
    dump_commented,
    innermost,
    load_commented,
    merge,
    parse_setting,
    read_recipe,
    read_yaml_file,
    recipe_names,
    set_key,
    settings_at_fault,
)
from medseg_supcon.bundle.trust import check_configs_trusted, check_network_trusted, code_in, plain_text, record_run
