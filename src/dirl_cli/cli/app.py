"""The `dirl` command: Typer reads the command line, Hydra composes the configuration.

`dirl NAME` composes conf/NAME.yaml and hands the result to `run` in dirl_cli/commands/NAME.py.
Nothing heavier than Typer is imported until a command starts, so help and completion stay quick.
"""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dirl_cli.cli import runs
from dirl_cli.errors import DirlError

app = typer.Typer(
    help="Post-train block-diffusion language models.",
    epilog="To begin with: dirl sft, then dirl eval model=runs/sft/tiny-arithmetic/model",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing boxes doubles the time that help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)

ANY_OPTION = {"ignore_unknown_options": True}  # so that a sentence says how keys are written
TRAINING = ("sft", "rl", "dpo")
PLANNED = (*TRAINING, "eval")
View = StrEnum("View", ["job", "hydra", "all"])
Topic = StrEnum("Topic", ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"])


def complete(ctx: typer.Context, incomplete: str) -> list[str]:
    from dirl_cli.cli.complete import complete_override

    words = ctx.params.get("overrides") or []
    return complete_override(str(ctx.command.name), words, incomplete, ctx.params.get("config_dir"))


def show_version(is_set: bool) -> None:
    if is_set:
        from dirl_cli.files import installed

        typer.echo(f"dirl {installed('dirl') or 'of a checkout'}")
        raise typer.Exit


@app.command("version", hidden=True)
def tell_version() -> None:
    show_version(True)


@app.command("help", hidden=True)
def tell_help(command: Annotated[str, typer.Argument()] = "") -> None:
    app([command, "--help"] if command else ["--help"], prog_name="dirl")


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="What differs from conf/.", autocompletion=complete),
]
Requests = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="GROUP=NAME or ID", help="What to fetch: choices in conf/, ids on the Hub.", autocompletion=complete
    ),
]
Answers = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN or FILE", help="What holds the answers; several side by side.", autocompletion=complete
    ),
]
To = Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Where to put it, instead of the Hub's cache.")]
Multirun = Annotated[bool, typer.Option("--multirun", "-m", help="Run every combination of comma-separated values.")]
Cfg = Annotated[View | None, typer.Option("--cfg", "-c", help="Print the composed config and exit.")]
Info = Annotated[Topic | None, typer.Option("--info", "-i", help="Explain where the config comes from and exit.")]
ConfigDir = Annotated[
    Path | None,
    typer.Option("--config-dir", "-cd", exists=True, file_okay=False, help="Your config tree; it wins over ours."),
]
Version = Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")]


@app.callback()
def main(version: Version = False) -> None:
    pass


def add(name: str, summary: str, example: str) -> None:
    """Add a command whose whole configuration is Hydra's."""

    @app.command(name, help=summary, epilog=hints(name, example), context_settings=ANY_OPTION)
    def command(
        overrides: Overrides = None,
        multirun: Multirun = False,
        cfg: Cfg = None,
        info: Info = None,
        config_dir: ConfigDir = None,
    ) -> None:
        run_command(name, overrides or [], multirun, cfg, info, config_dir)


def hints(name: str, example: str) -> str:
    """The lines below a command's options in its help."""
    group = {"rl": "algo", "dpo": "likelihood"}.get(name, "model")
    codes = "\n\ndry_run=true looks first. Exit code 3: it does not fit" if name in PLANNED else ""
    return f"Such as: dirl {name} {example}\n\nEvery key: dirl {name} --cfg job. A group's choices: {group}=help{codes}"


def run_command(
    name: str, words: list[str], multirun: bool, cfg: View | None, info: Topic | None, config_dir: Path | None
) -> None:
    """Launch a command; print what the user can fix in one sentence, and exit with the error's code.

    words: overrides, as they were typed. cfg, info: what to print instead of running.
    """
    from dirl_cli.cli.launch import launch

    options = {"--multirun": multirun, "--cfg": cfg, "--info": info}
    flags = [flag for flag, value in options.items() if value]
    if len(flags) > 1:
        raise typer.BadParameter(f"{' and '.join(flags)} exclude each other")
    if cfg or info:
        flags.append(str(cfg or info))

    # Read before the launch, which sets the variable itself.
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        launch(name, flags, words, config_dir)
    except DirlError as error:
        if full_error:
            raise
        typer.echo(f"dirl {name}: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


add("sft", "Fine-tune a model on demonstrations.", "model=sdar8b data=demonstrations.json steps=200")
add("rl", "Reinforce a model with verifiable rewards.", "model=sdar1b data=bigmath algo=dipo")
add("dpo", "Prefer the better answer of pairs.", "model=sdar8b data=pairs.jsonl dpo.beta=0.2")
add("eval", "Score a model on a benchmark.", "model=runs/sft/tiny-arithmetic/model bench=problems.json samples=4")
add("generate", "Sample completions of prompts.", "model=sdar8b prompt='What is 7 times 8?' watch=true")
add("chat", "Converse with a model in the terminal.", "model=sdar8b decoding.temperature=0.7")
add("serve", "Answer requests over HTTP, in OpenAI's format.", "model=runs/sft/tiny-arithmetic/model")
add("merge", "Make a LoRA adapter part of a model's weights.", "model=sdar8b model.adapter=DIR to=merged")


@app.command(
    help="Look at answers: one HTML file to open in a browser.",
    context_settings=ANY_OPTION,
    epilog=hints("view", "runs/rl/tiny-arithmetic-dipo, or: dirl view FILE export=answer.svg number=3"),
)
def view(
    overrides: Answers = None,
    multirun: Multirun = False,
    cfg: Cfg = None,
    info: Info = None,
    config_dir: ConfigDir = None,
) -> None:
    from dirl_cli.cli.overrides import collect_bare_words

    run_command("view", collect_bare_words(overrides or [], "answers"), multirun, cfg, info, config_dir)


@app.command(
    help="Fetch models, benchmarks and data sets from the Hub.",
    context_settings=ANY_OPTION,
    epilog=hints("download", "model=sdar8b bench=all, or: dirl download JetLM/SDAR-8B-Chat datasets/Auraithm/MATH500"),
)
def download(
    overrides: Requests = None,
    to: To = None,
    multirun: Multirun = False,
    cfg: Cfg = None,
    info: Info = None,
    config_dir: ConfigDir = None,
) -> None:
    from dirl_cli.cli.overrides import collect_bare_words, quote

    if to and multirun:
        raise typer.BadParameter("--to and --multirun exclude each other")
    words = collect_bare_words(overrides or [], "ids")
    if to:
        words.append(f"to={quote(str(to))}")
    run_command("download", words, multirun, cfg, info, config_dir)


@app.command()
def doctor() -> None:
    """Say what works on this machine, and the remedies."""
    from dirl_cli.console import PlainConsole
    from dirl_cli.doctor.examination import examine, is_sound, show

    needed, extras = examine()
    show(needed, extras, PlainConsole())
    if not is_sound([*needed, *extras]):
        raise typer.Exit(1)


app.add_typer(runs.app, name="runs")
