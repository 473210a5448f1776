"""Clients of MONAI's federated learning, on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from monai.networks.utils import get_state_dict

from medseg_supcon.networks import build_network

pytestmark = pytest.mark.filterwarnings("ignore:executing the bundle config:UserWarning")


def test_two_federated_clients(trained_run: Path, tmp_path: Path, elsewhere: Path) -> None:
    """Two rounds of averaging on clients with different cases; weights have the stock network's names."""
    from monai.fl.client import MonaiAlgo
    from monai.fl.utils.constants import ExtraItems, FlStatistics, ModelType
    from monai.fl.utils.exchange_object import ExchangeObject

    plan = json.loads((trained_run / "configs" / "plan.json").read_text())
    cases = json.loads((trained_run / "configs" / "datalist.json").read_text())
    clients, runs = [], []
    for i in range(2):
        run = Path(shutil.copytree(trained_run, tmp_path / f"client{i}"))
        mine = {**cases, "training": cases["training"][i::2]}
        (run / "configs" / "datalist.json").write_text(json.dumps(mine))
        client = MonaiAlgo(bundle_root=str(run), send_weight_diff=False, train_kwargs={"quiet": True})
        client.initialize({ExtraItems.CLIENT_NAME: f"client{i}"})
        clients.append(client)
        runs.append(run)
    model: dict[str, torch.Tensor] = build_network(plan["network_def"]).state_dict()
    drawn = []
    for _ in range(2):
        sent = []
        for client in clients:
            client.train(ExchangeObject(weights=model))
            sent.append(client.get_weights())
            assert sent[-1].weights.keys() == model.keys()
            assert sent[-1].statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] == 3
        drawn.append(clients[0].train_workflow.parser.get_parsed_content("train::sampler").epoch)
        assert any(not torch.equal(sent[0].weights[k], sent[1].weights[k]) for k in model)
        model = {k: (sent[0].weights[k] + sent[1].weights[k]) / 2 for k in model}
    assert drawn == [1, 2]  # a second round draws anew
    scores = [client.evaluate(ExchangeObject(weights=model)).metrics["val_mean_dice"] for client in clients]
    assert scores[0] == scores[1]  # one model, the same validation cases
    assert all(torch.equal(t, model[k]) for k, t in get_state_dict(clients[0].evaluator.network).items())
    # what a server asks for at the end goes by the same names
    best = clients[0].get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL})
    assert best.weights.keys() == model.keys()
    for client in clients:
        client.finalize()
