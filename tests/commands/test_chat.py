"""`dirl chat`: lines in, answers out, and what a conversation does with each line."""

import io
import json
import re
import signal
import sys
from pathlib import Path

import pytest

from dirl_cli.commands import chat
from dirl_cli.commands.block_screen import HIDDEN, AnswerScreen
from dirl_cli.commands.dialogue import COMMANDS, Consequence, Dialogue, Entry, read_entry
from dirl_cli.console import PlainConsole
from dirl_cli.data.chat import answer_text, encode_messages
from dirl_cli.errors import DirlError, Interrupted, Stopped
from dirl_cli.models.load import SavedModel
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.types import Decoding
from tests.helpers.command_line import dirl
from tests.helpers.composed import composed
from tests.helpers.rl_runs import save_sharp_model

# What is typed


def entries(*lines: str) -> list[Entry]:
    """What these lines are read as."""
    remaining = list(lines)

    def read_line(prompt: str) -> str:
        if not remaining:
            raise EOFError
        return remaining.pop(0)

    read = []
    while True:
        try:
            read.append(read_entry(read_line))
        except EOFError:
            return read


def test_a_line_is_an_entry_and_a_backslash_or_a_fence_makes_it_of_several():
    assert entries("a", " b ") == [Entry("a"), Entry("b")]
    assert entries("a\\", "b\\", "c", "d") == [Entry("a\nb\nc"), Entry("d")]
    assert entries('"""', "a", "", '  b"""', "c") == [Entry("a\n\n  b", is_quoted=True), Entry("c")]
    assert entries('"""/a"""') == [Entry("/a", is_quoted=True)]
    assert entries('say """', "c") == [Entry('say """'), Entry("c")]


def test_an_entry_that_the_input_cuts_off_counts():
    assert entries("a\\") == [Entry("a")]
    assert entries('"""', "a") == [Entry("a", is_quoted=True)]
    assert entries() == []


# What follows from it


def accept(decoding: Decoding) -> None:
    if decoding.strategy == "absent":
        raise DirlError("no decoding strategy is called absent")


@pytest.fixture
def dialogue() -> Dialogue:
    return Dialogue(Decoding(threshold=0.9), accept)


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def ask(dialogue: Dialogue, question: str, answer: str) -> None:
    assert dialogue.receive(Entry(question)) == Consequence(asks=True)
    dialogue.answered(answer)


def test_questions_and_answers_add_up(dialogue):
    ask(dialogue, "a", "1")
    ask(dialogue, "b\nc", "2")
    assert dialogue.messages == turns("a", "1", "b\nc", "2")
    assert dialogue.receive(Entry("  ")) == Consequence()
    assert dialogue.receive(Entry("/set", is_quoted=True)).asks
    assert dialogue.messages[-1] == {"role": "user", "content": "/set"}
    dialogue.take_back()
    assert dialogue.messages == turns("a", "1", "b\nc", "2")


def test_the_system_turn_comes_first_and_outlives_clearing(dialogue):
    ask(dialogue, "a", "1")
    dialogue.receive(Entry("/system Be\nbrief."))
    dialogue.receive(Entry("/system Be brief."))
    system = {"role": "system", "content": "Be brief."}
    assert dialogue.messages == [system, *turns("a", "1")]
    dialogue.receive(Entry("/clear"))
    assert dialogue.messages == [system]
    dialogue.receive(Entry("/system"))
    assert dialogue.messages == []


def test_a_question_is_answered_again_with_the_next_seed_or_keeps_its_answer(dialogue):
    ask(dialogue, "a", "1")
    dialogue.receive(Entry("/set temperature=1"))
    assert dialogue.receive(Entry("/retry")) == Consequence("seed=1", asks=True)
    assert dialogue.messages == turns("a")
    dialogue.take_back()
    assert dialogue.messages == turns("a", "1")
    dialogue.receive(Entry("/set temperature=0"))
    assert dialogue.receive(Entry("/retry")).note.startswith("seed=2, which changes nothing at temperature=0")


