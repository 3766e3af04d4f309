"""What is compressed is read like what is not, by everything that reads a run's answers."""

import gzip
import json
import shutil
import subprocess

import pytest

from dirl_cli.cli.overrides import holds_answers
from dirl_cli.dpo.pairs import learnable_answers
from dirl_cli.errors import DirlError
from dirl_cli.line_files import compressed, lines_of, step_files, step_of
from dirl_cli.overview.answers import answers_to_read
from dirl_cli.rl.replay import ReplayedRollouts, rollouts_of
from dirl_cli.rollout.storage import read_rollout, rollout_path, write_rollout
from dirl_cli.sft.answer_files import Naming, read_records
from dirl_cli.viewer.answer_sources import read_source
from dirl_cli.viewer.payload import TokenReader
from dirl_cli.viewer.served_answers import AnswerFile, ServedAnswers
from tests.helpers.rl_runs import config, lines, run, save_sharp_model, weights
from tests.helpers.shown_answers import Words, run_of
from tests.helpers.small import small_lm


def packed(directory, steps):
    """A copy of a run in which the rollouts of some steps are compressed."""
    copy = shutil.copytree(directory, directory.with_name(f"{directory.name} of {len(steps)}") / directory.name)
    for step in steps:
        path = rollout_path(copy / "rollouts", step)
        write_rollout(path.with_name(f"{path.name}.gz"), read_rollout(path))
    return copy


def test_a_compressed_rollout_is_the_plain_one_to_any_reader_of_gzip_and_the_same_bytes_each_time(tmp_path):
    plain = rollout_path(run_of(tmp_path) / "rollouts", 1)
    content = plain.read_bytes()
    path = rollout_path(tmp_path, 1, compress=True)
    write_rollout(path, read_rollout(plain))
    assert gzip.decompress(path.read_bytes()) == content == b"".join(lines_of(path)) == b"".join(lines_of(plain))
    assert subprocess.run(["zcat", path], capture_output=True, check=True).stdout == content
    assert path.read_bytes() == b"".join(compressed(content.splitlines(keepends=True)))
    assert path.read_bytes()[4:8] == b"\0\0\0\0", "gzip's time of writing"


def test_of_a_step_there_is_the_file_that_was_written_last_alone(tmp_path):
    answers = read_rollout(rollout_path(run_of(tmp_path / "run") / "rollouts", 1))
    for compress, count in ((False, 1), (True, 2), (False, 1)):
        write_rollout(rollout_path(tmp_path, 7, compress), answers[:count])
        [(step, path)] = step_files(tmp_path).items()
        assert (step, path.suffix == ".gz", read_rollout(path)) == (7, compress, answers[:count])
        assert list(tmp_path.glob("*step-*")) == [path]


def test_only_the_names_of_steps_are_a_steps(tmp_path):
    names = {"step-000012.jsonl": 12, "step-7.jsonl.gz": 7}
    for other in ("step-x.jsonl", "step-1.json", "step-1.jsonl.gz.bak", ".step-000001.jsonl.partial", "a-step-1.jsonl"):
        names[other] = None
    assert {name: step_of(tmp_path / name) for name in names} == names
    for name in names:
        (tmp_path / name).touch()
    assert list(step_files(tmp_path)) == [7, 12]


def test_every_reader_takes_a_run_of_which_some_steps_are_compressed(tmp_path):
    run = run_of(tmp_path / "run", steps=3)
    for steps in ((2, 3), (1, 2, 3)):
        mixed = packed(run, steps)
        assert sorted(path.suffix for path in (mixed / "rollouts").iterdir()).count(".gz") == len(steps)
        assert read_source(mixed, 100).answers == read_source(run, 100).answers
        assert read_source(mixed, 2).answers == read_source(run, 2).answers
        assert answers_to_read(mixed) == answers_to_read(run)
        assert [served(mixed).read(place) for place in (5, 0, 3, 2)] == [served(run).read(p) for p in (5, 0, 3, 2)]
        assert served(mixed).search("five", 1) == {"places": [1, 3, 5], "next": None}

        naming = Naming("run", {}, None, ())
        assert without_places(read_records(mixed, naming)) == without_places(read_records(run, naming))
        lm = small_lm(block_size=4)
        assert without_places(learnable_answers(mixed, lm)) == without_places(learnable_answers(run, lm))
        replayed, expected = (ReplayedRollouts(rollouts_of(directory, 3), lm).collect(1) for directory in (mixed, run))
        assert replayed == expected and replayed.groups
        assert holds_answers(mixed) and holds_answers(rollout_path(mixed / "rollouts", 3, compress=True))


def served(directory) -> ServedAnswers:
    files = [AnswerFile(0, path, "rollouts", step) for step, path in step_files(directory / "rollouts").items()]
    return ServedAnswers(files, [TokenReader(Words())], lambda file, number: "")


def without_places(answers):
    return [record for _, record in answers]


def test_a_compressed_step_alone_is_called_after_its_run(tmp_path):
    file = rollout_path(packed(run_of(tmp_path / "words"), (2,)) / "rollouts", 2, compress=True)
    source = read_source(file, 10)
    assert source.name == "words step-000002" and {answer.step for answer in source.answers} == {2}


def test_a_served_file_that_is_written_anew_is_read_anew(tmp_path):
    directory = packed(run_of(tmp_path / "run", steps=1), (1,))
    answers = served(directory)
    before = answers.read(0)
    file = rollout_path(directory / "rollouts", 1, compress=True)
    write_rollout(file, read_rollout(file)[1:])
    assert answers.read(0) != before


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda content: content[:-20], "ended before the end-of-stream"),
        (lambda content: content[:40] + b"\xff" * 9 + content[49:], "rror"),
        (lambda content: content[:-8] + b"\0" * 8, "CRC check failed"),
        (gzip.decompress, "Not a gzipped file"),
    ],
)
def test_a_torn_or_foreign_gzip_file_is_told_in_one_sentence(tmp_path, spoil, reason):
    directory = packed(run_of(tmp_path / "run", steps=1), (1,))
    file = rollout_path(directory / "rollouts", 1, compress=True)
    file.write_bytes(spoil(file.read_bytes()))
    for read in (read_rollout, lambda path: read_source(path, 5), lambda path: served(directory)):
        match = rf"step-000001.jsonl.gz is no whole gzip file \(.*{reason}.*\): copy it again, or remove it$"
        with pytest.raises(DirlError, match=match):
            read(file)
    answers_to_read(directory)  # which shows what there is


def test_a_run_goes_on_with_the_other_setting_and_a_replay_reads_both(tmp_path):
    model = save_sharp_model(tmp_path / "model")
    run(config(model, "save_every=2", "rl.compress_rollouts=true"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000004")
    through = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    run(config(model, "save_every=2"), tmp_path / "run")
    suffixes = [path.suffix for path in step_files(tmp_path / "run/rollouts").values()]
    assert suffixes == [".gz", ".gz", ".jsonl", ".jsonl"]
    assert len(list((tmp_path / "run/rollouts").iterdir())) == 4, "what was written anew took the place of the other"

    run(config(model, f"rl.replay={tmp_path}/run"), tmp_path / "replay")
    assert weights(tmp_path / "replay") == weights(tmp_path / "run") == through
    assert [line["step"] for line in lines(tmp_path / "replay")] == [0, 1, 2, 3, 4]
    assert json.loads(next(lines_of(rollout_path(tmp_path / "run/rollouts", 1, compress=True))))["sample"] == 0
