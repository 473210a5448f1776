"""A data set becomes a run on disk: it is read and checked, planned and timed, and written as the bundle to train."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from monai.bundle import ConfigParser

from medseg_supcon.bundle import (
    TEMPLATE,
    check_network_trusted,
    drafted,
    dump_commented,
    find_run,
    load_commented,
    load_tensors,
    merge,
    parse_setting,
    read_recipe,
    record_run,
    refuse_others,
    set_key,
    settings_at_fault,
    shared_folder,
    write_metadata,
    write_model_card,
    write_network,
    write_twins,
)
from medseg_supcon.datasets import (
    VALIDATION,
    Case,
    Dataset,
    Report,
    Split,
    check_dataset,
    fingerprint,
    output_channels,
    read_case_names,
    read_dataset,
    read_unlabelled,
    split_cases,
    write_datalist,
)
from medseg_supcon.errors import ConfigError, DataError, RunError, nearest
from medseg_supcon.files import write_text
from medseg_supcon.networks import build_network, round_patch, size_divisor
from medseg_supcon.plan import default_epochs, literal, make_plan, read_plan, validate_plan, write_plan
from medseg_supcon.training.speed import batch_bytes, check_device, time_within_memory

PLAN_PREFIX, PLAN = "plan::", "The plan (configs/plan.json)"
OF_PLAN = ("network_def", "epochs", "steps_per_epoch", "batch_size")  # train.yaml takes these from the plan
FROM_INIT = ("channels", "orientation", "spacing", "intensity", "patch_size", "network_def")
NEW_SECTIONS = ("finalize",)  # that nothing refers to
GROWTHS = 8  # of a patch that is too small for the network
VALIDATIONS = 10  # in a training
Settings = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Request:
    """The options of ``medseg plan`` and ``medseg train``; None: not given."""

    recipe: str | None = None
    epochs: int | None = None
    minutes: float | None = None
    cases: str | Path | None = None
    labels: int | None = None
    validation: float | None = None
    unlabelled: str | Path | None = None
    init: str | Path | None = None
    seed: int | None = None
    settings: Sequence[str] | None = None
    allow_affine_mismatch: bool = False

    def options(self) -> list[str]:
        """The options that were given, as on the command line."""
        given = [name for name, value in vars(self).items() if not (value is None or value is False or value == [])]
        return ["--set" if name == "settings" else "--" + name.replace("_", "-") for name in given]


def prepare_dataset(
    path: str | Path, run: str | Path, request: Request, *, show: Callable[[Report], Any] = print,
    device: str | None = None, trust: bool = False,
) -> tuple[dict[str, Any], Split]:  # fmt: skip
    """Read, split and check the data set at ``path``, and `prepare_run` on it: the plan, and which cases train.

    ``show`` is called with the check's findings; `DataError` if there are errors.

    Example:
        >>> prepare_dataset("DATASET", "RUN", Request(epochs=20, settings=["learning_rate=1e-3"]))  # doctest: +SKIP
        >>> train_run("RUN")  # doctest: +SKIP
    """
    path, run, init = Path(path), Path(run), None if request.init is None else Path(request.init)
    recipe, seed = request.recipe or "joint", request.seed or 0
    read_recipe(recipe)
    refuse_others(run)
    settings = [parse_setting(text) for text in request.settings or ()]
    dataset, more = requested_cases(path, request)
    share = VALIDATION if request.validation is None else request.validation
    split = split_cases(dataset, labels=request.labels, seed=seed, validation_fraction=share)
    split = replace(split, unlabelled=(*split.unlabelled, *more))
    cases = (*split.training, *split.validation, *split.unlabelled)
    report = refuse_errors(
        dataset, cases, split.training, path, show, request.allow_affine_mismatch, request.unlabelled
    )
    plan = prepare_run(
        dataset, split, run, recipe=recipe, settings=settings, epochs=request.epochs, minutes=request.minutes, seed=seed,
        init=init, device=device, trust_scan_affine=request.allow_affine_mismatch, trust=trust, report=report
    )  # fmt: skip
    return plan, split


def requested_cases(path: Path, request: Request) -> tuple[Dataset, tuple[Case, ...]]:
    """The data set at ``path``, of ``--cases`` only these, and the scans of ``--unlabelled``."""
    dataset = read_dataset(path)
    if request.cases is not None:
        dataset = dataset.select(read_case_names(request.cases))
    return dataset, () if request.unlabelled is None else read_unlabelled(request.unlabelled, dataset)


def refuse_errors(
    dataset: Dataset, cases: Sequence[Case], trained: Sequence[Case], path: Path, show: Callable[[Report], Any],
    allow_affine_mismatch: bool = False, unlabelled: str | Path | None = None,
) -> Report:  # fmt: skip
    """Check the cases that are used (``trained``: by a training), each once; `DataError` after `show` if some have errors."""
    held_out = {case.name for case in cases} - {case.name for case in trained}
    used = replace(dataset, cases=tuple(dict.fromkeys(cases)), validation=frozenset(held_out))
    report = check_dataset(used, allow_affine_mismatch=allow_affine_mismatch)
    if report.findings:
        show(report)
    if report.has_errors:
        also = "" if unlabelled is None else f" (it does not read {unlabelled}; this command does)"
        raise DataError(f"The data set has errors (see above). Fix them, then run 'medseg check {path}' again{also}.")
    return report


def prepare_run(
    dataset: Dataset, split: Split, run: Path, *, recipe: str | Path = "joint", settings: Settings = (),
    epochs: int | None = None, minutes: float | None = None, seed: int = 0, init: Path | None = None,
    device: str | None = None, trust_scan_affine: bool = False, plan: Mapping[str, Any] | None = None,
    plan_settings: Settings = (), trust: bool = False, report: Report | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the bundle that would be trained, and return its plan; what was measured is in ``logs/expected.json``.

    `ConfigError` if a setting, recipe or plan is invalid; `RunError` if the folder is in use or contains a run or files
    that a run would replace, or ``init`` needs trust.

    `settings`: (key, value) overrides of ``train.yaml``, or of the plan: ``plan::key`` and ``network_def``. `minutes`: fit
    the length to them on this machine. `plan`: one that this function returned for the same cases, taken as it is but for
    ``plan_settings``; nothing is measured again. `init`: a run to fine-tune: its weights, and what they depend on in its
    plan; with code only if ``trust``. `report`: of `check_dataset` on these cases, which are then not read again.
    """
    refuse_others(run)
    init = None if init is None else find_run(init)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    recipe_plan, overlay = _sort_settings(list(read_recipe(recipe).items()))
    of_plan, of_config = _sort_settings(settings)
    chosen = dict((*recipe_plan, *of_plan))
    if minutes is not None and epochs is not None:
        raise ConfigError("Give --epochs or --minutes, not both.")
    if plan is not None:
        made = copy.deepcopy(dict(plan))
        for key, value in plan_settings:
            set_key(made, key, value, PLAN)
        if plan_settings:
            adapt_plan(made)
    else:
        known = report.fingerprints if report else None
        made = make_plan(fingerprint(dataset, [*split.training, *split.unlabelled], known=known), dataset, device=where)
        if trust_scan_affine:
            made["trust_scan_affine"] = True
        if init is not None:
            inherit(made, init, trust)
        for key, value in (*recipe_plan, *of_plan):
            set_key(made, key, value, PLAN)
        adapt_plan(made)
        if epochs or "epochs" not in chosen:
            made["epochs"] = epochs or default_epochs(where, made["steps_per_epoch"])
    with drafted(run) as draft:
        path = draft / "configs" / "plan.json"
        write_plan(made, path)
        write_datalist(split, draft / "configs" / "datalist.json", dataset.root)
        _write_train_config(draft, dataset.root, recipe, dict(overlay), of_config, seed, init)
        write_network(draft)
        if plan is None:
            with settings_at_fault():
                timing = time_within_memory(draft, device, made, fixed="batch_size" in chosen)
            expected = _fit_length(made, timing, len(split.validation), minutes)
            write_plan(made, path)
        config = ConfigParser()
        config.read_config(str(draft / "configs" / "train.yaml"))
        if "stage_epochs" in config:  # a recipe in stages may need more epochs: said before there is a run
            config["bundle_root"] = literal(str(draft))
            with settings_at_fault():
                config.get_parsed_content("stage_epochs")
        refresh_documents(draft)
        record_run(draft)
    if plan is None:
        write_text(run / "logs" / "expected.json", json.dumps(expected, indent=2) + "\n")
    return made


