"""The configuration: one frozen model per section of `params.yaml`, loaded once and strictly.

A section has the name of the stage that reads it (`audit` and `compute` are no stages). An unknown key is an error that lists the
known ones. Defaults are in `params.yaml` only, so every key must be present there.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

MAX_SEED = 10**9  # generators of curvature multiply the seed by 1000 * 8 * 2**20, and torch takes 64 bits
CURATION_METHODS = ("averaged_influence", "source", "ekfac_influence", "gradient_dot", "gradient_cosine", "bm25", "random")


def _in_order(numbers: list[int]) -> list[int]:
    if numbers != list(range(len(numbers))):
        raise ValueError(f"expected 0, 1, 2, ... in order; got {numbers}")
    return numbers


Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
PartNumbers = Annotated[list[StrictInt], Field(min_length=1), AfterValidator(_in_order)]  # DVC reads them too


class Section(BaseModel):
    """A section of `params.yaml`; frozen. An unknown key, a number that is not finite, or true as a number is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: Any) -> Any:
        held = value if isinstance(value, list) else [value]
        if cls.model_fields[info.field_name].annotation is not bool and any(isinstance(one, bool) for one in held):
            raise ValueError(f"expected no true or false, as YAML also reads yes, no, on and off; got {value}")
        return value


class Prepare(Section):
    """Where documents and targets come from, how they are cleaned, split and tokenised."""

    documents: str = Field(min_length=1)  # builtin:python, a file or folder, or hub:<data set id>
    split: str  # which one, of a saved data set or hub id with several splits
    id_field: str  # empty: ids are made from source and content
    text_field: str  # read if prompt_field is empty
    prompt_field: str
    completion_field: str
    source_field: str  # empty: the file's name is the source of all rows
    part_field: str  # says "general" or "mixed"; empty: general_sources decides
    general_sources: list[str]  # sources of the general part, which the first stage trains on; the rest is the mixed part
    targets: str  # a target set of your own, read as documents are; empty: drawn from target_sources
    target_sources: list[str]
    num_targets: int = Field(ge=2)  # half for scoring, half for the verdict
    num_heldout: int = Field(ge=1)  # general documents that are never trained on, for the general loss
    max_documents: int = Field(ge=0)  # training documents, drawn by a hash of their id; 0: all
    min_characters: int = Field(ge=0)
    near_duplicate_threshold: float = Field(ge=0, le=1)  # Jaccard similarity of word shingles; 0: exact duplicates only
    max_bad_rows: float = Field(ge=0, le=1)  # share of malformed rows above which the stage fails
    damage: float = Field(ge=0, lt=1)  # positive control: share of training documents that are damaged on purpose; 0: off
    tokenizer: str  # folder or hub id; empty: the model's own, or for train.model "llama" a BPE trained on the corpus
    vocabulary: int = Field(ge=258, le=10**6)  # of that BPE
    context: int = Field(ge=8)  # tokens; a longer document is split into parts
    seed: Seed


class Architecture(Section):
    """Shape of the Llama that is built when `train.model` is "llama"."""

    hidden_size: int = Field(ge=8, le=10**6)
    intermediate_size: int = Field(ge=8, le=10**6)
    num_layers: int = Field(ge=1, le=10**4)
    num_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    tie_embeddings: bool

    @model_validator(mode="after")
    def _heads_divide_the_model(self):
        hidden, heads, groups = self.hidden_size, self.num_heads, self.num_key_value_heads
        if hidden % (2 * heads):
            raise ValueError(
                "hidden_size is divided among num_heads, an even number for each, whose halves are rotated together; expected a "
                f"multiple of {2 * heads}, twice num_heads; got {hidden}"
            )
        if heads % groups:
            raise ValueError(
                "num_key_value_heads are shared by equally many of num_heads; expected a number that divides "
                f"{heads}; got {groups}"
            )
        return self


class Lora(Section):
    """Low-rank adapters, trained in place of the model's own weights."""

    rank: int = Field(ge=0)  # 0: none, all weights are trained
    alpha: float = Field(gt=0)  # an adapter's output is multiplied by alpha / rank
    layers: str = Field(min_length=1)  # all-linear, or a regular expression on module names


class TrainingStage(Section):
    """One stage of training: a number of passes over one part of the documents."""

    part: Literal["general", "mixed", "all"]
    epochs: float = Field(gt=0, le=10**6)


