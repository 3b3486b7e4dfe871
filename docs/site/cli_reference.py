"""The reference of the command line, made from the parsers of all verbs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from kvquant.cli import VERBS, build_parser

HEAD = """# Options of every verb

This page is made from the parsers of `kvquant`, so that it says what `kvquant VERB --help` says.
[The command line](cli.md) has what verbs have in common: exit statuses, JSON, and what is printed
where.
"""


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Returns the parsers below a parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Returns {verb: parser}, `bench kernels` and its like as verbs of their own."""
    found: dict[str, argparse.ArgumentParser] = {}
    for verb in VERBS:
        parser = _choices(build_parser(verb))[verb]
        below = _choices(parser)
        found |= {f"{verb} {name}": inner for name, inner in below.items()} or {verb: parser}
    return found


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _value(action: argparse.Action) -> str:
    """Returns how the value of an option is written."""
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return " or ".join(f"`{choice}`" for choice in action.choices)
    word = action.metavar or action.dest.upper()
    return f"`{word}`" + (" ..." if action.nargs in ("+", "*") else "")


def _default(action: argparse.Action) -> str:
    """Returns what counts where an option is left out."""
    if action.required:
        return "required"
    if action.default in (None, [], False, argparse.SUPPRESS):
        return ""
    return f"`{action.default}`"


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yields the tables of a parser's options, one per group that has a title of its own."""
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        if not actions:
            continue
        if group.title not in ("positional arguments", "options"):
            yield from (f"{group.title}:"[0].upper() + f"{group.title}:"[1:], "")
        yield from ("| option | value | default | meaning |", "|---|---|---|---|")
        for action in actions:
            name = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.dest}`"
            meaning = _cell(action.help or "")
            yield f"| {name} | {_value(action)} | {_default(action)} | {meaning} |"
        yield ""


def _synopsis(name: str, parser: argparse.ArgumentParser) -> str:
    """Returns a verb with what it cannot do without."""
    words = ["kvquant", name]
    for action in parser._actions:
        if action.required:
            value = action.metavar or action.dest.upper()
            words += [*action.option_strings[:1], str(value)]
    optional = any(not a.required for a in parser._actions if a.dest != "help")
    return " ".join([*words, "[options]"] if optional else words)


def page() -> str:
    """Returns the whole page."""
    lines = [HEAD, "| verb | what it does |", "|---|---|"]
    all_parsers = parsers()
    for verb, (_, text) in VERBS.items():
        first = next(name for name in all_parsers if name.split()[0] == verb)
        lines.append(f"| [`{verb}`](#kvquant-{first.replace(' ', '-')}) | {_cell(text)} |")
    for name, parser in all_parsers.items():
        lines += ["", f"## kvquant {name}", "", parser.description or "", ""]
        lines += [f"`{_synopsis(name, parser)}`", "", *_options(parser)]
    return "\n".join(lines) + "\n"