def _fit_length(plan: dict[str, Any], timing: Mapping[str, Any], cases: int, minutes: float | None) -> dict[str, Any]:
    """What a training of the plan's length takes; with ``minutes`` the plan first gets the epochs that fit."""
    epoch = plan["steps_per_epoch"] * timing["seconds_per_step"]
    validation = VALIDATIONS * cases * timing["seconds_per_validation_case"]
    if minutes is not None:
        fitting = (60 * minutes - validation) / epoch
        if not 1 <= fitting <= 10**6:
            raise ConfigError(
                f"--minutes {minutes:g} must be enough for 1 to 1,000,000 epochs. {plan['steps_per_epoch']} steps and "
                f"validation take about {(epoch + validation) / 60:.2g} minutes here. Change it, or use "
                "--set plan::steps_per_epoch=10."
            )
        plan["epochs"] = int(fitting)
        plan["minutes"] = int(minutes) if minutes == int(minutes) else minutes  # 5, not 5.0
    return {
        "minutes": round((plan["epochs"] * epoch + validation) / 60, 1),
        "seconds_per_step": round(timing["seconds_per_step"], 3),
        "memory_gib": timing["memory_gib"],
        "machine": timing["machine"],
        "precision": timing["precision"],
    }


def inherit(plan: dict[str, Any], init: Path, trust: bool = False) -> None:
    """Take from an earlier run what its weights depend on; code in its plan needs trust."""
    if not all((init / name).is_file() for name in ("configs/plan.json", "models/model.pt")):
        raise RunError(f"--init {init}: not a trained run (configs/plan.json and models/model.pt are needed).")
    earlier = read_plan(init / "configs" / "plan.json")
    check_network_trusted(init / "configs" / "plan.json", earlier, trust)
    if len(earlier["channels"]) != len(plan["channels"]):
        had, has = (", ".join(one["channels"]) for one in (earlier, plan))
        raise ConfigError(f"--init {init} has the channels {had}; this data set has {has}. Choose one with as many.")
    load_tensors(init / "models" / "model.pt")  # damaged weights are refused before there is a run
    plan.update({key: copy.deepcopy(earlier[key]) for key in FROM_INIT})
    outputs, network = output_channels(plan), plan["network_def"]
    if output_channels(earlier) != outputs:  # then `load_initial` leaves the last layer as it is
        if not isinstance(network, dict) or "out_channels" not in network:
            raise ConfigError(
                f"--init {init} has {output_channels(earlier)} outputs, this data set needs {outputs}, and there is no "
                '"out_channels" in its network_def to change. Choose a run with as many outputs.'
            )
        network["out_channels"] = outputs


