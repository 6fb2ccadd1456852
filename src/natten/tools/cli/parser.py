"""The parser of the command line: errors before the usage, and what was probably meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

# What options are called elsewhere: the arguments of our functions, and other programs' options.
ELSEWHERE = {
    "--kernel-size": "--window-size",
    "--is-causal": "--causal",
    "--shape": "--input-size",
    "--input-shape": "--input-size",
    "--batch": "--batch-size",
    "--head-dim": "--dim",
    "--kv-heads": "--heads-kv",
    "--value-dim": "--dim-value",
    "--num-additional": "--add-kv",
    "--backward": "--backprop",
    "--path": "--output",
}


class Parser(argparse.ArgumentParser):
    """A parser of ``natten`` or of one of its commands.

    Args:
        prog: the words that call it.
        description: paragraphs for its help.
        usage: what follows those words, in one line.
    """

    def __init__(self, prog: str, description: str, usage: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            usage=f"{prog} {usage}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse words, after a look at which of them are options that do not exist."""
        for word in words:
            if word == "--":
                break
            self._check(word)
        return self.parse_args(words)

    def _check(self, word: str) -> None:
        """Refuse a word that looks like an option and is none."""
        name = word.partition("=")[0]
        known = [name for action in self._actions for name in action.option_strings]
        if not re.match(r"-[a-zA-Z]|--.", word) or " " in word or name in known:
            return
        if not word.startswith("--") and word[:2] in known and f"-{name}" not in known:
            return  # a value follows its option without a space, as in -w7
        near = ELSEWHERE.get(name) if word.startswith("--") else f"-{name}"
        near = near if near in known else nearest(name, known)
        self.error(f"there is no option {name}{did_you_mean(near)}")

    def error(self, message: str) -> NoReturn:
        """Print the error, and then how the program is called, and exit."""
        # argparse quotes the option's forms with slashes.
        message = re.sub(r"^argument (?:-\w/)?(--[\w-]+|\w+): ", r"\1: ", message)
        self.exit(
            2,
            f"{self.prog}: error: {message}\n\n{self.format_usage()}"
            f"{self.prog} --help lists everything.\n",
        )


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like ``word``, if one is."""
    by_case = {each.lower(): each for each in known}
    found = difflib.get_close_matches(word.lower(), by_case, 1)
    return by_case[found[0]] if found else None


def did_you_mean(near: str | None) -> str:
    """The end of an error message."""
    return "" if near is None else f"; did you mean {near}?"


class Choice:
    """The type of an argument that is one of a few words.

    Args:
        names: the words; other spellings of a word are given as keys of a mapping to it.
    """

    def __init__(self, names: Sequence[str] | Mapping[str, str]) -> None:
        self.names = dict(names) if isinstance(names, Mapping) else {each: each for each in names}

    def __call__(self, text: str) -> str:
        """The word that ``text`` stands for."""
        if text.lower() in self.names:
            return self.names[text.lower()]
        words = ", ".join(dict.fromkeys(self.names.values()))
        raise argparse.ArgumentTypeError(
            f"expected one of {words}, got {text!r}{did_you_mean(nearest(text, self.names))}"
        )


class Flat(argparse.Action):
    """Stores the values of all words in one list, where a word may stand for several: 56x56."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """For argparse."""
        setattr(namespace, self.dest, [value for word in values for value in word])
