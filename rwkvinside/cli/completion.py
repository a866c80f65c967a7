"""`rwkvinside completion SHELL`: a script that completes commands and flags, made from the commands themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NoReturn

from .arguments import ArgumentParser

BASH = """\
# rwkvinside completion bash > ~/.local/share/bash-completion/completions/rwkvinside
_rwkvinside() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" command="" below="" flags="" word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$command $word" in
{commands}
        esac
    done
    case "$command" in
{cases}
    esac
    [[ $current == -* ]] && below="$flags"
    COMPREPLY=($(compgen -W "$below" -- "$current"))
}}
complete -o default -F _rwkvinside rwkvinside
"""
ZSH = """\
#compdef rwkvinside
# rwkvinside completion zsh > "${{fpath[1]}}/_rwkvinside"
autoload -U +X bashcompinit && bashcompinit
{bash}"""
FISH = "# rwkvinside completion fish > ~/.config/fish/completions/rwkvinside.fish\n"


class _Recorded(Exception):
    """A parser has all its arguments."""

    def __init__(self, flags: list[str], commands: Mapping[str, tuple[str, str]] | None):
        self.flags, self.commands = flags, commands


class _Recorder(ArgumentParser):
    """A parser that ends where it would parse."""

    def parse(self, argv: Sequence[str]) -> NoReturn:
        flags = [
            flag for action in self._actions for flag in action.option_strings if re.fullmatch("--[a-z0-9-]+", flag)
        ]
        raise _Recorded(flags, self.commands)


def main(parser: ArgumentParser, argv: Sequence[str]) -> int:
    """Print the script of a shell."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
    shell = parser.parse(argv).shell
    from .main import VERBS

    print(script(shell, VERBS), end="")
    return 0


def script(shell: str, verbs: Mapping[str, tuple[str, str]]) -> str:
    """Return the completion script of a shell.

    Args:
        shell: bash, zsh or fish.
        verbs: of the command, see `run_command`.
    """
    tree = {(): (["--help", "--version"], verbs), **_commands(verbs, ())}
    if shell == "fish":
        return FISH + "\n".join(_fish(tree)) + "\n"
    names = {words: "".join(f" {word}" for word in words) for words in tree}
    cases = [
        f'        "{names[words]}") below="{" ".join(below)}" flags="{" ".join(flags)}" ;;'
        for words, (flags, below) in tree.items()
    ]
    commands = [f'            "{name}") command="{name}" ;;' for words, name in names.items() if words]
    bash = BASH.format(commands="\n".join(commands), cases="\n".join(cases))
    return ZSH.format(bash=bash) if shell == "zsh" else bash


Tree = dict[tuple[str, ...], tuple[list[str], Mapping[str, tuple[str, str]]]]


def _commands(verbs: Mapping[str, tuple[str, str]], above: tuple[str, ...]) -> Tree:
    """Return the flags of each command below, and the commands below it."""
    found: Tree = {}
    for name, (target, text) in verbs.items():
        module, function = target.split(":")
        run = getattr(import_module(f".{module}", __package__), function)
        words = (*above, name)
        try:
            run(_Recorder(" ".join(("rwkvinside", *words)), text), [])
        except _Recorded as recorded:
            below = recorded.commands or {}
            found[words] = recorded.flags, below
            found |= _commands(below, words)
    return found


def _fish(tree: Tree) -> list[str]:
    lines = []
    for words, (flags, below) in tree.items():
        seen = " ".join(words)
        where = f"__fish_seen_subcommand_from {words[-1]}" if words else "__fish_use_subcommand"
        if len(words) == 2:
            where = f"__fish_seen_subcommand_from {words[0]}; and {where}"
        for name, (_, text) in below.items():
            condition = where if not words else f"{where}; and not __fish_seen_subcommand_from {' '.join(below)}"
            shown = text.replace("'", "\\'")
            lines.append(f"complete -c rwkvinside -f -n '{condition}' -a {name} -d '{shown}'")
        lines += [f"complete -c rwkvinside -n '{where}' -l {flag[2:]}  # {seen}".rstrip(" #") for flag in flags]
    return lines
