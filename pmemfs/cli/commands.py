"""`pmemfs`: the group of all commands, of which only the one that is called is loaded."""

from __future__ import annotations

import click

from pmemfs.cli.catalogue import ABOUT, COMMANDS, HELP_OPTIONS, first_word, help_text
from pmemfs.cli.early import raise_interrupts
from pmemfs.cli.group import loaded
from pmemfs.cli.options import reporting
from pmemfs.cli.running import asks_for_json, run_guarded


class LazyGroup(click.Group):
    """A group of the commands in `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of a pool's life."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command."""
        if cmd_name not in COMMANDS:
            return None
        command = loaded(COMMANDS[cmd_name][0])
        raise_interrupts()
        return command

    def get_help(self, ctx: click.Context) -> str:
        """The same text as without loading anything."""
        return help_text()


@click.group(cls=LazyGroup, help=ABOUT, context_settings={"help_option_names": HELP_OPTIONS})
@reporting
def pmemfs(as_json: bool) -> None:
    """See `ABOUT`."""


def run(command: click.Command, words: list[str]) -> int:
    """Run a command line of the group or of a single command; its exit code."""
    name = first_word(words) if isinstance(command, click.Group) else command.name
    return run_guarded(lambda: _called(command, words), name, as_json=asks_for_json(words))


def _called(command: click.Command, words: list[str]) -> int:
    try:
        # Its own `main` answers an interrupt with an empty line, wherever a progress bar left us.
        with command.make_context(command.name, list(words)) as context:
            result = command.invoke(context)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except click.ClickException as error:
        from pmemfs.cli.mistakes import as_bad_usage

        raise as_bad_usage(error) from None