def adapt_plan(plan: dict[str, Any]) -> None:
    """Adapt a plan's patch to its network: round it to what the network divides by, and enlarge one that is too small.

    At the network's deepest level a norm needs more than one voxel; otherwise the shortest axis grows.
    """
    validate_plan(plan)
    channels, outputs = len(plan["channels"]), output_channels(plan)
    # trusted: of --set or a recipe, or of a run that passed the gate
    network = build_network(plan["network_def"], in_channels=channels, num_classes=outputs, trust=True)
    divisor = size_divisor(network, in_channels=channels, definition=plan["network_def"])
    patch = [int(n) for n in round_patch(plan["patch_size"], divisor)]
    skeleton = network.to("meta").train()
    for _ in range(GROWTHS):
        try:
            skeleton(torch.empty(2, channels, *patch, device="meta"))
            break
        except ValueError:  # torch's "Expected more than 1 spatial element when training"
            axis = patch.index(min(patch))
            patch[axis] += max(divisor[axis], 8)
    plan["patch_size"] = patch
    size, free = (n / 2**30 for n in (batch_bytes(plan["batch_size"], plan), psutil.virtual_memory().available))
    if size > free:
        raise ConfigError(
            f"A step of batch_size = {plan['batch_size']} scans with patch_size = {patch} needs {size:.1f} GiB for its "
            f"views alone, but this machine has {free:.1f} GiB free. Choose a smaller batch_size or patch_size."
        )


def refresh_documents(run: Path) -> None:
    """Write what follows from the rest of the run: the network in the configs, JSON twins, metadata, model card."""
    write_network(run)
    write_twins(run)
    write_metadata(run)
    write_model_card(run)


def is_of_plan(key: str) -> bool:
    """A setting that belongs to the plan, not to train.yaml."""
    return key.startswith(PLAN_PREFIX) or key.split("::")[0] in OF_PLAN


def _sort_settings(settings: Settings) -> tuple[Settings, Settings]:
    of_plan = [(key.removeprefix(PLAN_PREFIX), value) for key, value in settings if is_of_plan(key)]
    return of_plan, [(key, value) for key, value in settings if not is_of_plan(key)]


def _write_train_config(
    run: Path, dataset_dir: Path, recipe: str | Path, overlay: Mapping[str, Any], settings: Settings, seed: int,
    init: Path | None,
) -> None:  # fmt: skip
    tree = load_commented(shared_folder("bundles") / TEMPLATE / "configs" / "train.yaml")
    folder = tree["dataset_dir"] = literal(str(dataset_dir.resolve()))
    tree["seed"], tree["recipe"] = seed, Path(recipe).stem
    if init is not None:
        tree["init_weights"] = literal(str((init / "models" / "model.pt").resolve()))
    known = set(tree)
    merge(tree, overlay, "train.yaml")
    text = dump_commented(tree)
    for key in tree:  # a recipe may add sections, but one that nothing refers to is a typing error
        if key not in known and key not in NEW_SECTIONS and not re.search(rf"@{re.escape(key)}\b", text):
            near = nearest(key, known)
            hint = f" Did you mean {near}?" if near else ""
            raise ConfigError(f"Recipe {recipe}: train.yaml has no key {key!r}, and nothing refers to it.{hint}")
    for key, value in settings:
        if key == "bundle_root":
            raise ConfigError("bundle_root is the run's own folder and cannot be set. Choose it with --out.")
        set_key(tree, key, value, "train.yaml")
    if not str(tree["device"]).startswith("$"):
        check_device(str(tree["device"]))
    (run / "configs" / "train.yaml").write_text(dump_commented(tree))
    evaluate = load_commented(run / "configs" / "evaluate.yaml")
    evaluate["dataset_dir"] = folder
    (run / "configs" / "evaluate.yaml").write_text(dump_commented(evaluate))
