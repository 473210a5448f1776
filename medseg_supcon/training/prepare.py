"""A run on disk: the bundle that is trained, written from the template, the plan and the recipe."""

from __future__ import annotations

import copy
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
    check_configs_trusted,
    check_network_trusted,
    drafted,
    dump_commented,
    load_commented,
    load_tensors,
    merge,
    parse_setting,
    plain_text,
    read_config,
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
    load_items,
    read_case_names,
    read_datalist,
    read_dataset,
    read_unlabelled,
    split_cases,
    write_datalist,
)
from medseg_supcon.errors import ConfigError, DataError, RunError, nearest
from medseg_supcon.networks import build_network, round_patch, size_divisor
from medseg_supcon.plan import literal, make_plan, read_plan, validate_plan, write_plan
from medseg_supcon.training.speed import (
    batch_bytes,
    check_device,
    default_minutes,
    epochs_within,
    time_within_memory,
)

FROM_INIT = ("channels", "orientation", "spacing", "intensity", "patch_size", "network_def")
GROWTHS = 8  # of a patch that is too small for the network


def inherit(plan: dict[str, Any], init: Path, trust: bool = False) -> None:
    """Take from an earlier run what its weights depend on; code in its plan needs trust."""
    if not all((init / name).is_file() for name in ("configs/plan.json", "models/model.pt")):
        raise RunError(f"--init {init}: not a trained run (configs/plan.json and models/model.pt are needed).")
    earlier = read_plan(init / "configs" / "plan.json")
    check_network_trusted(init / "configs" / "plan.json", earlier, trust)
    if len(earlier["channels"]) != len(plan["channels"]):
        raise ConfigError(
            f"--init {init} was trained on {len(earlier['channels'])} channel(s) per scan, this data set has "
            f"{len(plan['channels'])}. Choose a run with the same channels."
        )
    if len(earlier["labels"]) != len(plan["labels"]):
        raise ConfigError(
            f"--init {init} knows {len(earlier['labels'])} classes ({', '.join(earlier['labels'])}), this data set has "
            f"{len(plan['labels'])}. Fine-tune on a data set with the same classes."
        )
    load_tensors(init / "models" / "model.pt")  # damaged weights are refused before there is a run
    plan.update({key: earlier[key] for key in FROM_INIT})


def adapt_plan(plan: dict[str, Any]) -> None:
    """Adapt a plan's patch to its network: round it to what the network divides by, and enlarge one that is too small.

    At the network's deepest level a norm needs more than one voxel; otherwise the shortest axis grows.

    Raises:
        ConfigError: the plan is invalid, or one step's scans do not fit into this machine's memory.
    """
    validate_plan(plan)
    channels = len(plan["channels"])
    network = build_network(
        plan["network_def"], in_channels=channels, num_classes=len(plan["labels"]), trust=True
    )  # of --set or a recipe, or of a run that passed the gate
    divisor = size_divisor(network, in_channels=channels)
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
            f"A step of batch_size = {plan['batch_size']} scans with patch_size = {patch} takes {size:.1f} GiB for its "
            f"views alone, and this machine has {free:.1f} GiB free. Choose a smaller batch_size or patch_size."
        )


PLAN_PREFIX = "plan::"
OF_PLAN = ("network_def", "epochs", "steps_per_epoch", "batch_size")  # train.yaml takes these from the plan
NEW_SECTIONS = ("finalize",)  # that nothing refers to