class Train(Section):
    """The model, its recipe, and where checkpoints are taken."""

    model: str = Field(min_length=1)  # "llama": built by `architecture`; else a folder or hub id of a causal language model
    architecture: Architecture
    lora: Lora
    run: str  # an existing output folder of a Hugging Face Trainer, used instead of training
    optimizer: Literal["adamw", "sgd"]
    learning_rate: float = Field(gt=0)
    beta1: float = Field(ge=0, lt=1)
    beta2: float = Field(ge=0, lt=1)
    epsilon: float = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)  # sgd only
    weight_decay: float = Field(ge=0)
    schedule: Literal["constant", "linear", "cosine"]
    warmup: float = Field(ge=0, lt=1)  # share of all steps
    batch_size: int = Field(ge=1)  # documents
    max_gradient_norm: float = Field(ge=0)  # 0: no clipping
    stages: list[TrainingStage] = Field(min_length=1)
    checkpoints: PartNumbers  # 0, 1, ..., C - 1; one gradients task each
    attribute_at: Literal["last", "mean"]  # a checkpoint's own weights, or their mean over the steps since the one before
    seed: Seed

    @model_validator(mode="after")
    def _adapters_are_for_a_model_that_is_loaded(self):
        if self.lora.rank and (self.model == "llama" or self.run):
            raise ValueError(
                "lora.rank: adapters are trained on a model that is loaded, those of train.run are found there; expected rank 0, "
                "or train.model a folder or hub id and train.run empty"
            )
        return self

    @model_validator(mode="after")
    def _run_has_a_base_model(self):
        if self.run and self.model == "llama":
            raise ValueError(
                "with train.run, train.model is the model that the run started from: its tokenizer reads the documents, and "
                "retraining starts from it; expected its folder or hub id; got llama"
            )
        return self


class Segments(Section):
    """How checkpoints are assigned to training segments."""

    indices: PartNumbers  # 0, 1, ..., L - 1; one curvature task each
    by: Literal["steps", "stages", "learning_rate"]


class Curvature(Section):
    """EK-FAC of each segment."""

    space: Literal["full", "projected", "rows"]  # of gradients; rows: projected, and fitted from the stored rows without a pass
    layers: str  # regular expression on module names
    num_documents: int = Field(ge=0)  # drawn from the documents that the segment saw; 0: all of them
    adam: Literal["scalar", "symmetric", "none"]  # how AdamW's preconditioner enters (`preconditioner.py`); none: ignored
    precision: Literal["float32", "bfloat16"]  # of weights, activations and their products; sums are in float32
    seed: Seed


class Gradients(Section):
    """LoGra rows of every document at every checkpoint."""

    projection: Literal["eigenbasis", "pca", "random"]
    rank: int = Field(ge=1)  # on each side of every layer; smaller sides keep their size
    dtype: Literal["float16", "float32", "bfloat16", "int8"]  # of stored rows; int8 has an exponent for every 64 values
    precision: Literal["float32", "bfloat16"]  # of weights and activations; sums over tokens are in float32
    batch_tokens: int = Field(ge=1)
    seed: Seed


class Scores(Section):
    """SOURCE and the baselines."""

    averaged_influence: bool  # the most accurate score; it needs memory for about a dozen full gradients, the others need little
    measurement: Literal["loss", "margin", "log_probability"]
    damping: float = Field(gt=0)  # of the EK-FAC influence baseline, in mean eigenvalues of the layer
    seed: Seed  # of the random baseline

    @property
    def answering(self) -> str:
        """The method that answers queries and audits: the most accurate that there is."""
        return "averaged_influence" if self.averaged_influence else "source"


class Curation(Section):
    """What is done with the scores."""

    action: Literal["drop", "reweight"]
    method: str  # the score that decides, one of `CURATION_METHODS`
    drop: float = Field(ge=0)  # below 1: a share of all documents; from 1: a count
    threshold: float | None  # if set, documents that score below it are dropped, and `drop` is an upper bound
    max_share_per_source: float = Field(gt=0, le=1)  # the share of a source's documents that may be dropped
    min_weight: float = Field(ge=0)  # reweight only
    max_weight: float = Field(gt=0)  # reweight only

    @field_validator("method")
    @classmethod
    def _method_is_known(cls, method: str) -> str:
        if method not in CURATION_METHODS:
            raise ValueError(f"unknown method {method!r}; known are {', '.join(CURATION_METHODS)}")
        return method

    @field_validator("drop")
    @classmethod
    def _drop_is_a_share_or_a_count(cls, drop: float) -> float:
        if drop >= 1 and not drop.is_integer():
            raise ValueError(f"expected a share below 1 or a whole number of documents; got {drop}")
        return drop

    @model_validator(mode="after")
    def _weights_have_mean_one(self):
        if not self.min_weight <= 1 <= self.max_weight:
            raise ValueError(
                f"weights have mean 1, so expected min_weight <= 1 <= max_weight; got {self.min_weight} and {self.max_weight}"
            )
        return self


class Retraining(Section):
    """Paired retraining on all, curated and randomly reduced data."""

    seeds: list[Seed] = Field(min_length=2)

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: list[int]) -> list[int]:
        twice = [seed for place, seed in enumerate(seeds) if seed in seeds[:place]]
        if twice:
            raise ValueError(f"{twice[0]} is given twice, and would be the same run again; expected different seeds; got {seeds}")
        return seeds


class Evaluation(Section):
    """The verdict's rule."""

    confidence: float = Field(gt=0, lt=1)
    max_general_loss_increase: float = Field(ge=0)  # nats per token, curated minus all


class Report(Section):
    """The page."""

    title: str
    num_examples: int = Field(ge=1, le=10**4)


