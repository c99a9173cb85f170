"""How the words after `saemill` are read: lists, switches, words given twice, other tools' words."""

import re
import shlex
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from saemill.common import elsewhere
from saemill.common.config import STAGES
from saemill.common.log import printable

UsageError: Any = typer.BadParameter.__mro__[1]
"""What typer raises for words that it cannot parse."""


class Command(TyperCommand):
    """A command whose flags are collected or refused when they are given twice.

    A list takes `--k 4 --k 8`, `--k 4,8` and, as in sparsify and saetrain, `--k 4 8`; a switch takes
    `--log_to_wandb true`. For a word of another tool, the error says what it is here.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, with what lists and switches of other tools look like rewritten before."""
        try:
            rewritten = Words(self.params).rewritten(args)
            _refuse_twice(self.make_parser(ctx).parse_args(list(rewritten))[2])
            return super().parse_args(ctx, rewritten)
        except UsageError as error:
            raise _explained(error, self, ctx) from None


class Group(TyperGroup):
    """The commands. `saemill MODEL DATASET`, as sparsify is called, is answered with the command for it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or say which one is near."""
        word = args[0]
        if word.startswith("-") or word in self.commands:
            return super().resolve_command(ctx, args)
        if near := elsewhere.near(word, self.commands):
            advice = f"did you mean {', '.join(f'`saemill {name}`' for name in near)}?"
        elif "/" in word or Path(word).exists() or (len(args) > 1 and not args[1].startswith("-")):
            advice = f"all stages at once are `saemill run {shlex.join(args[:2])} --layers -1`"
        else:
            advice = f"known: {', '.join(self.commands)}"
        raise UsageError(printable(f"no command {word!r}; {advice}"), ctx=ctx)


class Words:
    """The words after a command, as its parameters tell them apart."""

    def __init__(self, params: list[Any]) -> None:
        options = [param for param in params if param.param_type_name == "option"]
        self.options = {name: option for option in options for name in (*option.opts, *option.secondary_opts)}
        arguments = [param for param in params if param.param_type_name == "argument"]
        takes_all = any(argument.nargs == -1 for argument in arguments)
        self.n_arguments = 0 if takes_all else len(arguments)

    def rewritten(self, args: list[str]) -> list[str]:
        """Rewrite the words: `--k 4 8` as `--k 4 --k 8`, and `--switch false` as `--no-switch`."""
        words: list[str] = []
        option, name, n_values, n_arguments = None, "", 0, 0
        for place, arg in enumerate(args):
            if arg == "--":
                return words + args[place:]
            if self._is_option(arg):
                name, equals, value = arg.partition("=")
                name = name.replace("_", "-") if name.startswith("--") else name
                option, n_values = self.options.get(name), 0
                words.append(name)
                if equals:
                    words[-1], n_values = arg, 1
                    if option is not None and option.is_flag:
                        words[-1] = _switched(option, name, value) or arg
            elif option is not None and option.is_flag and n_values == 0 and _switched(option, name, arg):
                words[-1], option = str(_switched(option, name, arg)), None
            elif option is not None and not option.is_flag and n_values == 0:
                words.append(arg)
                n_values = 1
            elif option is not None and option.multiple and n_values and words[-1].endswith(","):
                words[-1] += arg
            elif option is not None and option.multiple and self._goes_on(words[-1], arg, n_arguments):
                words += [name, arg]
            else:
                words.append(arg)
                option, n_arguments = None, n_arguments + 1
        return words

    def _is_option(self, arg: str) -> bool:
        return arg.startswith("--") or arg in self.options

    def _goes_on(self, before: str, arg: str, n_arguments: int) -> bool:
        """Tell whether a word belongs to the list before it: a number after numbers, or any once the
        arguments are there."""
        if _is_number(arg) and _is_number(before.rpartition("=")[2]):
            return True
        may_be_a_flag = arg.startswith("-") and not _is_number(arg)
        return not may_be_a_flag and n_arguments >= self.n_arguments > 0


def _switched(option: Any, name: str, word: str) -> str | None:
    """Find the switch for `--log_to_wandb true`; None if the word is neither, or there is no off-switch."""
    if word.lower() == "true":
        return name
    off = option.secondary_opts
    return str(off[0]) if word.lower() == "false" and off else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _refuse_twice(params: list[Any]) -> None:
    """Refuse an option that is given twice and is no list."""
    for param in params:
        if param.param_type_name == "option" and not param.multiple and params.count(param) > 1:
            raise UsageError(f"{param.opts[0]} is given twice; leave one out")


def _explained(error: Any, command: Any, ctx: Any) -> Any:
    """Add to an error what the word is here, if another tool has it, else the near flags."""
    message = str(error.format_message())
    if type(error).__name__ == "NoSuchOption":
        word = str(error.option_name)
        known = sorted({name for param in command.params for name in param.opts if name.startswith("--")})
        advice = _in_other_command(word, ctx) or elsewhere.answer(word)
        near = [] if advice else elsewhere.near(word.replace("_", "-"), known)
        advice = advice or (f"did you mean {', '.join(near)}?" if near else f"see {ctx.command_path} --help")
        message = f"no option {word}; {advice}"
    elif extra := re.search(r"unexpected extra arguments? *(?:\(s\))? *\((.*)\)", message):
        message = (
            f"{extra.group(1)!r} is more than the command takes; a list is written with commas or its flag "
            "repeated, and a name with blanks in quotes"
        )
    return UsageError(printable(message), ctx=ctx)


def _in_other_command(word: str, ctx: Any) -> str | None:
    """Say which other commands have the flag, and how the command of all stages takes that of one."""
    flag = word.replace("_", "-")
    commands = getattr(ctx.parent.command, "commands", {}) if ctx.parent else {}
    having = {name: p.name for name, other in commands.items() for p in other.params if flag in p.opts}
    if not having:
        return None
    advice = f"it is a flag of {', '.join(f'`saemill {name}`' for name in having)}"
    stages = [f"--set {name}.{having[name]}=" for name in STAGES if name in having]
    return f"{advice}; here it is {' or '.join(stages)}" if stages and ctx.command.name == "run" else advice
