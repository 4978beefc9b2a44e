"""Commands whose help has their own options first, the others grouped in sections."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import click
from click.core import ParameterSource

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
#: Key of the context under which help is complete.
SHOW_ALL = "ewq.show_all"


class SectionOption(click.Option):
    """An option that belongs to a section of the help; None for the first one."""

    def __init__(self, *args: Any, section: str | None = None, **kwargs: Any) -> None:
        """Keep the section."""
        super().__init__(*args, **kwargs)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose `--help` names the options of sections in a line each.

    `--help-all` shows every option with its help.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """All options, and `--help-all` before `--help`."""
        params = super().get_params(ctx)
        params.insert(-1, _HELP_ALL)
        return params

    def format_options(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        """The command's own options, then the sections."""
        sections: dict[str | None, list[click.Parameter]] = {None: []}
        for param in self.get_params(ctx):
            if isinstance(param, click.Argument):
                continue
            sections.setdefault(getattr(param, "section", None), []).append(param)
        _write(ctx, formatter, "Options", sections.pop(None))
        if ctx.meta.get(SHOW_ALL):
            for title, params in sections.items():
                _write(ctx, formatter, str(title), params)
        elif sections:
            with formatter.section("More options, explained by --help-all"):
                flags = [
                    " ".join(max(param.opts, key=len) for param in params)
                    for params in sections.values()
                ]
                titles = [str(title).removeprefix("Options of ") for title in sections]
                formatter.write_dl(list(zip(titles, flags, strict=True)))


def _write(
    ctx: click.Context,
    formatter: click.HelpFormatter,
    title: str,
    params: list[click.Parameter],
) -> None:
    records = [record for param in params if (record := param.get_help_record(ctx))]
    with formatter.section(title):
        formatter.write_dl(records)


def _show_all(ctx: click.Context, param: click.Parameter, is_asked: bool) -> None:
    if is_asked and not ctx.resilient_parsing:
        ctx.meta[SHOW_ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


_HELP_ALL = click.Option(
    ["--help-all"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_all,
    help="Show the help of every option and exit.",
)


class DefaultGroup(click.Group):
    """A group whose first argument is a subcommand or belongs to the default one."""

    def __init__(self, *args: Any, default: str = "", **kwargs: Any) -> None:
        """Remember which command takes what no subcommand takes."""
        super().__init__(*args, **kwargs)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command in front of what is no subcommand."""
        own = set(self.commands) | set(ctx.help_option_names)
        if args and args[0] not in own:
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The default command's help, then the subcommands'."""
        with self.commands[self.default].make_context(
            ctx.info_name, [], parent=ctx.parent, resilient_parsing=True
        ) as sub:
            sub.command.format_help(sub, formatter)
        with formatter.section("Subcommands"):
            formatter.write_dl(
                [
                    (name, command.get_short_help_str(limit=66))
                    for name, command in self.commands.items()
                    if name != self.default
                ]
            )


def option(
    *args: Any, section: str | None = None, default: Any = None, **kwargs: Any
) -> Decorator:
    """An option in a section of the help; a default is shown."""
    kwargs.setdefault("show_default", default is not None)
    return click.option(
        *args, cls=SectionOption, section=section, default=default, **kwargs
    )


def all_of(options: Iterable[Decorator]) -> Decorator:
    """One decorator of several, in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for each in reversed(list(options)):
            function = each(function)
        return function

    return decorate


def collected(
    options: Iterable[Decorator], arguments: Callable[[dict[str, Any]], dict[str, Any]]
) -> Decorator:
    """Options that a command takes as typed values.

    Args:
        options: Decorators of click.
        arguments: Takes the values of all options of the command and gives the
            command's arguments: those of these options replaced by typed ones.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(**values: Any) -> Any:
            return function(**arguments(values))

        return all_of(options)(call)

    return decorate


def given_options(flags: Iterable[str] | None = None) -> list[click.Parameter]:
    """The options that were given on the command line; of some flags, in their order.

    Args:
        flags: Such as `--pre`; None for every option of the command.
    """
    ctx = click.get_current_context()
    options = {opt: p for p in ctx.command.params for opt in p.opts}
    return [
        options[flag]
        for flag in (options if flags is None else flags)
        if flag in options
        and ctx.get_parameter_source(options[flag].name or "")
        is ParameterSource.COMMANDLINE
    ]
