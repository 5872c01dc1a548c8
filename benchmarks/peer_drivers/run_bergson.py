"""bergson (PyPI `bergson`): SOURCE and EK-FAC influence of a language model, through the configurations of its commands.

Its eigenvalues are those of a document's summed loss; training minimised the mean over the document's tokens. So the summed
learning rates that SOURCE is given are divided by the tokens, which makes its exponent that of the training.
"""

import json
from pathlib import Path

import numpy as np
import torch
from bergson.approx_unrolling.pipeline import approx_unrolling_pipeline
from bergson.config import (
    ApproxUnrollingConfig,
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    PreprocessConfig,
    ScoreConfig,
)
from bergson.config.config import QuerySetConfig
from bergson.data import load_scores
from bergson.hessians.pipeline import hessian_pipeline
from datasets import Dataset
from handover import Handover, drive
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

TOKENS = 2048  # at once


def source(handed: Handover) -> np.ndarray:
    """SOURCE as for SGD, with momentum."""
    return unrolled(handed, adam=False)


def source_adam(handed: Handover) -> np.ndarray:
    """SOURCE preconditioned by AdamW's second moments, in the paper's own form."""
    return unrolled(handed, adam=True)


def unrolled(handed: Handover, *, adam: bool) -> np.ndarray:
    folder, about = handed.folder / "bergson", handed.about
    checkpoints = [write_checkpoint(handed, index) for index in range(len(about["checkpoints"]))]
    per_segment = len(checkpoints) // about["segments"]
    ends = about["checkpoints"][per_segment - 1 :: per_segment]
    rates, tokens = handed.steps()[0], predicted_tokens(handed)
    parts = [rates[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    approx_unrolling_pipeline(
        index_config(handed, folder / "source", model=checkpoints[-1]),
        hessian_config(handed),
        ApproxUnrollingConfig(
            checkpoints=checkpoints,
            segments=about["segments"],
            lr_list=[float(part.mean()) / tokens for part in parts],
            step_size_list=[len(part) for part in parts],
            momentum=about["optimizer"]["momentum"],
            use_adam_preconditioner=adam,
            query=query_config(handed),
        ),
    )
    # Theirs is lower for a row that helps; each query's summed loss becomes its mean.
    return -load_scores(folder / "source" / "scores")[:].astype(np.float64).T / tokens


def ekfac(handed: Handover) -> np.ndarray:
    """EK-FAC influence at the last checkpoint, in the defaults: damped by a tenth of each layer's mean eigenvalue."""
    folder = handed.folder / "bergson"
    index = index_config(handed, folder / "ekfac", model=write_checkpoint(handed, -1))
    pipeline = HessianPipelineConfig(query=query_config(handed))
    hessian_pipeline(index, hessian_config(handed), ScoreConfig(), PreprocessConfig(), pipeline)
    return load_scores(folder / "ekfac" / "scores")[:].astype(np.float64).T / predicted_tokens(handed)


def predicted_tokens(handed: Handover) -> int:
    return handed.arrays["x_train"].shape[1] - 1


def index_config(handed: Handover, run_path: Path, *, model: str) -> IndexConfig:
    return IndexConfig(
        run_path=str(run_path),
        overwrite=True,
        model=model,
        precision=precision(handed),
        tokenizer=write_tokenizer(handed),
        data=DataConfig(dataset=write_rows(handed, "train")),
        token_batch_size=min(TOKENS, context(handed)),
    )


def hessian_config(handed: Handover) -> HessianConfig:
    """True labels in place of sampled ones where the handover says so: then nothing is drawn."""
    true_labels = handed.about.get("labels") == "true"
    return HessianConfig(method="kfac", ev_correction=True, hessian_dtype=precision(handed), use_dataset_labels=true_labels)


def query_config(handed: Handover) -> QuerySetConfig:
    return QuerySetConfig(dataset=write_rows(handed, "query"), aggregation="none")


def precision(handed: Handover) -> str:
    return {torch.float32: "fp32", torch.float64: "fp64"}[handed.dtype]


def context(handed: Handover) -> int:
    config = json.loads((Path(handed.about["model"]["path"]) / "config.json").read_text(encoding="utf-8"))
    return config["max_position_embeddings"]


def write_rows(handed: Handover, part: str) -> str:
    """Rows of tokens as a saved data set."""
    path = handed.folder / "bergson" / f"rows-{part}"
    if not path.exists():
        Dataset.from_dict({"input_ids": handed.arrays[f"x_{part}"].tolist()}).save_to_disk(path)
    return str(path)


def write_tokenizer(handed: Handover) -> str:
    """A tokenizer has to be there; rows that are tokens already never pass through it."""
    path = handed.folder / "bergson" / "tokenizer"
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a", model_max_length=context(handed)).save_pretrained(path)
    return str(path)


def write_checkpoint(handed: Handover, index: int) -> str:
    """A checkpoint as transformers saves it, with AdamW's second moments as its trainer does."""
    about = handed.about
    step = about["checkpoints"][index]
    path, optimizer = handed.folder / "bergson" / "checkpoints" / f"checkpoint-{step}", about["optimizer"]
    handed.model(index).save_pretrained(path)
    if optimizer["kind"] == "adamw":
        state = {
            place: {
                "step": torch.tensor(float(step)),
                "exp_avg_sq": value,
                "exp_avg": torch.zeros_like(value),
                "param_name": name,
            }
            for place, (name, value) in enumerate(handed.weights(index, "second_moments").items())
        }
        betas = (optimizer["beta1"], optimizer["beta2"])
        group = {"betas": betas, "eps": optimizer["epsilon"], "params": list(state)}
        torch.save({"state": state, "param_groups": [group]}, path / "optimizer.pt")
    return str(path)


if __name__ == "__main__":
    drive({"source": source, "source_adam": source_adam, "ekfac": ekfac})
