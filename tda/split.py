"""Splitting documents into training, held-out and target documents; the draw depends only on the seed and the ids."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import xxhash

from tda.ingest import Document

HALVES = ("score", "verdict")

Item = TypeVar("Item")


def by_hash(items: Iterable[Item], *, key: Callable[[Item], str], salt: str) -> list[Item]:
    """The items in an order that looks random: by a hash of `salt` and their key."""
    return sorted(items, key=lambda item: (xxhash.xxh3_128_intdigest(f"{salt}/{key(item)}".encode()), key(item)))


def fair_shares(available: Mapping[str, int], total: int) -> dict[str, int]:
    """How many of `total` each source gives: as equal as what is available allows, the remainder by the source's name.

    All is taken where `total` is not reached.
    """
    shares = dict.fromkeys(available, 0)
    left = min(total, sum(available.values()))
    while left:
        hungry = sorted(source for source in available if shares[source] < available[source])
        each = left // len(hungry)
        for source in hungry if each else hungry[:left]:
            more = min(max(each, 1), available[source] - shares[source])
            shares[source] += more
            left -= more
    return shares


def draw(
    items: Iterable[Item], count: int, *, key: Callable[[Item], str], source: Callable[[Item], str], salt: str
) -> tuple[list[Item], list[Item]]:
    """`count` items (all, if there are fewer), in fair shares of every source, in drawn order; and the rest."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in by_hash(items, key=key, salt=salt):
        groups[source(item)].append(item)
    shares = fair_shares({name: len(group) for name, group in groups.items()}, count)
    drawn = [item for name in sorted(groups) for item in groups[name][: shares[name]]]
    rest = [item for name in sorted(groups) for item in groups[name][shares[name] :]]
    return drawn, rest


def draw_by_part(
    items: Iterable[Item],
    count: int,
    *,
    key: Callable[[Item], str],
    source: Callable[[Item], str],
    part: Callable[[Item], str],
    salt: str,
) -> tuple[list[Item], list[Item]]:
    """`draw` with fair shares of the parts of training first, and of the sources within each: both stages have enough left."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[part(item)].append(item)
    shares = fair_shares({name: len(group) for name, group in groups.items()}, count)
    pairs = [draw(groups[name], shares[name], key=key, source=source, salt=salt) for name in sorted(groups)]
    return [item for drawn, _ in pairs for item in drawn], [item for _, rest in pairs for item in rest]


def check_sources(
    documents: Sequence[Document], *, general_sources: Iterable[str], target_sources: Sequence[str], targets_given: bool
) -> None:
    """Refuse sources that do not fit the documents.

    Raises:
        ValueError: a source is unknown, there are no targets, or a source of targets is in the general part.
    """
    known = sorted({one.source for one in documents})
    listed = ", ".join(known[:30]) + (f" and {len(known) - 30} more" if len(known) > 30 else "")
    for setting, names in (("general_sources", general_sources), ("target_sources", target_sources)):
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise ValueError(
                f"prepare.{setting}: no documents of {', '.join(unknown)}: expected sources that there are: {listed}; correct it"
            )
    if not targets_given and not target_sources:
        raise ValueError(
            "prepare: no targets: expected a file in prepare.targets, or sources in prepare.target_sources; got neither; "
            f"name one or more of {listed}"
        )
    both = sorted({one.source for one in documents if one.part == "general" and one.source in target_sources})
    if both:
        raise ValueError(
            f"prepare.target_sources: {', '.join(both)} is in the general part: expected sources of the mixed part, which the "
            "targets are to judge; take it out of general_sources (or of part general)"
        )


@dataclass(frozen=True)
class Split:
    """Documents by what they are for, each list sorted by id; `halves` says which half a target belongs to."""

    training: list[Document]
    targets: list[Document]
    heldout: list[Document]
    halves: dict[str, str]


def split_documents(
    documents: Sequence[Document],
    targets: Sequence[Document],
    *,
    target_sources: Sequence[str],
    num_targets: int,
    num_heldout: int,
    max_documents: int,
    seed: int,
    removed: str,
) -> Split:
    """A split in fair shares of the sources: targets of `targets`, or else of `target_sources`; held-out documents of the
    general part, or of all where there is none; training documents of the rest, at most `max_documents` unless that is 0.
    `removed` says in messages what cleaning took out.

    Raises:
        ValueError: there are too few.
    """
    pool = targets or [one for one in documents if one.source in target_sources]
    drawn, left = _draw(pool, num_targets, salt=f"targets/{seed}")
    possible = len(drawn) if targets else min(len(drawn), len(documents) - num_heldout - 1)  # so that some are left to train on
    _check_enough(len(drawn), num_targets, setting="num_targets", possible=possible, least=len(HALVES), removed=removed)
    halves = {one.id: HALVES[place % 2] for place, one in enumerate(drawn)}
    rest = list(documents) if targets else [one for one in documents if one.source not in target_sources] + left

    general = [one for one in rest if one.part == "general"] or rest
    heldout, _ = _draw(general, num_heldout, salt=f"heldout/{seed}")
    _check_enough(len(heldout), num_heldout, setting="num_heldout", possible=len(heldout) - 1, least=1, removed=removed)
    held = {one.id for one in heldout}
    rest = [one for one in rest if one.id not in held]
    if not rest:
        raise ValueError(
            f"prepare: no training documents are left beside {num_targets} targets and {num_heldout} held-out documents: "
            f"expected more than the {len(documents)} there are; add documents, or lower num_targets and num_heldout"
        )
    training, _ = draw_by_part(
        rest,
        max_documents or len(rest),
        key=lambda one: one.id,
        source=lambda one: one.source,
        part=lambda one: one.part,
        salt=f"training/{seed}",
    )
    return Split(_sorted(training), _sorted(replace(one, part="mixed") for one in drawn), _sorted(heldout), halves)


def _draw(documents: Iterable[Document], count: int, *, salt: str) -> tuple[list[Document], list[Document]]:
    return draw(documents, count, key=lambda one: one.id, source=lambda one: one.source, salt=salt)


def _check_enough(found: int, wanted: int, *, setting: str, possible: int, least: int, removed: str) -> None:
    if found < wanted:
        cleaning = f"cleaning, which took out {removed}" if removed else "cleaning"
        advice = f"set it to {possible} at most, or add documents" if possible >= least else "add documents"
        raise ValueError(f"prepare.{setting}: too few documents: expected {wanted}, got {found} after {cleaning}; {advice}")


def _sorted(documents: Iterable[Document]) -> list[Document]:
    return sorted(documents, key=lambda one: one.id)
