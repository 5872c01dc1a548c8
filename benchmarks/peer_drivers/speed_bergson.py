"""bergson: its gradient store with two-sided random projections, on disk, and its passes for EK-FAC, without files."""

import logging
import shutil
from itertools import count

import torch
from bergson.collection import collect_gradients
from bergson.collector.collector import CollectorComputer, fwd_bwd_hessian_factory
from bergson.config import HessianConfig, IndexConfig
from bergson.data import load_gradients
from bergson.hessians.eigenvectors import LambdaCollector
from bergson.hessians.kfac import CovarianceCollector
from bergson.utils.worker_utils import create_processor, setup_model_and_peft
from datasets import Dataset
from speed_handover import TRUE, Action, Handover, drive
from torch import Tensor

PREFIX = "model."  # it names layers from the model below the head


def actions(handed: Handover) -> dict[str, Action]:
    logging.disable(logging.INFO)
    folder, numbers = handed.folder / "bergson", count()
    config = IndexConfig(run_path=str(folder / "rows"), model=str(handed.folder / "model"), projection_dim=handed.about["rank"])
    config.precision = {"float32": "fp32", "bfloat16": "bf16"}[handed.about["dtype"]]
    model, _targets = setup_model_and_peft(config)
    model.eval()
    rows = Dataset.from_dict({"input_ids": handed.tokens.tolist(), "length": [handed.tokens.shape[1]] * len(handed.tokens)})
    config.partial_run_path.mkdir(parents=True)
    processor, plan, layers = create_processor(model, config), handed.batch_plan(), handed.layers

    def gradient_rows(_labels: str) -> dict[str, Tensor]:
        config.run_path = str(folder / f"rows-{next(numbers)}")
        config.partial_run_path.mkdir()
        collect_gradients(model, rows, processor, config, batches=plan)
        stored = torch.from_numpy(load_gradients(config.partial_run_path)[: handed.about["num_checked_rows"]].copy())
        shutil.rmtree(config.partial_run_path)
        projections = processor._projection_matrices
        return {"rows": stored} | {
            f"{side}.{name}": projections[name.removeprefix(PREFIX), role, model.device].T.clone()
            for side, role in (("P_i", "right"), ("P_o", "left"))
            for name in layers
        }

    def factors(kind: type, labels: str, **more) -> CovarianceCollector | LambdaCollector:
        """A pass; what it found is left in the collector and not written."""
        hessian = HessianConfig(method="kfac", ev_correction=True, hessian_dtype="fp32", use_dataset_labels=labels == TRUE)
        collector = kind(model=model.base_model, path=str(folder / "rows"), dtype=torch.float32, **more)
        collector.teardown = lambda: None
        computer = CollectorComputer(model=model, data=rows, collector=collector, batches=plan, cfg=config)
        computer.forward_backward = fwd_bwd_hessian_factory(config, hessian)
        config.run_path = str(folder / "rows")
        computer.run_with_collector_hooks()
        return collector

    def covariances(labels: str) -> dict[str, Tensor]:
        found = factors(CovarianceCollector, labels)
        return {
            f"{letter}.{name}": held[name.removeprefix(PREFIX)]
            for letter, held in (("A", found.A_cov_dict), ("S", found.S_cov_dict))
            for name in handed.about["checked"]
        }

    inputs, outputs = ({name.removeprefix(PREFIX): Q for name, Q in part.items()} for part in handed.bases())

    def eigenvalues(labels: str) -> dict[str, Tensor]:
        found = factors(LambdaCollector, labels, eigenvectors=(inputs, outputs)).eigenvalue_corrections
        return {f"Lambda.{name}": found[name.removeprefix(PREFIX)] for name in handed.about["checked"]}

    return {"rows": gradient_rows, "covariances": covariances, "eigenvalues": eigenvalues}


if __name__ == "__main__":
    drive(actions)
