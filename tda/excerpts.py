"""The beginning of a document's text, as pages and answers show it."""

LINES, CHARACTERS = 5, 300
CHARACTERS_OF_A_LINE = 240
MORE = " ..."


def excerpt(text: str) -> str:
    """The beginning of `text`: a few lines, at most, and whole words where there are any."""
    beginning = "\n".join(text.strip("\n").split("\n")[:LINES])
    return beginning if len(beginning) <= CHARACTERS else _whole_words(beginning[:CHARACTERS])


def excerpt_in_a_line(text: str) -> str:
    """The same in one line, whatever white space there is; a text that goes on ends in dots."""
    line = " ".join(text.split())
    if len(line) <= CHARACTERS_OF_A_LINE:
        return line
    room = CHARACTERS_OF_A_LINE - len(MORE)
    return _whole_words(line[: room + 1])[:room] + MORE  # one more, as the last word may end just there


def _whole_words(cut: str) -> str:
    """`cut` without the word that it breaks off, unless that is long: some languages have no spaces."""
    return cut[: cut.rfind(" ")] if " " in cut[-30:] else cut
