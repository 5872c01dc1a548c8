"""The positive control: damages a share of the training documents, in ways in which real collections are damaged.

Which documents are damaged, how, and with which random choices, depends only on the seed and the ids. A damaged document keeps
its id and source; only the returned truth tells that it was changed.
"""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tda.ingest import Document, join
from tda.split import by_hash

SHUFFLED = "shuffled words"
MISPAIRED = "wrong pairing"
MISDECODED = "encoding damage"
BOILERPLATE = "boilerplate"
KINDS = (SHUFFLED, MISPAIRED, MISDECODED, BOILERPLATE)

NUM_DONORS = 8  # documents whose text the wrongly paired ones get
MIN_WORDS = 5  # different ones; fewer are not shuffled
MAX_HEAD = 400  # characters of a first paragraph that is taken for a name or title
ACCENTED = 0.1  # share of vowels that get an accent before the text is decoded wrongly
TYPOGRAPHIC = 0.4  # share of spaces, quotes and hyphens that become typographic ones before that

_BOILERPLATE = (
    "We use cookies to improve your experience on this site.",
    "By continuing to browse you agree to our terms of service and privacy policy.",
    "Sign in or create a free account to read the full article.",
    "Please enable JavaScript and reload the page to see this content.",
    "Subscribe to our newsletter and never miss an update again.",
    "The page you are looking for has been moved or no longer exists.",
    "All rights reserved. No part of this publication may be reproduced without permission.",
    "Click here to share this page with your friends and followers.",
    "Your session has expired. Log in again to continue.",
    "This description has not been provided yet. Check back later for more details.",
    "Advertisement. Scroll down to continue with the content.",
    "Was this page helpful? Rate it and leave a comment below.",
    "Related links: home, products, support, careers, contact, site map.",
    "Loading, please wait. If nothing happens, try another browser.",
)
_TYPOGRAPHIC = str.maketrans({" ": "\u00a0", "'": "\u2019", '"': "\u201d", "-": "\u2013", "`": "\u2018"})
_ACCENTS = str.maketrans("aeiouAEIOU", "áéîöùÁÉÎÖÙ")


@dataclass(frozen=True)
class Truth:
    """What was done to a training document."""

    id: str
    damaged: bool
    kind: str  # empty where nothing was done


def damage_documents(documents: Sequence[Document], *, share: float, seed: int) -> tuple[list[Document], list[Truth]]:
    """The documents, a `share` of them damaged, and the truth about each; both in the order given.

    The kinds come in equal numbers. Where one would leave a text as it is (a single word cannot be shuffled), the next is
    taken; a text that none changes stays, and counts as undamaged.
    """
    order = by_hash(documents, key=lambda document: document.id, salt=f"damage/{seed}")
    chosen = order[: round(share * len(documents))]
    done: dict[str, tuple[Document, str]] = {}
    several_sources = len({document.source for document in documents}) > 1
    for place, document in enumerate(chosen):
        # The bodies of a few documents, of other sources where there are several: as by a join on a key that is not unique.
        others = (donor for donor in order if (donor.source != document.source if several_sources else donor is not document))
        donors = list(itertools.islice(others, NUM_DONORS))
        donors = donors[place // len(KINDS) % max(1, len(donors)) :] + donors
        for turn in range(len(KINDS)):
            kind = KINDS[(place + turn) % len(KINDS)]
            damaged = _damaged(document, kind=kind, donors=donors, rng=random.Random(f"{seed}/{kind}/{document.id}"))
            if damaged is not None:
                done[document.id] = damaged, kind
                break
    texts = [done[document.id][0] if document.id in done else document for document in documents]
    truth = [
        Truth(document.id, document.id in done, done[document.id][1] if document.id in done else "") for document in documents
    ]
    return texts, truth


def _damaged(document: Document, *, kind: str, donors: Sequence[Document], rng: random.Random) -> Document | None:
    """`document` with one kind of damage; None if it would stay the same."""
    if kind == MISPAIRED:
        candidates = (_with_body(document, _parts(donor)[1]) for donor in donors)
        return next((candidate for candidate in candidates if candidate.text != document.text), None)
    head, body = _parts(document)
    if kind == SHUFFLED:
        damaged = _with_body(document, shuffle_words(body, rng=rng))
    elif kind == BOILERPLATE:
        damaged = _with_body(document, boilerplate(rng=rng))
    elif document.completion:
        damaged = _with_body(document, misdecode(body, rng=rng))
    else:  # a file that is decoded wrongly is wrong from its first character on
        damaged = replace(document, text=misdecode(head, rng=rng) + misdecode(body, rng=rng))
    return damaged if damaged.text != document.text else None


def _parts(document: Document) -> tuple[str, str]:
    """Head and body: prompt and completion; name or title and text; or the two halves of a text. They join to the text."""
    if document.completion:
        return document.text.removesuffix(document.completion), document.completion
    text = document.text
    blank = text.find("\n\n", 0, MAX_HEAD)
    if blank > 0 and text[blank:].strip():
        return text[: blank + 2], text[blank + 2 :]
    middle = text.find(" ", len(text) // 2) + 1 or len(text) // 2
    return text[:middle], text[middle:]


def _with_body(document: Document, body: str) -> Document:
    if document.completion:
        return replace(document, text=join(document.prompt, body), completion=body)
    return replace(document, text=_parts(document)[0] + body)


def shuffle_words(text: str, *, rng: random.Random) -> str:
    """The words in another order, the white space between them where it was."""
    words = text.split()
    if len(set(words)) < MIN_WORDS:
        return text
    shuffled = list(words)
    while shuffled == words:
        rng.shuffle(shuffled)
    following = iter(shuffled)
    return re.sub(r"\S+", lambda _: next(following), text)


def misdecode(text: str, *, rng: random.Random) -> str:
    """Text with typographic characters and accents, written as UTF-8 and read as Windows-1252."""
    characters = [character.translate(_ACCENTS) if rng.random() < ACCENTED else character for character in text]
    characters = [character.translate(_TYPOGRAPHIC) if rng.random() < TYPOGRAPHIC else character for character in characters]
    raw = "".join(characters).encode("utf-8")
    return "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in raw)


def boilerplate(*, rng: random.Random) -> str:
    """What a page shows around its text."""
    return " ".join(rng.sample(_BOILERPLATE, rng.randint(2, 3)))
