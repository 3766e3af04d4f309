"""The trackers: a run that goes on is the same run there, and no step is told twice."""

import sys
from types import SimpleNamespace

import pytest
from accelerate import PartialState

from dirl_cli.errors import DirlError
from dirl_cli.report.trackers import Mlflow, TensorBoard, Trackio, Wandb, flat

CONFIG = {"steps": 9, "rl": {"beta": 0.0, "hints": None}}
ALL = {
    "tensorboard": TensorBoard(),
    "wandb": Wandb("dirl", "online"),
    "trackio": Trackio("dirl"),
    "mlflow": Mlflow("x"),
}


@pytest.fixture(autouse=True)
def accelerate_runs():
    PartialState()  # as in every run


def crash_twice(logger, out):
    """A run that is killed after step 4 and again after step 3, each time with a checkpoint of step 2."""
    for after, losses in ((-1, (4.0, 3.0, 2.0, 1.0)), (2, (2.0,)), (2, (2.0, 1.0, 0.5))):
        tracker = logger.open(out, CONFIG, after)
        for step, loss in enumerate(losses, start=max(after, 0) + 1):
            tracker.log({"loss": loss, "reward/accuracy": 0.5}, step=step)
        tracker.finish()


TOLD = [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0), (5, 0.5)]


def test_tensorboard_shows_each_step_once_and_the_settings(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    crash_twice(TensorBoard(), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == TOLD
    [text] = events.Tensors("config/text_summary")
    assert b'"hints": null' in text.tensor_proto.string_val[0]


def test_wandb_is_given_its_run_again_and_each_step_once(tmp_path, monkeypatch):
    asked, told = [], []

    def init(*, entity, project, dir, id, name, config, mode, resume):  # which are some of its keywords
        asked.append((id, resume, config, mode))
        return SimpleNamespace(id="abc", log=lambda data, step: told.append((step, data["loss"])), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    settings = Wandb(project="dirl", mode="offline")
    crash_twice(settings, tmp_path)
    again = ("abc", "allow", CONFIG, "offline")
    assert asked == [(None, None, CONFIG, "offline"), again, again]
    assert told == TOLD

    settings.open(tmp_path, CONFIG, -1)  # the run begins anew in its directory
    assert asked[-1][0] is None


def test_a_run_of_an_earlier_version_of_which_only_the_id_is_kept_goes_on_in_wandb(tmp_path, monkeypatch):
    run = SimpleNamespace(id="abc", log=lambda data, step: None, finish=lambda: None)
    asked = []
    stand_in = SimpleNamespace(init=lambda **options: asked.append(options["id"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    (tmp_path / "wandb_run_id").write_text("abc")
    Wandb("dirl", "online").open(tmp_path, CONFIG, 7).log({"loss": 1.0}, step=8)
    assert asked == ["abc"]
    assert (tmp_path / "wandb_run_id").read_text() == "abc\n-1\n8\n"


def test_trackio_holds_each_step_once_in_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio import context_vars
    from trackio.sqlite_storage import SQLiteStorage

    out = tmp_path / "my-run"
    crash_twice(Trackio("dirl-test"), out)
    assert context_vars.current_run.get() is None, "which would be ended again at exit"
    [record] = SQLiteStorage.get_run_records("dirl-test")
    assert record["name"].startswith("my-run-")
    logs = SQLiteStorage.get_logs("dirl-test", record["name"])
    assert [(line["step"], line["loss"]) for line in logs] == TOLD
    assert SQLiteStorage.get_run_config("dirl-test", record["name"])["rl"] == CONFIG["rl"]

    Trackio("dirl-test").open(out, CONFIG, -1).log({"loss": 9.0}, step=1)
    assert (out / "trackio_run_name").read_text().split()[0] != record["name"]


@pytest.mark.slow
def test_mlflow_holds_each_step_once_in_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes seconds to make
    mlflow = pytest.importorskip("mlflow")

    crash_twice(Mlflow("dirl"), tmp_path / "my-run")
    assert mlflow.telemetry.utils.is_telemetry_disabled()
    client = mlflow.MlflowClient()
    [experiment] = mlflow.search_experiments(filter_string="name = 'dirl'")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "my-run" and run.info.status == "FINISHED"
    assert run.data.params == {"steps": "9", "rl.beta": "0.0", "rl.hints": "None"}
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")] == TOLD


def test_a_place_where_mlflow_cannot_keep_a_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://runs")
    pytest.importorskip("mlflow")
    with pytest.raises(DirlError, match=r"cannot keep a run in nowhere://runs \(.*\): let MLFLOW_TRACKING_URI name"):
        Mlflow("dirl").open(tmp_path, CONFIG, -1)


def test_mlflow_is_told_settings_by_names_that_it_admits():
    assert flat({"data": {"weights": {"my data(1).jsonl": 2, "a/b.jsonl": 1}}, "gpus": None}) == {
        "data.weights.my data_1_.jsonl": "2",
        "data.weights.a/b.jsonl": "1",
        "gpus": "None",
    }


@pytest.mark.parametrize("package", ALL)
def test_a_tracker_that_is_not_installed_is_named(package, tmp_path, monkeypatch):
    for module in (package, "tensorboardX"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)  # whoever imported it before
    monkeypatch.delattr("torch.utils.tensorboard", raising=False)
    with pytest.raises(DirlError, match=rf"logger={package} needs the package {package} \(.*\): pip install {package}"):
        ALL[package].open(tmp_path, CONFIG, -1)