class Audit(Section):
    """What an audit scores, and its limits; it fails if one is exceeded."""

    documents: str  # new documents to score, read as prepare.documents is, with the same fields; empty: none
    scope: Literal["new", "all"]
    max_share_harmful: float = Field(ge=0, le=1)
    max_share_crossed: float = Field(ge=0, le=1)
    max_source_shift: float = Field(ge=0)  # in standard deviations of the previous audit's scores


class Compute(Section):
    """Where the work runs. Results do not depend on the number of workers, and on the rest only by rounding."""

    device: Literal["auto", "cpu", "cuda"]
    workers: int = Field(ge=0)  # single-threaded processes on the CPU; 0: one per core
    factor_gib: float = Field(ge=0)  # GiB for fitting curvature; if too little, by blocks of layers; 0: most of what is free
    compile: Literal["auto", "always", "never"]  # decoder layers, for gradient rows; auto: on a GPU


SECTIONS_OF_NO_RESULT = {"audit", "compute"}  # no stage reads the one, and where the work runs changes no result


class Config(Section):
    """All sections of `params.yaml`."""

    prepare: Prepare
    train: Train
    segments: Segments
    curvature: Curvature
    gradients: Gradients
    scores: Scores
    curation: Curation
    retraining: Retraining
    evaluation: Evaluation
    report: Report
    audit: Audit
    compute: Compute

    @model_validator(mode="after")
    def _every_segment_has_a_checkpoint(self):
        there, wanted = len(self.train.checkpoints), len(self.segments.indices)
        if not self.train.run and wanted > there:
            raise ValueError(
                f"segments.indices: {there} checkpoints (train.checkpoints) cannot be divided into {wanted} segments, each needs "
                f"one; set segments.indices to {list(range(there))} or fewer, or train.checkpoints to more"
            )
        return self

    @model_validator(mode="after")
    def _the_score_that_decides_is_there(self):
        if self.curation.method == "averaged_influence" and not self.scores.averaged_influence:
            raise ValueError(
                "curation.method: averaged_influence decides, and scores.averaged_influence is false; expected true, or another "
                "method such as source"
            )
        return self

    @model_validator(mode="after")
    def _factors_of_projected_gradients_are_of_random_ones(self):
        space, projection, adam = self.curvature.space, self.gradients.projection, self.curvature.adam
        if space != "full" and (projection != "random" or adam == "symmetric"):
            raise ValueError(
                f"curvature.space: {space} fits the factors of gradients projected at random; expected gradients.projection: "
                f"random and curvature.adam: scalar or none, got {projection} and {adam}"
            )
        return self


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice; YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"{key.value} is given twice, in lines {lines[key.value]} and {line}; remove one of them")
            lines[key.value] = line
        return super().construct_mapping(node, deep=deep)


def load_config(path: str | Path = "params.yaml") -> Config:
    """The configuration in `path`. A key that is unknown, missing or has a wrong value is a ValueError, which names each.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run from the project's folder or give --params FILE")
    return parse_config(_read_yaml(path), origin=str(path))


def settings_of(stage: str, path: Path) -> dict[str, Any]:
    """The values that `path` has now under the keys that `stage` depends on, by the `dvc.yaml` beside it; none without one."""
    pipeline = path.with_name("dvc.yaml")
    if not pipeline.is_file():
        return {}
    entry, values = _read_yaml(pipeline)["stages"][stage], _read_yaml(path)
    return {key: _value_at(values, key) for key in entry.get("do", entry)["params"]}


def _value_at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}; expected YAML in UTF-8; save it as that") from error
    except (yaml.YAMLError, ValueError) as error:  # an impossible date is a ValueError
        raise ValueError(f"{path}: not valid YAML: {error}") from error


def parse_config(values: Any, *, origin: str) -> Config:
    """`values` as a `Config`; `origin` names them in messages.

    Raises:
        ValueError: a key is unknown, missing or has a wrong value.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(problem, origin) for problem in error.errors())) from error


def _explain(problem: dict, origin: str) -> str:
    parts = map(str, problem["loc"])
    key = ".".join(part if part.isprintable() else repr(part) for part in parts)  # a line feed would divide the message
    named = f"{origin}: {key}" if key else origin
    if problem["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key}; known here: {', '.join(_known_keys(problem['loc'][:-1]))}"
    if problem["type"] == "missing":
        return f"{named} is missing; every key must be set, the shipped params.yaml has all of them"
    if problem["type"] == "value_error":
        return f"{named}: {problem['ctx']['error']}"
    if problem["type"] == "model_type":
        return f"{named}: expected the keys {', '.join(_known_keys(problem['loc']))}; got {type(problem['input']).__name__}"
    return f"{named}: {problem['msg']}; got {problem['input']!r}"


def _known_keys(location: tuple) -> list[str]:
    section = Config
    for part in location:
        annotation = section.model_fields[part].annotation if isinstance(part, str) else section
        arguments = getattr(annotation, "__args__", None)
        section = arguments[0] if arguments else annotation
    return sorted(section.model_fields)
