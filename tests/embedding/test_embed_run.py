"""``medseg embed``: the features are those of the network at the sampled voxels, before and after training."""

from __future__ import annotations

import csv
import json
import shutil
import sys

import pytest
import torch
from tiny_run import training_of
from torch import nn

from medseg_supcon.cli import commands as cli
from medseg_supcon.datasets import read_dataset
from medseg_supcon.embedding import AFTER, BEFORE, embed_run, heads_of, networks_of, voxel_features
from medseg_supcon.errors import DataError, RunError
from medseg_supcon.networks import ContrastiveNetwork


@pytest.fixture(scope="module")
def embedded(trained_run, phantoms, tmp_path_factory):
    """(folder, what embed_run returned). Do not change the folder."""
    out = tmp_path_factory.mktemp("embed") / "out"
    names = ["phantom_01", "phantom_02"]
    return out, embed_run(trained_run, read_dataset(phantoms), out, cases=names, voxels=160, device="cpu")


def test_features_of_a_pointwise_network_are_exact():
    torch.manual_seed(0)
    network = ContrastiveNetwork(nn.Sequential(nn.Conv3d(2, 5, 1), nn.Conv3d(5, 3, 1))).eval()
    image = torch.rand(2, 21, 16, 30)
    where = torch.stack([torch.randint(n, (40,)) for n in image.shape[1:]], 1)
    found = voxel_features({"net": network}, image, where, (8, 16, 12))["net"]
    layer = network.network[0]
    for (x, y, z), row in zip(where.tolist(), found, strict=True):
        expected = layer.weight[:, :, 0, 0, 0] @ image[:, x, y, z] + layer.bias
        assert torch.allclose(row, expected, atol=1e-5)


def test_a_voxel_is_seen_with_its_surroundings():
    # A box filter over 9 voxels: exact wherever the window reaches far enough, so not near a window's rim.
    network = nn.Sequential(nn.Conv3d(1, 1, 9, padding=4, bias=False), nn.Conv3d(1, 2, 1))
    nn.init.constant_(network[0].weight, 1.0)
    image = torch.rand(1, 40, 40, 40)
    where = torch.stack(torch.meshgrid(*[torch.arange(4, 36, 3)] * 3, indexing="ij"), -1).reshape(-1, 3)
    found = voxel_features({"net": ContrastiveNetwork(network).eval()}, image, where, (16, 16, 16))["net"]
    for (x, y, z), row in zip(where.tolist(), found[:, 0], strict=True):
        assert float(row) == pytest.approx(float(image[0, x - 4 : x + 5, y - 4 : y + 5, z - 4 : z + 5].sum()), rel=1e-4)


def test_before_is_what_training_began_from_and_after_what_it_left(trained_run):
    training = training_of(trained_run)
    training.parser.get_parsed_content("train::trainer")
    begun, head = (training.parser.get_parsed_content(key).state_dict() for key in ("network", "projection"))
    networks, (heads, note) = networks_of(trained_run, torch.device("cpu")), heads_of(trained_run)
    shipped = torch.load(trained_run / "models" / "model.pt", weights_only=True)
    before, after = (networks[when].network.state_dict() for when in (BEFORE, AFTER))
    assert begun.keys() == before.keys() == shipped.keys()
    assert all(torch.equal(before[key], value) for key, value in begun.items())
    assert all(torch.equal(after[key], value) for key, value in shipped.items())
    assert any(not torch.equal(before[key], value) for key, value in shipped.items())
    assert all(torch.equal(heads[BEFORE].state_dict()[key], value) for key, value in head.items())
    saved = torch.load(trained_run / "models" / "checkpoint.pt", weights_only=True)["state"]["loss"]
    assert note == ""
    for key, value in heads[AFTER].state_dict().items():
        assert torch.equal(value, next(v for k, v in saved.items() if k.endswith("projection." + key)))


def test_what_comes_out(embedded):
    out, found = embedded
    for name in ("pca.png", "tsne.png"):
        assert (out / name).stat().st_size > 20_000
    with (out / "separation.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["vectors"] for row in rows] == [
        f"{what} features, {when} training" for what in ("encoder", "projected") for when in ("before", "after")
    ]
    assert json.loads((out / "separation.json").read_text()) == found
    for row in rows:
        assert -1 <= float(row["silhouette"]) <= 1
        assert 0 <= float(row["linear_probe"]) <= 1 and 0 <= float(row["collapse"]) <= 1
    tables = sorted((out / "projector").rglob("tensors.tsv"))
    assert len(tables) == 4 and (out / "projector" / "projector_config.pbtxt").exists()
    number = sum(found["voxels"].values())
    assert 100 < number <= 160
    assert all(len(path.read_text().splitlines()) == number for path in tables)
    metadata = tables[0].with_name("metadata.tsv").read_text().splitlines()
    assert metadata[0] == "class\tcase" and len(metadata) == number + 1


def test_the_draw_is_seeded(embedded, trained_run, phantoms, tmp_path):
    names = ["phantom_01", "phantom_02"]
    found = embed_run(trained_run, read_dataset(phantoms), tmp_path, cases=names, voxels=160, device="cpu")
    assert found["separation"] == embedded[1]["separation"]


def test_a_run_without_a_head_shows_features_only(trained_run, phantoms, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(trained_run, tmp_path / "run")
    text = (run / "configs" / "train.yaml").read_text()
    (run / "configs" / "train.yaml").write_text(text.replace("contrast_weight: 0.1", "contrast_weight: 0.0"))
    arguments = ["embed", run, phantoms, "--out", tmp_path / "out", "--voxels", "60", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["medseg", *map(str, arguments)])
    monkeypatch.setattr(cli, "_quieten", lambda: None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr()
    assert stop.value.code == 0, shown.err
    assert "Only the network's features are shown" in shown.out and "did not train on" in shown.out
    found = json.loads((tmp_path / "out" / "separation.json").read_text())
    assert [row["vectors"] for row in found["separation"]] == [
        "encoder features, before training",
        "encoder features, after training",
    ]


def test_faults_are_sentences(trained_run, phantoms, tmp_path):
    dataset = read_dataset(phantoms)
    with pytest.raises(RunError, match="not a trained run"):
        embed_run(tmp_path, dataset, tmp_path / "out")
    with pytest.raises(DataError, match="nobody"):
        embed_run(trained_run, dataset, tmp_path / "out", cases=["nobody"])
    assert not (tmp_path / "out").exists()


def test_weights_and_transforms_that_fail_are_sentences(trained_run, phantoms, tmp_path, medseg):
    """Weights of 3e38 are finite, and their features are not."""
    run, options = tmp_path / "run", ["--out", tmp_path / "out", "--device", "cpu", "--voxels", 20]
    shutil.copytree(trained_run, run)
    weights = torch.load(run / "models" / "model.pt", weights_only=True)
    next(iter(weights.values())).fill_(3e38)
    torch.save(weights, run / "models" / "model.pt")
    code, _, error = medseg("embed", run, phantoms, *options)
    assert code == 2 and "NaN or infinity" in error
    plan = json.loads((run / "configs" / "plan.json").read_text())
    plan["intensity"] = [{"_target_": "NormalizeIntensityd", "keys": "other"}]
    (run / "configs" / "plan.json").write_text(json.dumps(plan))
    shutil.copy(trained_run / "models" / "model.pt", run / "models" / "model.pt")
    for command in ("embed", "evaluate"):
        code, _, error = medseg(command, run, phantoms, *(options if command == "embed" else options[:4]))
        assert code == 2 and "other" in error and "plan.json" in error