def test_a_setting_is_checked_as_the_config_checks_it(dialogue):
    assert dialogue.receive(Entry("/set threshold=0.8")) == Consequence("threshold=0.8")
    assert dialogue.receive(Entry("/set stop_token_ids=[1, 2]")) == Consequence("stop_token_ids=[1, 2]")
    assert dialogue.receive(Entry("/set denoising_steps=2")) == Consequence("denoising_steps=2")
    assert dialogue.receive(Entry("/set denoising_steps=null")) == Consequence("denoising_steps=null")
    assert dialogue.decoding == Decoding(threshold=0.8, stop_token_ids=(1, 2))
    assert "max_new_tokens=256\n" in dialogue.receive(Entry("/set")).note


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/set treshold=0.8", r"decoding.treshold: no such key; did you mean threshold\?"),
        ("/set threshold=high", "decoding.threshold=high: give a number of at least 0"),
        ("/set threshold=2", "decoding.threshold=2: confidence is at most 1, so nothing is above it: give less"),
        ("/set max_new_tokens=0", "decoding.max_new_tokens=0: give a whole number of at least 1"),
        ("/set stop_token_ids=[1", "the value cannot be read"),
        ("/set strategy=absent", "no decoding strategy is called absent"),
        ("/set threshold", "/set threshold: give KEY=VALUE"),
        ("/sytem a", r"/sytem: no such command \(a text that begins with / .*\); did you mean /system\?"),
        ("/", r"/: no such command \(a text .*\); choose one of /help, /system"),
        ("/clear all", "/clear stands alone: leave out all"),
        ("/save", "/save wants a file: write /save FILE"),
        ("/save new.json", "nothing has been said that could be saved"),
        ("/load none.json", r"none.json cannot be read \(No such file or directory\): check the path"),
        ("/retry", "there is no question to answer again"),
    ],
)
def test_what_cannot_be_done_is_told_and_changes_nothing(dialogue, here, line, sentence):
    with pytest.raises(DirlError, match=sentence):
        dialogue.receive(Entry(line))
    assert (dialogue.messages, dialogue.decoding) == ([], Decoding(threshold=0.9))


def test_help_tells_every_command_in_lines_of_a_terminal(dialogue):
    lines = dialogue.receive(Entry("/help")).note.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[0] for line in lines[:8]] == [form.split()[0] for form in COMMANDS]


def test_turns_are_saved_and_loaded_but_no_other_file_is_written_over(dialogue, here):
    ask(dialogue, "é?", "1")
    assert dialogue.receive(Entry("/save a b.json")) == Consequence("2 turns in a b.json")
    assert json.loads(Path("a b.json").read_text(encoding="utf-8")) == turns("é?", "1")
    ask(dialogue, "b", "2")
    dialogue.receive(Entry("/save a b.json"))
    other = Dialogue(Decoding(), accept)
    assert other.receive(Entry("/load a b.json")) == Consequence("4 turns of a b.json")
    assert other.messages == turns("é?", "1", "b", "2")
    Path("mine").write_text("mine")
    with pytest.raises(DirlError, match="mine is there already: give a name that is free"):
        other.receive(Entry("/save mine"))
    with pytest.raises(DirlError, match="mine is not valid JSON"):
        other.receive(Entry("/load mine"))
    with pytest.raises(DirlError, match=r"none/a cannot be written \(No such file or directory\): give another file"):
        other.receive(Entry("/save none/a"))


def test_a_loaded_question_without_an_answer_is_answered_by_retry(dialogue, here):
    Path("a.json").write_text(json.dumps(turns("a")))
    assert dialogue.receive(Entry("/load a.json")).note.endswith("the last of them a question, which /retry answers")
    assert dialogue.receive(Entry("/retry")) == Consequence(asks=True)
    assert dialogue.messages == turns("a") and dialogue.decoding.seed == 0


# With a model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_sharp_model(tmp_path_factory.mktemp("random") / "model")


def dirl_chat(model: Path, monkeypatch, *lines: str, given: bytes | None = None) -> None:
    """Run the command on lines that come through a pipe."""
    content = "".join(line + "\n" for line in lines).encode() if given is None else given
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    words = [f"model={model}", "device=cpu", "decoding.max_new_tokens=8", "decoding.temperature=1.0"]
    chat.run(composed("chat", "model=path", f"model.path={model}", *words[1:]), None)


def test_lines_through_a_pipe_are_answered_as_generate_answers_them(model, monkeypatch, here, capsys):
    dirl_chat(model, monkeypatch, "a, é", "/set seed=5", "/st", "b", "/save chat.json", "/quit", "c")
    shown = capsys.readouterr()
    messages = json.loads(Path("chat.json").read_text(encoding="utf-8"))
    assert [turn["role"] for turn in messages] == ["user", "assistant"] * 2
    lm = SavedModel("", str(model)).load("float32", "cpu")
    for asked, seed in ((1, 0), (3, 5)):
        decoding = lm.decoding(Decoding(max_new_tokens=8, temperature=1.0, seed=seed))
        [[answer]] = NativeSampler(lm).sample([encode_messages(lm.tokenizer, messages[:asked])], 1, decoding)
        assert messages[asked]["content"] == answer_text(lm.tokenizer, answer.completion_ids)
        assert f"{len(answer.token_ids)} tokens in {answer.forwards} forwards" in shown.err
    assert "\x1b" not in shown.out + shown.err
    assert "/st: no such command" in shown.err and "tokens" not in shown.out and "> " not in shown.out
    assert len(re.findall(r"ended by (?:stop|length), [\d,]+ tokens/s", shown.err)) == 2


