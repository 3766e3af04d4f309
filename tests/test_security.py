"""What SECURITY.md promises: nothing that is read runs, leaves its place, tells a secret or moves the cursor."""

import ast
import builtins
import io
import json
import os
import pickle
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file

from dirl_cli import hub
from dirl_cli.cli import launch, run_dir
from dirl_cli.console import PlainConsole
from dirl_cli.data.chat import encode_messages
from dirl_cli.data.demonstration_rows import demonstration
from dirl_cli.data.rows import read_rows
from dirl_cli.errors import DirlError
from dirl_cli.evaluation.answers import read_answers
from dirl_cli.evaluation.result_card import read_evaluation
from dirl_cli.models.adapter import merge_adapter
from dirl_cli.models.load import SavedModel, diffusion_lm
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM
from dirl_cli.models.tiny import train_tokenizer
from dirl_cli.overview.files import SAFE_LOADER
from dirl_cli.reward.equality import verified
from dirl_cli.text import escape_controls, is_secret, redact
from tests.helpers.paths import ROOT
from tests.helpers.small import SIZES, small_lm

SOURCE = ROOT / "src" / "dirl_cli"
TOKEN, PASSWORD = "hf_abcdefghijklmnopqrstuvwxyz", "correct-horse-battery"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A random model with a tokenizer."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = train_tokenizer(["What is 7 times 8?"])
    model = SDARForCausalLM(SDARConfig(**SIZES | {"vocab_size": len(tokenizer)}))
    diffusion_lm(model, tokenizer, 4, tokenizer.mask_token_id).save(directory)
    return directory


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    for file in saved.iterdir():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "model"


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def refusal(model: Path, device: str = "cpu") -> str:
    with pytest.raises(DirlError) as told:
        SavedModel("mine", str(model)).load("float32", device)
    assert "\n" not in str(told.value)
    return str(told.value)


def trees():
    for file in sorted(SOURCE.rglob("*.py")):
        yield file.relative_to(SOURCE).as_posix(), ast.parse(file.read_text())


# No pickle and no code


def test_no_module_unpickles_or_evaluates_and_servers_and_broadcasts_alone_open_a_port():
    unwanted = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}  # they run what they read
    unwanted |= {"http", "socketserver", "fastapi", "flask", "uvicorn", "aiohttp"}  # they listen
    calls = r"(eval|exec|torch\.load|np\.load|os\.system|yaml\.load|mktemp"
    calls += r"|\w+\.(listen|bind|create_server|load_state|load_checkpoint))"
    for name, tree in trees():
        listens = name in ("serving/listen.py", "viewer/page_server.py")  # which start with a server, and it alone
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and not listens:
                assert not {alias.name.split(".")[0] for alias in node.names} & unwanted, name
            if isinstance(node, ast.ImportFrom):
                assert listens or str(node.module).split(".")[0] not in unwanted, name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                is_signature = called == "inspect.signature(find_reward(name)).bind"
                is_plain = called == "yaml.load" and ast.unparse(node.args[1]) in ("yaml.BaseLoader", "SAFE_LOADER")
                is_confined = called == "exec" and name == "reward/program_server.py"  # in forks, after `confine`
                is_served = called == "socket.create_server" and (listens or name == "rollout/broadcast.py")
                is_harmless = is_signature or is_plain or is_confined or is_served
                assert is_harmless or not re.fullmatch(calls, called), f"{name}: {called}"
                for option in node.keywords:
                    allowed = option.arg not in ("shell", "trust_remote_code", "allow_pickle")
                    assert allowed or ast.unparse(option.value) == "False", f"{name}: {called}"


def test_the_configs_of_runs_are_read_by_a_loader_that_makes_plain_values_alone():
    with pytest.raises(yaml.YAMLError):
        yaml.load("!!python/object/apply:os.system [true]", SAFE_LOADER)


def test_nothing_is_guarded_by_what_an_option_of_python_removes():
    for name, tree in trees():
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], f"{name}: python -O"


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_pickled_weights_are_refused_unread(model, tmp_path):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    for device in ("cpu", "meta"):
        assert "pytorch_model.bin, a pickle, which may hold code and is never loaded" in refusal(model, device)
    assert not (tmp_path / "harm").exists()