def prepare_run(
    dataset: Dataset,
    split: Split,
    run: Path,
    *,
    recipe: str | Path = "joint",
    settings: Sequence[tuple[str, Any]] = (),
    epochs: int | None = None,
    seed: int = 0,
    init: Path | None = None,
    device: str | None = None,
    minutes: float | None = None,
    trust_scan_affine: bool = False,
    plan: Mapping[str, Any] | None = None,
    plan_settings: Sequence[tuple[str, Any]] = (),
    trust: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Write the bundle that would be trained, and measure how long that would take.

    Args:
        dataset: what was read.
        split: training, validation and unlabelled cases.
        run: folder to write; must not hold a run.
        recipe: name or file of the overlay on ``train.yaml``.
        settings: (key, value) overrides of ``train.yaml``, or of the plan: ``plan::key`` and ``network_def``.
        epochs: length of training; by default as many as fit in ``minutes``.
        init: an earlier run to fine-tune: its weights, and the parts of its plan that they depend on.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; by default a GPU if there is one.
        minutes: time that training may take; default: :func:`default_minutes`.
        trust_scan_affine: label maps take their scan's affine (``--allow-affine-mismatch``).
        plan: one that this function returned for the same cases, taken as it is; nothing is measured again.
        plan_settings: (key, value) changes of that plan.
        trust: take a network from ``init`` that is code.
        report: of `check_dataset` on these cases: what it has read is not read again.

    Returns:
        the plan, as written.

    Raises:
        ConfigError: a setting, recipe or plan is invalid.
        RunError: the folder holds a run or files that a run would replace, another command uses it, or ``init`` needs
            trust.
    """
    refuse_others(run)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    recipe_plan, overlay = _sort_settings(list(read_recipe(recipe).items()))
    of_plan, of_config = _sort_settings(settings)
    if plan is not None:
        made = copy.deepcopy(dict(plan))
        for key, value in plan_settings:
            set_key(made, key, value, "The plan (configs/plan.json)")
        if plan_settings:
            adapt_plan(made)
    else:
        cases = [*split.training, *split.unlabelled]
        made = make_plan(
            fingerprint(dataset, cases, known=report.fingerprints if report else None),
            dataset,
            device=str(where),
        )
        if trust_scan_affine:
            made["trust_scan_affine"] = True
        if init is not None:
            inherit(made, init, trust)
        for key, value in (*recipe_plan, *of_plan):
            set_key(made, key, value, "The plan (configs/plan.json)")
        chosen = dict([*recipe_plan, *of_plan])
        epochs = epochs or chosen.get("epochs")
        adapt_plan(made)
    budget = minutes if minutes is not None else default_minutes(where)
    with drafted(run) as draft:
        write_plan(made, draft / "configs" / "plan.json")
        write_datalist(split, draft / "configs" / "datalist.json", dataset.root)
        _write_train_config(draft, dataset.root, recipe, dict(overlay), of_config, seed, init)
        write_network(draft)
        if plan is None:
            with settings_at_fault():
                timing = time_within_memory(draft, device, made, fixed="batch_size" in chosen)
            made["epochs"] = epochs or epochs_within(budget, made, timing, len(split.validation))
            made["expected"] = _expected(made, timing, len(split.validation))
            write_plan(made, draft / "configs" / "plan.json")
        _try_length(draft)
        refresh_documents(draft)
        record_run(draft)
    return made


def _try_length(draft: Path) -> None:
    """A recipe in stages needs some epochs: said before there is a run that would have to be planned anew."""
    config = ConfigParser()
    config.read_config(str(draft / "configs" / "train.yaml"))
    if "stage_epochs" in config:
        config["bundle_root"] = literal(str(draft))
        with settings_at_fault():
            config.get_parsed_content("stage_epochs")


def refresh_documents(run: Path) -> None:
    """Write what follows from the rest of the run: the network in the configs, JSON twins, metadata, model card."""
    write_network(run)
    write_twins(run)
    write_metadata(run)
    write_model_card(run)


def is_of_plan(key: str) -> bool:
    """A setting that belongs to the plan, not to train.yaml."""
    return key.startswith(PLAN_PREFIX) or key.split("::")[0] in OF_PLAN


def _sort_settings(
    settings: Sequence[tuple[str, Any]],
) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    of_plan, of_config = [], []
    for key, value in settings:
        if is_of_plan(key):
            of_plan.append((key.removeprefix(PLAN_PREFIX), value))
        else:
            of_config.append((key, value))
    return of_plan, of_config


def _write_train_config(
    run: Path,
    dataset_dir: Path,
    recipe: str | Path,
    overlay: Mapping[str, Any],
    settings: Sequence[tuple[str, Any]],
    seed: int,
    init: Path | None,
) -> None:
    tree = load_commented(shared_folder("bundles") / TEMPLATE / "configs" / "train.yaml")
    tree["dataset_dir"] = literal(str(dataset_dir.resolve()))
    tree["seed"] = seed
    tree["recipe"] = Path(recipe).stem
    if init is not None:
        tree["init_weights"] = literal(str((init / "models" / "model.pt").resolve()))
    known = set(tree)
    merge(tree, overlay, "train.yaml")
    _refuse_unknown(tree, known, recipe)
    for key, value in settings:
        if key == "bundle_root":
            raise ConfigError("bundle_root is the run's own folder and cannot be set. Choose it with --out.")
        set_key(tree, key, value, "train.yaml")
    if not str(tree["device"]).startswith("$"):
        check_device(str(tree["device"]))
    (run / "configs" / "train.yaml").write_text(dump_commented(tree))
    evaluate = run / "configs" / "evaluate.yaml"
    if evaluate.exists():
        other = load_commented(evaluate)
        other["dataset_dir"] = literal(str(dataset_dir.resolve()))
        evaluate.write_text(dump_commented(other))


def _refuse_unknown(tree: Mapping[str, Any], known: set[str], recipe: str | Path) -> None:
    """A recipe may add sections, but one that nothing refers to is a slip of the pen."""
    text = dump_commented(tree)
    for key in tree:
        if key not in known and key not in NEW_SECTIONS and not re.search(rf"@{re.escape(key)}\b", text):
            near = nearest(key, known)
            hint = f" Did you mean {near}?" if near else ""
            raise ConfigError(f"Recipe {recipe}: train.yaml has no key {key!r}, and nothing refers to it.{hint}")


def _expected(plan: Mapping[str, Any], timing: Mapping[str, Any], validation_cases: int) -> dict[str, Any]:
    seconds = plan["epochs"] * plan["steps_per_epoch"] * timing["seconds_per_step"]
    seconds += 10 * validation_cases * timing["seconds_per_validation_case"]
    return {
        "minutes": round(seconds / 60, 1),
        "seconds_per_step": round(timing["seconds_per_step"], 3),
        "memory_gib": timing["memory_gib"],
        "machine": timing["machine"],
    }


@dataclass(frozen=True)
class Request:
    """The options of ``medseg plan`` and ``medseg train``; None: not given."""

    recipe: str | None = None
    epochs: int | None = None
    cases: Path | None = None
    labels: int | None = None
    validation: float | None = None
    unlabelled: Path | None = None
    init: Path | None = None
    seed: int | None = None
    settings: Sequence[str] | None = None
    allow_affine_mismatch: bool = False

    def options(self) -> list[str]:
        """The options that were given, as on the command line."""
        given = [name for name, value in vars(self).items() if not (value is None or value is False or value == [])]
        return ["--set" if name == "settings" else "--" + name.replace("_", "-") for name in given]


def prepare_dataset(
    path: Path,
    run: Path,
    request: Request,
    *,
    show: Callable[[Report], None],
    device: str | None = None,
    trust: bool = False,
) -> tuple[dict[str, Any], Split]:
    """Read, split and check a data set, and `prepare_run` on it.

    Args:
        path: a data set.
        run: folder to write.
        request: what to train.
        show: called with the findings of the check, if there are any.
        device, trust: as for `prepare_run`.

    Returns:
        the plan, and which cases train and validate.

    Raises:
        DataError: the data set has errors. ConfigError, RunError: as `prepare_run`.
    """
    recipe, seed = request.recipe or "joint", request.seed or 0
    read_recipe(recipe)
    refuse_others(run)
    settings = [parse_setting(text) for text in request.settings or ()]
    dataset = read_dataset(path)
    if request.cases is not None:
        dataset = dataset.select(read_case_names(request.cases))
    share = VALIDATION if request.validation is None else request.validation
    split = split_cases(dataset, labels=request.labels, seed=seed, validation_fraction=share)
    if request.unlabelled is not None:
        more = read_unlabelled(request.unlabelled, dataset)
        split = replace(split, unlabelled=(*split.unlabelled, *more))
    cases = (*split.training, *split.validation, *split.unlabelled)
    also = "" if request.unlabelled is None else f" (it does not read {request.unlabelled}; this command does)"
    report = refuse_errors(dataset, cases, split.training, path, show, request.allow_affine_mismatch, also)
    plan = prepare_run(
        dataset,
        split,
        run,
        recipe=recipe,
        settings=settings,
        epochs=request.epochs,
        seed=seed,
        init=request.init,
        device=device,
        trust_scan_affine=request.allow_affine_mismatch,
        trust=trust,
        report=report,
    )
    return plan, split


def check_planned(
    path: Path, run: Path, request: Request, *, resume: bool, show: Callable[[Report], None], trust: bool
) -> None:
    """Refuse to train a planned run on another data set, with options that it would ignore, or with errors in its cases.

    Raises:
        DataError: the cases have errors. RunError: the run is planned for something else, or needs trust.
    """
    check_configs_trusted(run, trust)
    folder = plain_text(read_config(run / "configs" / "train.yaml").get("dataset_dir"))
    if folder is None:
        raise RunError(f"{run / 'configs' / 'train.yaml'}: dataset_dir must be the path of a folder.")
    dataset = read_dataset(path)
    root = dataset.root.resolve()
    if root != Path(folder).resolve():
        raise RunError(f"{run} is planned for {folder}, not for {root}. Choose another --out, or pass {folder}.")
    options = request.options()
    if options and not resume:
        raise RunError(
            f"{run} is already planned, so {', '.join(options)} would be ignored. Leave "
            f"{'it' if len(options) == 1 else 'them'} out, edit the run's configs, or choose another --out."
        )
    lists: dict[str, list[Case]] = {}
    for section, entries in read_datalist(run / "configs" / "datalist.json").items():
        for item in load_items(entries, dataset.root) if entries else []:
            images = [item["image"]] if isinstance(item["image"], str) else item["image"]
            label = Path(item["label"]) if item.get("label") else None
            case = Case(str(item.get("name", images[0])), tuple(map(Path, images)), label)
            lists.setdefault(section, []).append(case)
    plan, cases = read_plan(run / "configs" / "plan.json"), [case for cases in lists.values() for case in cases]
    trusted = bool(plan.get("trust_scan_affine", False))
    refuse_errors(dataset, cases, lists.get("training", []), path, show, trusted)


def refuse_errors(
    dataset: Dataset,
    cases: Sequence[Case],
    trained: Sequence[Case],
    path: Path,
    show: Callable[[Report], None],
    allow_affine_mismatch: bool = False,
    also: str = "",
) -> Report:
    """Check the cases that are used (``trained``: by a training), each once, and refuse those with errors.

    Raises:
        DataError: there are errors; `show` has been called with them.
    """
    held_out = {case.name for case in cases} - {case.name for case in trained}
    used = replace(dataset, cases=tuple(dict.fromkeys(cases)), validation=frozenset(held_out))
    report = check_dataset(used, allow_affine_mismatch=allow_affine_mismatch)
    if report.findings:
        show(report)
    if report.has_errors:
        raise DataError(f"The data set has errors (see above). Fix them, then run 'medseg check {path}' again{also}.")
    return report
