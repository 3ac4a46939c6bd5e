"""What is wrong with a command line, in one sentence that says what to do instead.

click knows what it could not read; here is what its user may have meant. Loaded only when somebody
has made a mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from pmemfs.cli.catalogue import COMMANDS
from pmemfs.errors import BadUsage
from pmemfs.text import did_you_mean

_COMMANDS_ELSEWHERE = {
    "add": "create", "format": "create", "init": "create", "make": "create", "mkfs": "create",
    "new": "create", "create-namespace": "create",
    "attach": "mount", "import": "mount", "detach": "umount", "eject": "umount",
    "export": "umount", "stop": "umount", "unmount": "umount",
    "ls": "list", "lsblk": "list", "mounts": "list", "ps": "list", "status": "list",
    "show": "info", "describe": "info", "dump": "info", "df": "info",
    "fsck": "check", "repair": "check", "scrub": "check", "verify": "check",
    "extend": "resize", "expand": "resize", "grow": "resize", "growfs": "resize",
    "truncate": "resize", "iostat": "stat", "stats": "stat", "top": "stat",
    "bench": "compare", "benchmark": "compare", "diff": "compare", "versus": "compare",
    "cp": "copy", "dd": "copy", "transfer": "copy",
    "discard": "trim", "fstrim": "trim", "fiemap": "extents", "filefrag": "extents",
    "sync": "flush", "writeback": "flush", "drop": "cache drop",
}  # fmt: skip
"""What other tools, or other words, call a command of ours."""

_NO_COMMANDS = {
    **dict.fromkeys(
        ("delete", "destroy", "remove", "rm"),
        "a pool goes with its file: unmount it, and remove the file with 'rm'",
    ),
    "decrypt": "what is encrypted stays so: copy it to a directory that is not (cp -a)",
    **dict.fromkeys(
        ("compress", "decompress", "uncompress"),
        "'pmemfs set PATH compression=zstd' (or none), and then 'pmemfs rewrite PATH'",
    ),
    "help": "'pmemfs --help' lists the commands",
    "version": "'pmemfs --version' says it",
    "remount": "'mount -o remount,OPTIONS MOUNTPOINT' is the way",
}
"""What no command does."""

_OPTIONS_ELSEWHERE = {
    "--bs": "--page-size", "--blocksize": "--page-size", "--block-size": "--page-size",
    "--capacity": "--size", "--length": "--size", "--label": "--name", "--readonly": "--read-only",
    "--ro": "--read-only", "--overwrite": "--force", "--yes": "--force", "--thin": "--sparse",
    "--fix": "--repair", "--type": "--mode", "--memmap": "--scheme", "--interval": "--watch",
    "--options": "-o", "--debug": "--verbose", "--silent": "--quiet", "-j": "--json",
    "-s": "--size", "-h": "--help", "--colour": "--color", "--heatmap": "--map",
    "--svg": "--picture", "--png": "--picture", "--inode": "--file", "--page": "--pfn",
}  # fmt: skip


def as_bad_usage(error: click.ClickException) -> BadUsage:
    """The error of ours that says what click found."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    return BadUsage(why=" ".join(_sentence(error, context).split()))


def _sentence(error: click.ClickException, context: click.Context | None) -> str:
    is_empty = isinstance(error, click.exceptions.NoArgsIsHelpError)
    if is_empty or error.message == "Missing command.":
        return f"a command is missing{_where(context)}"
    unknown = re.fullmatch(r"No such command '(.*)'\.", error.message, re.DOTALL)
    if unknown and context:
        return _unknown_command(unknown[1], context)
    if isinstance(error, click.NoSuchOption):
        return _unknown_option(error, context)
    if isinstance(error, click.MissingParameter):
        return f"{_name(error.param)} is missing; {_usage(context)}"
    if isinstance(error, click.BadParameter):
        return f"{_name(error.param)}: {_plain(error.message)}"
    if isinstance(error, click.BadOptionUsage):
        if "does not take a value" in error.message:
            return f"{error.option_name} takes no value"
        return f"{error.option_name} needs a value; --help says which"
    extra = re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", error.message, re.DOTALL)
    if extra:
        return f"there is no place for '{extra[1]}'; {_usage(context)}"
    return _plain(error.message)


def _unknown_command(name: str, context: click.Context) -> str:
    if name in _NO_COMMANDS:
        return f"there is no command '{name}'; {_NO_COMMANDS[name]}"
    group = context.command
    known = group.list_commands(context) if isinstance(group, click.Group) else []
    elsewhere = _COMMANDS_ELSEWHERE
    if context.parent is not None:
        # Such as `pmemfs cache flush`: what other pools have as well is outside of the group.
        elsewhere = {command: f"pmemfs {command}" for command in COMMANDS}
    meant = did_you_mean(name, known, elsewhere)
    return f"there is no command '{name}'{meant or _where(context)}"


def _unknown_option(error: click.NoSuchOption, context: click.Context | None) -> str:
    known = list(_options(context)) if context else []
    elsewhere = {name: ours for name, ours in _OPTIONS_ELSEWHERE.items() if ours in known}
    meant = did_you_mean(error.option_name, known, elsewhere)
    return f"there is no option {error.option_name}{meant or _where(context)}"


def _where(context: click.Context | None) -> str:
    return f"; '{context.command_path if context else 'pmemfs'} --help' lists them"


def _options(context: click.Context) -> Iterator[str]:
    for parameter in context.command.get_params(context):
        yield from parameter.opts if isinstance(parameter, click.Option) else ()


def _name(parameter: click.Parameter | None) -> str:
    """A parameter as its user writes it."""
    if isinstance(parameter, click.Argument):
        name = parameter.metavar or parameter.human_readable_name
        # Of a property its name, because the mistake says what values it may have.
        return name.partition("={")[0].strip("{}").replace("|", " or ")
    return max(parameter.opts, key=len) if parameter else "a word"


def _usage(context: click.Context | None) -> str:
    pieces = context.command.collect_usage_pieces(context) if context else []
    return f"usage: {context.command_path if context else 'pmemfs'} {' '.join(pieces)}"


def _plain(message: str) -> str:
    text = message.strip().rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