def test_an_index_may_name_no_pickle_and_nothing_outside_the_directory(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(weights, tmp_path / "outside.safetensors", {"format": "pt"})
    torch.save(weights, model / "weights.bin")
    for name in ("weights.bin", "../outside.safetensors", str(tmp_path / "outside.safetensors"), "..", 3):
        edit(model / "model.safetensors.index.json", metadata={}, weight_map=dict.fromkeys(weights, name))
        assert refusal(model).endswith(f"names {name!r}, which is no safetensors or JSON file beside it")


def test_a_tokenizer_is_read_from_its_own_directory(model, tmp_path):
    (tmp_path / "tokenizer.4.0.0.json").write_bytes((model / "tokenizer.json").read_bytes())
    edit(model / "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.0.json"])
    assert "tokenizer_config.json names '../tokenizer.4.0.0.json'" in refusal(model)


def test_code_in_a_checkpoint_never_runs(model, tmp_path):
    (model / "harm.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\nclass Harm: pass\n")
    edit(model / "config.json", auto_map={"AutoConfig": "harm.Harm", "AutoModelForCausalLM": "harm.Harm"})
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["harm.Harm", "harm.Harm"]})
    assert SavedModel("mine", str(model)).load("float32", "cpu").tokenizer is not None
    edit(model / "config.json", model_type="harm")
    assert "it needs code of its own, which is never run" in refusal(model)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_checkpoint_does_not_choose_kernels_which_would_be_code_from_the_hub(model, device):
    edit(model / "config.json", _attn_implementation="lab/kernel", attn_implementation="lab/kernel")
    edit(model / "config.json", experts_implementation="lab/kernel")
    lm = SavedModel("mine", str(model)).load("float32", device, "sdpa")
    assert (lm.model.config._attn_implementation, lm.model.config._experts_implementation) != ("lab/kernel",) * 2
    assert lm.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, "is quantised"),
        ({"transformers_weights": "adapter_model.bin"}, "keeps its weights under another name"),
    ],
)
def test_what_would_load_weights_another_way_is_refused(model, changes, sentence):
    edit(model / "config.json", **changes)
    assert sentence in refusal(model)


def test_an_adapter_in_a_model_is_not_loaded_on_the_way(model):
    edit(model / "adapter_config.json", peft_type="LORA", base_model_name_or_path="lab/other")
    assert "holds an adapter too" in refusal(model)


@pytest.mark.parametrize(
    "given", [{"peft_type": "PROMPT_TUNING"}, {"peft_type": "LORA", "megatron_config": {}, "megatron_core": "os"}]
)
def test_only_plain_lora_adapters_are_merged(tmp_path, given):
    pytest.importorskip("peft")
    edit(tmp_path / "adapter_config.json", **given | ({"megatron_config": {"a": 1}} if len(given) > 1 else {}))
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DirlError, match="is no LoRA adapter, or one for Megatron"):
        merge_adapter(small_lm().model, str(tmp_path))


def test_lmdeploy_is_not_told_to_trust_code():
    engine = pytest.importorskip("lmdeploy.pytorch.engine")
    import inspect

    assert inspect.signature(engine.Engine.from_pretrained).parameters["trust_remote_code"].default is False


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ 1 / 0 }}",
        "{{ 9" + "9" * 5000 + " }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(template):
    tokenizer = train_tokenizer(["a"])
    tokenizer.chat_template = template
    with pytest.raises(DirlError, match="the tokenizer's chat template refuses a conversation"):
        encode_messages(tokenizer, [{"role": "user", "content": "a"}])


# Data


def test_a_data_set_with_a_script_is_refused_and_the_script_not_run(tmp_path):
    home = tmp_path / "data"
    home.mkdir()
    (home / "data.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\n")
    (home / "train.jsonl").write_text('{"question": "1+1", "ground_truth_answer": "2"}\n')
    with pytest.raises(DirlError, match="scripts are no longer supported"):
        read_rows(home)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "place",
    [
        "../secret.jsonl",
        "/etc/passwd",
        "https://localhost:1/x.jsonl",
        "zip://*.json::x.zip",
        "a/../../secret.jsonl",
        "~/x",
    ],
)
@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
def test_a_data_set_is_read_from_its_own_directory(tmp_path, place, file):
    home = tmp_path / "data"
    home.mkdir()
    (tmp_path / "secret.jsonl").write_text('{"question": "secret"}\n')
    (home / "train.jsonl").write_text('{"question": "1+1"}\n')
    header = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [{json.dumps(place)}]\n"
    (home / file).write_text(f"---\n{header}---\n" if file == "README.md" else header)
    with pytest.raises(DirlError, match=r"sends its reader to .*, out of its directory"):
        read_rows(home)


