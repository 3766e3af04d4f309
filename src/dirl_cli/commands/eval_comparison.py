"""Evaluations side by side: two by `dirl eval compare=[A,B]`, or those of a sweep. Imports no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dirl_cli.console import PlainConsole
from dirl_cli.errors import DirlError
from dirl_cli.evaluation import compare, report, sweep
from dirl_cli.evaluation.harness_results import TaskScore, facts_text, score_line, scores_by_job, scores_table
from dirl_cli.evaluation.likelihood import likelihoods, show_likelihoods
from dirl_cli.evaluation.result_card import read_evaluation
from dirl_cli.files import write_json, write_text

console = PlainConsole()


def show_comparison(names: Sequence[str]) -> None:
    """Print how much two evaluations differ, and whether that is more than chance would have it."""
    if len(names) != 2:
        raise DirlError("compare takes two evaluations: compare=[A,B]")
    a = read_evaluation(names[0])
    b = read_evaluation(names[1])

    # Pairs differ less by chance than two independent samples do: problems in common decide how it is compared.
    common = compare.common_problems(a, b)
    if len(common) > 1:
        how = f"paired over the {len(common)} problems that both answered"
    else:
        how = "not paired, since they have no problems in common that both hold answers to"
    rows = {}
    for name, difference in compare.compare(a, b, common):
        rows[name] = compare.difference_cells(name, difference)

    for letter, evaluation in (("A", a), ("B", b)):
        console.print(f"{letter}: {evaluation.of} · {evaluation.name}", soft_wrap=True)
    console.print(report.draw(f"B against A, {how}", rows, caption=compare.CAPTION))
    differing = compare.differing_settings(a, b)
    if differing:
        console.print(f"not the same: {', '.join(differing)}")


def after_sweep(title: str, jobs: Sequence[tuple[Sequence[str], Path]]) -> None:
    """Show the evaluations of a sweep together: a table here, a CSV file and a picture beside their directories.

    title: what was swept over. jobs: the overrides that set each apart, and its directory.
    """
    from dirl_cli.report.plot import scatter

    if by_job := likelihoods(jobs):
        show_likelihoods(title, sweep.folder_of(jobs), by_job, console)
        return
    if scores := scores_by_job(jobs):
        show_scores(title, sweep.folder_of(jobs), scores)
        return

    # A picture is passed around without its folder: its name says what all have in common, unless the folder did.
    members = [sweep.Member(sweep.overrides(job), read_evaluation(out)) for job, out in jobs]
    folder = sweep.folder_of(jobs)
    names = [name for name in sweep.common_names(members) if name not in folder.name]
    title = "-".join([*names, title])

    rows = sweep.rows(members)
    header = ", ".join(members[0].overrides)
    console.print(report.draw(title, rows, header, sweep.caption(members, list(rows))))

    if areas := sweep.areas_text(sweep.speed_curves(members)):
        console.print(areas, soft_wrap=True)

    files = [folder / f"{title}.csv", folder / f"{title}.json"]
    write_text(files[0], sweep.as_csv(members))
    write_json(files[1], sweep.as_card(members))
    if series := sweep.series_drawn(members):
        files.append(files[0].with_name(f"{title}.png"))
        scatter(series, f"{title}: accuracy ± its standard error", "tokens per forward (TPF)", files[-1])
    console.print(" · ".join(map(str, files)), soft_wrap=True)


def show_scores(
    title: str, folder: Path, by_job: Mapping[str, tuple[Sequence[TaskScore], Mapping[str, float]]]
) -> None:
    """Print the scores of a sweep's jobs, a table for each, and write them to one CSV file in `folder`."""
    lines = []
    for name, (scores, facts) in by_job.items():
        console.print(scores_table(name, scores))
        console.print(facts_text(facts), soft_wrap=True)
        lines.append({"run": name, **score_line(scores, facts)})
    file = folder / f"{title}.csv"
    write_text(file, report.csv_text(lines))
    console.print(str(file), soft_wrap=True)