def interrupt_after(monkeypatch, forwards: int, interrupt: BaseException) -> list[list[int]]:
    """Let Ctrl-C come once so many forwards are shown; returns the tokens that each of them leaves."""
    left: list[list[int]] = []
    show = AnswerScreen.show

    def show_or_stop(self, prompt, sample, token_ids):
        show(self, prompt, sample, token_ids)
        left.append(token_ids)
        if len(left) == forwards:
            raise interrupt

    monkeypatch.setattr(AnswerScreen, "show", show_or_stop)
    return left


def test_ctrl_c_stops_an_answer_and_keeps_what_is_there(model, monkeypatch, here, capsys):
    lm = SavedModel("", str(model)).load("float32", "cpu")
    left = interrupt_after(monkeypatch, 6, KeyboardInterrupt())
    dirl_chat(model, monkeypatch, "/set strategy=sequential", "a", "/save chat.json", "b")
    [_, answer] = json.loads(Path("chat.json").read_text())
    kept = left[5][: left[5].index(lm.mask_token_id)]
    assert kept and answer["content"] == answer_text(lm.tokenizer, kept)
    shown = capsys.readouterr().err
    assert f"{len(kept)} tokens in 6 forwards" in shown and "ended by Ctrl-C" in shown
    assert len(left) > 6 and "ended by length" in shown  # and the next question is answered


def test_an_answer_without_a_word_is_taken_back_with_its_question(model, monkeypatch, here, capsys):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(NativeSampler, "stream", interrupted)
    dirl_chat(model, monkeypatch, "a", "/save chat.json")
    assert "stopped before there was an answer, so the question is taken back" in capsys.readouterr().err
    assert not Path("chat.json").exists()


def test_sigterm_ends_the_chat_in_the_middle_of_an_answer(model, monkeypatch, here):
    interrupt_after(monkeypatch, 1, Interrupted(signal.SIGTERM))
    with pytest.raises(Stopped, match="stopped: what /save wrote is kept") as ended:
        dirl_chat(model, monkeypatch, "a", "b")
    assert ended.value.exit_code == 0


def test_a_conversation_that_is_too_long_is_told_and_goes_on_without_the_question(model, monkeypatch, here, capsys):
    dirl_chat(model, monkeypatch, "a " * 2000, "b", "/save chat.json")
    assert re.search(r"would have \d+ tokens and the model has room for 1023: shorten it", capsys.readouterr().err)
    assert json.loads(Path("chat.json").read_text())[0] == {"role": "user", "content": "b"}


def test_input_that_is_no_text_is_told(model, monkeypatch, here):
    with pytest.raises(DirlError, match=r"standard input is not UTF-8 text \(byte 0\)"):
        dirl_chat(model, monkeypatch, given=b"\xff\n")


def test_an_answer_fills_in_a_terminal_without_what_follows_its_end(model):
    lm = SavedModel("", str(model)).load("float32", "cpu")
    stop, mask = lm.stop_token_ids[0], lm.mask_token_id
    console = PlainConsole(file=io.StringIO(), force_terminal=True, width=20, height=5)
    with AnswerScreen(console, lm, lm.stop_token_ids, pace=0.0) as screen:
        screen.show(0, 0, [20, mask, stop, 21])
        assert screen.picture([]).plain == lm.tokenizer.decode([20]) + HIDDEN * 2
        screen.show(0, 0, [20] * 400)
        assert screen.picture([]).plain.count("\n") == 2  # the last lines, as many as there is room for
    assert HIDDEN in console.file.getvalue()
    assert screen.forwards == 2 and 0 < screen.seconds < 60


# As a command


def test_without_a_model_it_is_the_embedded_one_as_fine_tuning_leaves_it(here):
    refused = dirl("chat")
    said = "no model= is given, so this is experiment=tiny_chat: model=tiny_sft (runs/sft/tiny-arithmetic/model)"
    assert refused.stdout.splitlines() == [said]
    assert refused.stderr == "dirl chat: runs/sft/tiny-arithmetic/model is not there: run `dirl sft` first\n"


def test_a_setting_that_cannot_be_is_told_before_the_model_is_loaded(here):
    refused = dirl("chat", "model=path", "model.path=nowhere", "decoding.strategy=sequental")
    assert "did you mean sequential" in refused.stderr and refused.exit_code == 1