def test_archives_are_not_unpacked(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        info = tarfile.TarInfo("0.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    with pytest.raises(DirlError, match="it holds webdataset, and read are json, parquet"):
        read_rows(tmp_path)


def test_names_from_the_hub_lead_nowhere_else():
    names = ["../a.json", "a/../../b.json", "/etc/a.json", "a.py", "ok/a.json", "a.json"]
    wanted = {
        kind: list(filter_repo_objects(names, allow_patterns=hub.ALLOWED[kind], ignore_patterns=hub.IGNORED[kind]))
        for kind in ("dataset", "model")
    }
    assert wanted == {"dataset": ["ok/a.json", "a.json"], "model": ["a.json"]}


@pytest.mark.parametrize("named", ["../../../../evil", "a" * 63, "A" * 64, "a" * 64 + "\n", "", None])
@pytest.mark.parametrize("what", ["sha256 of a file", "commit"])
def test_what_the_hub_calls_a_file_by_leads_nowhere_else(monkeypatch, what, named):
    large = SimpleNamespace(sha256=named if what == "sha256 of a file" else "b" * 64)
    siblings = [SimpleNamespace(rfilename="model.safetensors", size=7, lfs=large)]
    info = SimpleNamespace(sha=named if what == "commit" else "c" * 40, siblings=siblings)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: info)
    with pytest.raises(DirlError, match=r"the Hub names a file or commit of lab/model by .*, which is no hash"):
        hub.inspect_repository("lab/model", "model", None)


# Grading

HOSTILE = [
    r"__import__('os').system('id')",
    r"\text{__import__('os').system('id')}",
    "().__class__.__bases__[0].__subclasses__()",
    "[x for x in (1,2)]",
    r"\operatorname{eval}(1)",
    r"\input{/etc/passwd}",
    r"\immediate\write18{id}",
    r"a_{\text{__class__}}",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    r"\sum_{i=1}^{5} i x",
    r"1{,}000.50x",
    "0x10 + 1_000 + 1e3 x",
    "x\x00y\u0661\u0662",
    r"f(x)=\text{lambda: 1}",
]


def test_grading_evaluates_numbers_and_names_only(monkeypatch):
    """Sympy hands the digits of a number to `eval`; nothing else of an answer may come there."""
    evaluated, evaluate = [], builtins.eval
    verified("2 x", r"\sqrt{4} \cdot y^{2}")  # whatever sympy imports at first
    monkeypatch.setattr(builtins, "eval", lambda code, *names: [evaluated.append(code), evaluate(code, *names)][1])
    executed, execute = set(), builtins.exec
    monkeypatch.setattr(builtins, "exec", lambda code, *names: [executed.add(code), execute(code, *names)][1])
    for answer in HOSTILE:
        verified("2 x", answer)
    texts = [code for code in executed if isinstance(code, str)]  # others are modules being imported
    assert all(re.match(r"from sympy import \*$|def monomial_", code) for code in texts)  # of sympy's own
    ours = [
        code for code in evaluated if isinstance(code, str) and not code.startswith(("Symbol", "lambda _cls", "E "))
    ]
    assert ours and all(re.fullmatch(r"(Integer|Float|Rational) \('?[\d.]+'? ?\)", code) for code in ours), ours


def test_sympy_evaluates_no_expression_once_an_answer_was_graded():
    import sympy

    verified("2 x", r"\sqrt{4} y")
    assert sympy.Number("12") == 12
    with pytest.raises((ValueError, sympy.SympifyError)):
        sympy.sympify("__import__('os').getpid()")


# Secrets


@pytest.fixture
def secrets(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-no-known-form")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)


def test_secrets_are_left_out_of_any_text(secrets):
    text = f"at https://me:{PASSWORD}@hub.lab/x with {TOKEN}, a-token-of-no-known-form and {'0123456789' * 4}"
    assert redact(text) == "at https://***@hub.lab/x with ***, *** and ***"
    assert redact("key=value, 1@2, a://b, hf_short") == "key=value, 1@2, a://b, hf_short"
    assert str(DirlError(f"https://me:{PASSWORD}@hub.lab cannot be reached")) == "https://***@hub.lab cannot be reached"


@pytest.mark.parametrize(
    ("key", "value", "secret"),
    [
        ("logger.api_key", "x", True),
        ("db.password", "x", True),
        ("model.hf_token", "x", True),
        ("data.path", f"https://me:{PASSWORD}@hub.lab/x", True),
        ("name", TOKEN, True),
        ("logger.api_key", None, False),
        ("decoding.stop_token_ids", [1, 2], False),
        ("decoding.max_new_tokens", 8192, False),
        ("model.mask_token_id", 3, False),
        ("row_tokens", 8192, False),
    ],
)
def test_what_counts_as_a_secret(key, value, secret):
    assert is_secret(key, value) is secret


@pytest.mark.parametrize("word", [f"name={TOKEN}", f"+logger.api_key={PASSWORD}", "name=${oc.env:HF_TOKEN}"])
def test_a_configuration_with_a_secret_is_refused_before_anything_is_written(here, secrets, capsys, word):
    with pytest.raises(DirlError, match="holds a secret, and configurations are saved") as told:
        launch.launch("eval", [], [word, "predictions=none.jsonl"])
    assert list(here.rglob("*")) == []
    shown = f"{told.value} {capsys.readouterr()}"
    assert TOKEN not in shown and PASSWORD not in shown and os.environ["HF_TOKEN"] not in shown


def test_a_run_keeps_no_secret_and_no_file_that_everybody_may_write(here, secrets, monkeypatch):
    monkeypatch.setattr(
        "sys.orig_argv", ["dirl", "eval", f"+x=https://me:{PASSWORD}@hub.lab", "a-token-of-no-known-form"]
    )
    (here / "problems.json").write_text('[{"question": "1+1", "ground_truth_answer": "2"}]')
    (here / "answers.jsonl").write_text('{"index": 0, "completion": "\\\\boxed{2}"}\n')
    before = os.umask(0o022)
    try:
        launch.launch("eval", [], ["predictions=answers.jsonl", "bench=problems.json", "out=graded"])
    finally:
        os.umask(before)
    files = [file for file in (here / "graded").rglob("*") if file.is_file()]
    assert {"config.yaml", "environment.json", "eval_card.json", "answers.jsonl"} <= {file.name for file in files}
    for file in files:
        text = file.read_text()
        assert PASSWORD not in text and os.environ["HF_TOKEN"] not in text and os.environ["WANDB_API_KEY"] not in text
        assert not file.stat().st_mode & stat.S_IWOTH
    assert "https://***@hub.lab ***" in run_dir.environment()["command"].replace("'", "")


def test_a_traceback_tells_no_secret(secrets, capsys):
    try:
        raise ValueError(f"GET https://me:{PASSWORD}@hub.lab with {os.environ['HF_TOKEN']}")
    except ValueError as error:
        launch.report_bug(type(error), error, error.__traceback__)
    shown = capsys.readouterr().err
    assert "ValueError: GET https://***@hub.lab with ***" in shown and PASSWORD not in shown


# The screen

HOSTILE_TEXT = "\x1b]0;title\x07\x1b[2J\x9b31m\r[red]red[/] [/] :smile:"


def test_text_moves_no_cursor_and_is_no_markup():
    assert escape_controls("a\x1b[2J\x07\x7f\x9b\r\n\t") == "a␛[2J␇␡�␍\n\t"
    screen = io.StringIO()
    console = PlainConsole(file=screen, width=200)
    console.print(HOSTILE_TEXT)
    console.print(Text(HOSTILE_TEXT))
    console.rule(HOSTILE_TEXT)
    table = Table(HOSTILE_TEXT, title=HOSTILE_TEXT)
    table.add_row(HOSTILE_TEXT)
    console.print(table)
    shown = screen.getvalue()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert shown.count("[red]red[/] [/] :smile:") == 4  # a table cuts what is longer than it thinks
    assert str(DirlError("a\x1b[2J")) == "a␛[2J"


def test_every_command_shows_things_on_such_a_console():
    for name, tree in trees():
        made = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not {"Console", "rich.print", "get_console"} & set(made), name


# What fuzzing found


@pytest.mark.parametrize("line", ["[1]", '{"problem": []}', "[" * 5000, "\x80", '{"a": ' + "9" * 5000 + "}"])
def test_a_strange_line_of_answers_is_told(tmp_path, line):
    (tmp_path / "answers.jsonl").write_bytes(line.encode("latin-1"))
    with pytest.raises(DirlError, match="line 1 is not an answer"):
        read_answers(tmp_path / "answers.jsonl")


def test_an_answer_with_values_of_other_types_is_told(tmp_path):
    good = {"problem": "a", "sample": 0, "text": "", "correct": True, "stop_reason": "stop", "length": 1}
    good |= {"tokens": 4, "denoise_forwards": 1, "forwards": 1, "seconds": 0.1}
    for key, odd in {"problem": ["a"], "sample": 0.5, "correct": 1, "stop_reason": "end", "seconds": None}.items():
        (tmp_path / "answers.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | {key: odd}) + "\n")
        with pytest.raises(DirlError, match="line 2 is not an answer"):
            read_answers(tmp_path / "answers.jsonl")


@pytest.mark.parametrize("card", ["[]", "{}", "\x80", "[" * 5000, '{"metrics": {"pass_at": []}}', '{"metrics": 1}'])
def test_a_strange_card_is_told(tmp_path, card):
    (tmp_path / "eval_card.json").write_bytes(card.encode("latin-1"))
    with pytest.raises(DirlError, match="is not the card of an evaluation"):
        read_evaluation(tmp_path)


def test_a_thought_that_is_no_text_is_told(tmp_path):
    said = {"role": "assistant", "content": "So.", "reasoning_content": ["Hm."]}
    (tmp_path / "a.json").write_text(json.dumps([{"messages": [said]}]))
    with pytest.raises(DirlError, match="messages must be a list of objects"):
        demonstration(read_rows(tmp_path / "a.json")[0])


def test_half_a_character_is_told_and_two_halves_are_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "\\ud83d\\ude00"}\n')
    assert read_rows(tmp_path / "a.jsonl")[0].fields == {"prompt": "😀"}
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "\\ud83d"}\n')
    with pytest.raises(DirlError, match=r"line 2 holds .*, which is half a character"):
        read_rows(tmp_path / "a.jsonl")


def test_a_parquet_file_whose_text_is_none_is_told(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    text = pa.Array.from_buffers(pa.utf8(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pyarrow.parquet.write_table(pa.table({"question": text}), tmp_path / "a.parquet")
    with pytest.raises(DirlError, match="is not a Parquet file that can be read"):
        read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "content",
    [
        "a: [",
        "a: 1\na: 2",
        "- 1",
        "# @package a b: c: d\na: 1",
        "defaults: {a: b}",
        "defaults: [null]",
        "a: \x00",
        "1: " + "9" * 5000,
    ],
)
def test_a_config_of_the_user_that_is_none_is_named(here, content):
    (here / "mine/masking").mkdir(parents=True)
    (here / "mine/masking/odd.yaml").write_text(content)
    with pytest.raises(DirlError, match=r"odd\.yaml is not a config that can be read"):
        launch.launch("sft", ["--cfg", "job"], [], here / "mine")


@pytest.mark.parametrize("words", [["a" * 5000], ["a" * 300 + "=1"], ["model=" + "a" * 5000]])
def test_words_longer_than_a_file_name_are_told(here, words):
    with pytest.raises(DirlError):
        launch.launch("sft", ["--cfg", "job"], words)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 300}, {"hidden_act": "none"}, {"layer_types": ["a"]}])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_config_that_no_model_can_be_built_from_is_told(model, changes, device):
    edit(model / "config.json", **changes)
    assert str(model) in refusal(model, device)


@pytest.mark.parametrize("ends", [["???"], [[1, 2]], "a"])
def test_ends_of_answers_that_are_no_tokens_are_told(model, ends):
    edit(model / "generation_config.json", eos_token_id=ends)
    assert "(eos_token_id): give numbers of tokens" in refusal(model)


@pytest.mark.slow
def test_what_fuzzing_feeds_is_refused_or_read(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "--minutes",
        "1",
        "--findings",
        str(tmp_path),
        "--only",
        "rows,rollouts",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and [file.name for file in tmp_path.iterdir()] == ["counts.md"], done.stdout
    assert int(re.search(r"([\d,]+) inputs, 0 kinds", done.stdout)[1].replace(",", "")) > 100


def test_a_tokenizer_that_its_library_refuses_is_told(model):
    edit(model / "tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]})
    assert "the tokenizer of" in refusal(model)
