"""Methods with settings, as `--methods` names them, and the parts that ensembles and datamodels are combined from."""

from dataclasses import dataclass

from tda.data import Data
from tda.scores import ENSEMBLE
from tda.task import Task

DATAMODEL = "datamodel"
RETRAININGS = "retrainings"  # not a method, but a part of a datamodel: the queries' costs after retraining on halves


@dataclass(frozen=True)
class Variant:
    """A method, or several joined by +, with settings, such as `source:adam=symmetric:num_segments=2`."""

    label: str
    method: str
    settings: dict[str, object]

    def parts(self, task: Task, train: Data) -> list["Variant"]:
        """The members of an ensemble, or the prior and the retrainings of a datamodel; nothing for other methods."""
        from tda.methods import prior_of

        names = self.method.split(ENSEMBLE)
        if len(names) > 1:
            return [_variant(name, self.settings) for name in names]
        if self.method == DATAMODEL:
            of_prior = {name: value for name, value in self.settings.items() if name not in ("prior", "retrainings")}
            prior = prior_of(task, train, asked_for=str(self.settings.get("prior", "")))
            return [_variant(prior, of_prior), _variant(RETRAININGS, self.settings)]
        return []


def _variant(method: str, settings: dict[str, object]) -> Variant:
    return Variant(":".join([method, *(f"{name}={_as_given(value)}" for name, value in settings.items())]), method, settings)


def _as_given(value: object) -> str:
    """A setting's value as one would write it, so that a part has the name of the same method asked for by itself."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def parse_variant(text: str) -> Variant:
    """The variant that `text` names.

    Raises:
        ValueError: there is no such method or setting, or a setting has a value that no method takes.
    """
    from tda.fitted import Settings
    from tda.methods import named

    method, *pairs = text.split(":")
    named(method, where="--methods")
    given = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--methods: {text}: expected METHOD:SETTING=VALUE; got {pair!r}")
        given[name] = value
    chosen = Settings.of(origin=f"--methods: {text}", **given)
    settings = {name: getattr(chosen, name) for name in given}
    if chosen.prior:
        named(chosen.prior, where=f"--methods: {text}: prior")
    return Variant(text, method, settings)
