"""Turns the documentation's reStructuredText into text a reader would see.

A small model spends much of its capacity on roles, labels and index entries if they stay, and
then writes them into its prose. Signatures, headings, lists and code samples stay as they are.
"""

import re
from collections.abc import Iterator
from re import Match

_ROLE = re.compile(r":(?P<role>[a-z][\w:+-]*):`(?P<text>[^`]+)`")
_LINK = re.compile(r"`(?P<text>[^`<]+?)\s*<[^`>]+>`_+")
_DIRECTIVE = re.compile(r"^(?P<indent>\s*)\.\. (?P<name>[\w:-]+)::\s*(?P<rest>.*)$")
_COMMENT = re.compile(r"^(?P<indent>\s*)\.\.(?: |$)")
_OPTION = re.compile(r"^\s+:(?:[a-z][\w-]*):(?:\s.*)?$")

_HIDDEN = frozenset(
    "index module moduleauthor sectionauthor currentmodule highlight testsetup testcleanup "
    "toctree include literalinclude image figure only raw tabularcolumns audit-event "
    "impl-detail-index default-role role".split()
)
_TRANSPARENT = frozenset(
    "code-block code sourcecode doctest testcode testoutput productionlist parsed-literal "
    "list-table table csv-table hlist container grammar-snippet".split()
)
_SPOKEN = {
    "versionadded": "New in version {}.",
    "versionchanged": "Changed in version {}:",
    "deprecated": "Deprecated since version {}:",
    "deprecated-removed": "Deprecated, with the versions of deprecation and removal {}:",
    "note": "Note: {}",
    "warning": "Warning: {}",
    "seealso": "See also: {}",
    "tip": "Tip: {}",
    "impl-detail": "CPython implementation detail: {}",
    "availability": "Availability: {}",
}
_PREFIXES = {"pep": "PEP ", "rfc": "RFC ", "gh": "gh-", "issue": "bpo-"}


def plain_text(source: str) -> str:
    """The source with its roles and links spelled out and its invisible directives removed."""
    text = "\n".join(_visible_lines(source.splitlines()))
    text = _LINK.sub(r"\g<text>", _ROLE.sub(_spell_role, text))
    text = text.replace("``", "`").replace("::\n", ":\n")
    return re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"


def _visible_lines(lines: list[str]) -> Iterator[str]:
    hidden_below: int | None = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if hidden_below is not None and (not line.strip() or indent > hidden_below):
            continue
        hidden_below = None
        if _is_hidden(line):
            hidden_below = indent
        elif not _OPTION.match(line):
            yield from _spell_directive(line)


def _is_hidden(line: str) -> bool:
    directive = _DIRECTIVE.match(line)
    if directive is None:
        return _COMMENT.match(line) is not None
    return directive["name"] in _HIDDEN


def _spell_directive(line: str) -> Iterator[str]:
    directive = _DIRECTIVE.match(line)
    if directive is None:
        yield line.rstrip()
    elif directive["name"] not in _TRANSPARENT:
        spoken = _SPOKEN.get(directive["name"], "{}").format(directive["rest"])
        yield (directive["indent"] + spoken).rstrip()


def _spell_role(match: Match[str]) -> str:
    role = match["role"].rpartition(":")[2]
    name, _, target = match["text"].partition(" <")
    if target:
        return name
    name = name.lstrip("!")
    if name.startswith("~"):
        name = name.rpartition(".")[2].lstrip("~")
    is_call = role in {"func", "meth"} and not name.endswith(")")
    return _PREFIXES.get(role, "") + name + "()" * is_call
