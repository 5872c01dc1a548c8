"""Run by `test_other_device.py` in a process of its own: the toy pipeline, or methods, on a device that is not there."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.stand_in_device import DEVICE, install, seen


def pipeline(folder: Path) -> dict:
    """Every stage up to the verdict, and a query; what was counted by stage."""
    import tda.parallel

    tda.parallel.device_of = lambda _compute: DEVICE
    tda.parallel.num_workers = lambda _compute: 1
    from tda.artifacts import Workspace
    from tda.query import answer
    from tests.toy import run_stages, toy_config

    config, workspace = toy_config(folder), Workspace(folder)
    counted = {}
    for name in ("prepare", "train", "segments", "curvature", "gradients", "scores", "curation", "retraining", "evaluation"):
        seen.clear()
        run_stages(config, workspace, name)
        counted[name] = {f"{kind}, {where}": count for (kind, where), count in seen.items()}
    answered = answer("The gull meets the tide.", config=config, workspace=workspace, top=3)
    return {"counted": counted, "helped": [row["doc_id"] for row in answered["helped"]]}


def resumed(folder: Path) -> dict:
    """By optimizer, whether a run that was resumed from a checkpoint ends with the weights of one that was not.

    And how float32 is multiplied: in training and afterwards.
    """
    from tda.config import load_config
    from tda.train import make_optimizer, resume, save_checkpoint, schedule, train
    from tests.helpers import random_documents, tiny_llama
    from tests.toy import PARAMS

    documents, found = random_documents(8), {}
    precisions = []
    for kind in ("adamw", "sgd"):
        recipe = load_config(PARAMS).train.model_copy(update={"optimizer": kind, "batch_size": 4})
        steps = schedule(documents, recipe, seed=0, lengths=[2, 6])
        straight, first, second = (tiny_llama(seed=seed).to(DEVICE) for seed in (0, 0, 5))
        optimizer = make_optimizer(straight, recipe)
        train(
            straight,
            documents,
            steps,
            recipe,
            optimizer=optimizer,
            after=lambda _taken: precisions.append(torch.get_float32_matmul_precision()),
        )
        optimizer = make_optimizer(first, recipe)
        train(first, documents, steps[:3], recipe, optimizer=optimizer)
        save_checkpoint(folder / kind, first, optimizer, step=3)
        optimizer = make_optimizer(second, recipe)
        train(second, documents, steps[resume(folder / kind, second, optimizer) :], recipe, optimizer=optimizer)
        weights = zip(straight.parameters(), second.parameters(), strict=True)
        found[kind] = all(torch.equal(expected.cpu(), got.cpu()) for expected, got in weights)
    return found | {"precisions": [*sorted(set(precisions)), torch.get_float32_matmul_precision()]}


def methods() -> dict:
    """By method, the largest difference to the CPU's scores in shares of the largest score."""
    from tda.attribute import attribute
    from tda.methods import METHODS

    settings = {"datamodel": {"retrainings": 4}}
    found = {}
    for task_name, optimizer in (("classification", "sgd"), ("regression", "adamw")):
        for data_device in ("cpu", DEVICE):
            host, there = recorded(task_name, optimizer, "cpu", "cpu"), recorded(task_name, optimizer, DEVICE, data_device)
            for name in [*METHODS, "surrogate+averaged_influence"]:
                if name == "bm25":
                    continue
                expected, values = (attribute(name, *case, **settings.get(name, {})).values for case in (host, there))
                key = f"{name}, {task_name}, data on {data_device}"
                found[key] = float(np.abs(values - expected).max() / np.abs(expected).max())
    return found


def curvature() -> dict:
    """By precision, the largest difference of covariances and of corrected eigenvalues to the CPU's, of the largest value."""
    from tda import ekfac
    from tda.data import Examples
    from tda.model import tracked_layers
    from tda.task import Classification

    ekfac.ONE_BY_ONE = 0
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 5, 6, generator=generator), torch.randint(3, (8,), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.AdaptiveAvgPool2d((1, None)), nn.Flatten(), nn.Linear(200, 3))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        both: list[dict[str, torch.Tensor]] = []
        for device in (torch.device("cpu"), DEVICE):
            there = copy.deepcopy(model).to(dtype).to(device).eval()
            batch = Examples(x.to(dtype), y).batch(range(8)).to(device)
            layers = tracked_layers(there, probe=lambda held, batch=batch: held(batch.x))
            settings = {"task": Classification(), "generator": torch.Generator(device).manual_seed(0)}
            sums = ekfac.covariances(there, layers, [batch], **settings)
            values = {f"A.{name}": value.cpu() for name, value in sums.A.items()}
            values |= {f"S.{name}": value.cpu() for name, value in sums.S.items()}
            if not both:
                basis = ekfac.eigenbasis(sums, layers)
            Lambda, _count = ekfac.corrected_eigenvalues(there, layers, [batch], basis=basis, **settings)
            both.append(values | {f"Lambda.{name}": value.cpu() for name, value in Lambda.items()})
        assert {value.dtype for value in both[1].values()} == {torch.float32}
        found[str(dtype)] = max(float((both[1][name] - value).abs().max() / value.abs().max()) for name, value in both[0].items())
    return found


def recorded(task_name: str, optimizer: str, device: torch.device | str, data_device: torch.device | str) -> tuple:
    """A run of a small network that was trained on `device`, its task, rows and queries."""
    from tda.data import Examples
    from tda.task import Classification, Regression
    from tda.trajectory import Recorder

    generator = torch.Generator().manual_seed(0)
    x, queries = torch.randn(48, 6, generator=generator), torch.randn(4, 6, generator=generator)
    task = Classification() if task_name == "classification" else Regression()
    rule = torch.randn(6, 3, generator=generator)
    train, asked = (
        Examples(inputs, (inputs @ rule).argmax(dim=1) if task_name == "classification" else (inputs @ rule)[:, :1])
        for inputs in (x, queries)
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3 if task_name == "classification" else 1)).to(device)
    made = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.01),
    }[optimizer]()
    recorder = Recorder(model, made, num_steps=24, num_checkpoints=3)
    for _epoch in range(4):
        for rows in torch.randperm(48, generator=generator).split(8):
            total, _losses = task.losses(model, train.batch(rows.tolist()).to(device))
            made.zero_grad()
            (total / len(rows)).backward()
            made.step()
            recorder.step(rows)
    moved = (replace(data, x=data.x.to(data_device), y=data.y.to(data_device)) for data in (train, asked))
    return recorder.run, task, *moved


if __name__ == "__main__":
    torch.set_num_threads(1)
    install()
    asked, *folders = sys.argv[1:]
    known = {"curvature": curvature, "methods": methods, "pipeline": pipeline, "resumed": resumed}
    print(json.dumps(known[asked](*map(Path, folders))))
