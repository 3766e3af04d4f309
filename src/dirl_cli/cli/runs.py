"""`dirl runs`: look at the runs on the disk. It has no configuration, reads files alone and imports no torch."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dirl_cli.errors import DirlError

if TYPE_CHECKING:
    from dirl_cli.overview.summary import RunFiles

Run = Annotated[str, typer.Argument(metavar="RUN", help="A directory, or a name in runs/.")]
Compared = Annotated[list[str], typer.Argument(metavar="RUN RUN…", help="Directories, or names in runs/.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw their curves, too: a .png, .svg or .pdf.")
]
ReportTo = Annotated[Path | None, typer.Option("--to", metavar="FILE", help="Where, instead of RUN/report.html.")]
LIST = "list"  # what `dirl runs` does where none of its commands follows


class ListingGroup(TyperGroup):
    """A group that takes directories in the place of a command, and lists them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and not args[0].startswith("-")):
            args = [LIST, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=ListingGroup,
    help="List runs: those in runs/, or dirl runs DIR…",
    subcommand_metavar="[DIR]… or COMMAND RUN…",
    rich_markup_mode=None,
)


@contextmanager
def telling_errors() -> Iterator[None]:
    """End with the sentence of what the user can fix."""
    from dirl_cli.console import replace_unencodable

    replace_unencodable(sys.stdout, sys.stderr)
    try:
        yield
    except DirlError as error:
        typer.echo(f"dirl runs: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


@app.command(LIST, hidden=True)
def list_command(directories: Annotated[list[Path] | None, typer.Argument(metavar="[DIR]…")] = None) -> None:
    with telling_errors():
        list_runs(directories or [])


def list_runs(directories: Sequence[Path]) -> None:
    """Print the table of the runs below some directories. Raises DirlError where one is none."""
    from dirl_cli.console import PlainConsole
    from dirl_cli.overview.find import RUNS, find_runs
    from dirl_cli.overview.listing import show_runs
    from dirl_cli.overview.status import status_of

    roots = directories or [RUNS]
    if not directories and not RUNS.exists():
        typer.echo("no runs yet: begin one with dirl sft")
        return
    for root in roots:
        if not root.is_dir():
            commands = ", ".join(str(command.name) for command in app.registered_commands if not command.hidden)
            raise DirlError(f"{root} is no directory: give one that holds runs, or a command ({commands})")
    runs = [status_of(run) for root in roots for run in find_runs(root)]
    if not runs:
        typer.echo(f"no runs in {', '.join(map(str, roots))}: begin one with dirl sft")
        return
    show_runs(runs, roots[0] if len(roots) == 1 else Path(), PlainConsole())


@app.command("show", help="Show a run: settings, figures, how it goes on.")
def show_command(run: Run) -> None:
    from dirl_cli.console import PlainConsole
    from dirl_cli.overview.find import run_named
    from dirl_cli.overview.summary import read_run, show_summary

    with telling_errors():
        files = read_run(run_named(run))
        show_summary(files, departures_of(files), PlainConsole())


@app.command("compare", help="Show runs side by side: figures, settings.")
def compare_command(runs: Compared, plot: Plot = None) -> None:
    from dirl_cli.console import PlainConsole
    from dirl_cli.overview.comparison import draw_comparison, show_side_by_side
    from dirl_cli.overview.find import run_named
    from dirl_cli.overview.summary import read_run

    with telling_errors():
        if len(runs) < 2:
            raise DirlError("one run alone is nothing to compare: give two or more")
        files = [read_run(run_named(run)) for run in runs]
        show_side_by_side(files, PlainConsole())
        if plot:
            draw_comparison(files, plot)
            typer.echo(str(plot))


@app.command("report", help="Write a run as one page of HTML, to keep or send.")
def report_command(run: Run, to: ReportTo = None) -> None:
    from dirl_cli.overview.find import run_named
    from dirl_cli.overview.page import write_page
    from dirl_cli.overview.summary import read_run

    with telling_errors():
        files = read_run(run_named(run))
        file = to or files.status.directory / "report.html"
        write_page(files, departures_of(files), file)
        typer.echo(str(file))


def departures_of(run: "RunFiles") -> list[str]:
    """The settings of a run that are no defaults."""
    from dirl_cli.cli.departures import departures
    from dirl_cli.overview.summary import said_words

    if not run.settings:
        return []
    return departures(run.status.command, run.settings, said_words(run.environment))
