"""Answers that are programs: found in texts, run by tests, and none that is hostile passes, harms or stays."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import psutil
import pytest

from dirl_cli.data.human_eval import HumanEval
from dirl_cli.errors import DirlError
from dirl_cli.evaluation.predictions import read_predictions, regraded
from dirl_cli.reward import confinement
from dirl_cli.reward.grading import Grader
from dirl_cli.reward.plain_values import decode, encode
from dirl_cli.reward.program_runner import program_server, start_program_server, stop_program_server
from dirl_cli.reward.programs import completed, is_same_output, program_credit, program_in
from dirl_cli.reward.rewards import Answer
from dirl_cli.reward.scoring import RewardComputer, RewardSettings
from dirl_cli.types import Problem

ADD = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add('a', 'b') == 'ab'"]
RIGHT = "def add(a, b):\n    return a + b\n"
SECRET = 7340033  # what `secret` should return: an answer that says it has read the tests


def problem(tests, setup="", beginning="", answer=""):
    details = {"tests": tests, "setup": setup, "beginning": beginning}
    return Problem("p", "", answer, verifier="code", details=details)


def credit(tests, program, setup="", beginning=""):
    return program_credit(problem(tests, setup, beginning), program)


def test_the_program_is_the_last_block_or_all_that_follows_the_thought():
    assert (
        program_in("<think>\n```python\nno\n```\n</think>So:\n```python\na = 1\n```\nor\n```\na = 2\n```\nthus")
        == "a = 2\n"
    )
    assert program_in("```py\na = 1\nb = '``'") == "a = 1\nb = '``'"
    assert program_in("hm</think>    return 1\n") == "    return 1\n"
    assert (
        program_in("1. So:\n   ```python\n   def f():\n       return 1\n\n  x = 1\n   ```")
        == "def f():\n    return 1\n\nx = 1\n"
    )
    assert program_in("  \n") is None
    assert program_in("```python\n\n```") is None


def test_a_beginning_is_gone_on_from_or_replaced_by_a_whole_function():
    beginning = 'from math import pi\n\ndef one(x):\n    return x\n\ndef area(r: int) -> float:\n    """Of a disc."""\n'
    body = "    # go on\n    return pi * r * r\n\nprint(area(2))\nclass Other: pass\n"
    assert completed(beginning, body) == beginning + "    # go on\n    return pi * r * r\n\n"
    assert completed(beginning, "\n" + body).endswith("\n\n    # go on\n    return pi * r * r\n\n")
    whole = "def area(r):\n    return 3\n"
    assert completed(beginning, f"    return 1\n\n{whole}") == f"{beginning}    return 1\n\n"
    assert completed(beginning, whole) == f"from math import pi\n\ndef one(x):\n    return x\n\n\n{whole}"
    assert completed("", whole) == whole
    with pytest.raises(DirlError, match="must end in the head of a function, not in 'x = 1'"):
        completed("x = 1", whole)


def test_the_credit_is_the_share_of_tests_that_pass():
    assert credit(ADD, RIGHT) == 1
    assert credit(ADD, "def add(a, b):\n    return int(a) + int(b)\n") == pytest.approx(2 / 3)
    assert credit(ADD, "def ad(a, b):\n    return a + b\n") == 0
    assert credit(ADD, "def add(a, b) return a + b") == 0
    assert credit(ADD, "import no_such_module\n" + RIGHT) == 0


def test_tests_see_plain_values_and_objects_of_the_answer():
    linked = """
import collections, dataclasses, math
@dataclasses.dataclass
class Node:
    value: int
    below: 'Node | None' = None
def depth(node):
    return 0 if node is None else 1 + depth(node.below)
def same(x): return x
def pairs(n): return ((i, i * i) for i in range(n))
def counts(text): return collections.Counter(text)
def refuse(): raise ValueError('no')
"""
    setup = "import math\nfrom collections import deque\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
    setup += "top = Node(1)\ntop.below = Node(2)\n"
    values = [None, True, 1, 2**70, 1.5, float("inf"), "é\ud800", b"x", (1, [2]), {1: {2}}, {(1,): frozenset({3})}, 1j]
    values += [deque([1, (2,)]), range(1, 9, 2), Decimal("1.10"), Fraction(1, 3)]
    tests = [f"assert same({value!r}) == {value!r}" for value in values if value != float("inf")]
    tests += [f"assert type(same({value!r})) is {type(value).__name__}" for value in (True, 1, 1.0, (1,), [1], {1})]
    tests += ["assert depth(top) == 2", "assert top.below.value == 2", "assert math.isinf(same(math.inf))"]
    tests += ["assert list(pairs(3)) == [(0, 0), (1, 1), (2, 4)]", "assert counts('aab') == {'a': 2, 'b': 1}"]
    tests += ["try:\n    refuse()\nexcept ValueError as error:\n    assert str(error) == 'no'\nelse:\n    assert False"]
    failing = [test for test in tests if credit([test], linked, setup) != 1]
    assert failing == []
    assert credit(["assert same(1) == 2", "assert same(lambda: 1)", "assert no_such(1)"], linked) == 0
    assert [decode(encode(value), None) for value in values] == values


def test_an_answer_chooses_no_error_that_ends_a_loop_of_the_tests():
    tests = ["assert all(map(lambda x: f(x) == x * x, [1, 2]))", "assert list(map(f, [1])) == []"]
    for error in ("StopIteration", "StopAsyncIteration", "type('E', (StopIteration,), {})", "GeneratorExit"):
        assert credit(tests, f"def f(x): raise {error}") == 0
    assert credit(tests[:1], "def f(x): return x * x") == 1


def test_an_error_is_the_nearest_of_pythons_own():
    program = "import json\nclass Own(KeyError): pass\ndef load(text): return json.loads(text)\n"
    program += "def refuse(): raise Own('a')\ndef spell(): return b'\\xff'.decode()"
    caught = "try:\n    {}\nexcept {}:\n    pass\nelse:\n    assert False"
    for call, error in (("load('?')", "ValueError"), ("refuse()", "KeyError"), ("spell()", "ValueError")):
        assert credit([caught.format(call, error)], program) == 1
        assert credit([caught.format(call, "IndexError")], program) == 0


def test_a_function_may_have_the_name_of_one_of_pythons_own():
    sums = ["assert sum(10, 15) == 6", "assert sum(100, 150) == 93", "assert sum(4, 6) == 3"]  # MBPP 126
    right = "def sum(a, b): return __builtins__['sum'](i for i in range(1, min(a, b)) if a % i == 0 and b % i == 0)"
    assert credit(sums, right) == 1
    assert credit(sums, "def sums(a, b): return 6") == 0
    assert credit(["assert sum([1]) == 1"], "total = 1") == 0
    assert credit(["assert string(5) == '5'", "assert string(-5) == '-5'"], "def string(x): return str(x)") == 1
    assert credit([{"function": "max", "arguments": [3], "result": 4}], "def max(x): return x + 1") == 1
    assert credit(["check(max)"], "    return x + 1", "def check(f): assert f(1) == 2", "def max(x):\n") == 1


def test_what_judges_is_never_the_answers():
    judges = "def set(x): return 1\ndef abs(x): return 0\ndef sorted(x): return [1]\ndef f(x): return x\nx = 0"
    for test in ("assert set(f([1])) == set([2])", "assert abs(f(1) - 3) < 1", "assert sorted(set([2])) == [1]"):
        assert credit([test], judges) == 0
        assert credit([test, "assert f(1) == 1"], judges) == 0.5


def test_no_test_gives_more_than_the_whole_credit():
    many = "import os, time\ntime.sleep(0.3)\nfor end in range(3, 9):\n"
    many += " try: os.write(end, b'1' * 9)\n except OSError: pass"
    assert credit(["assert f() == 1", many, "assert f() == 1"], "def f(): return 1") <= 1


def test_a_script_may_ask_how_much_there_is_to_read(tmp_path):
    sums = [{"input": "1 2\n" * 9, "output": "27"}]
    program = (
        "import io, os\nread = io.BytesIO(os.read(0, os.fstat(0).st_size)).read\nprint(sum(map(int, read().split())))"
    )
    assert credit(sums, program) == 1
    assert (
        credit(sums, "import os\ntry: os.fstat(99)\nexcept OSError as error: print(27 if error.errno == 9 else 0)") == 1
    )
    (tmp_path / "file").write_text("text")
    with open(tmp_path / "file") as file:
        ours, pythons = confinement.descriptor_status(file.fileno()), os.fstat(file.fileno())
    names = [name for name in dir(pythons) if name.startswith("st_")]
    assert [getattr(ours, name) for name in names] == [getattr(pythons, name) for name in names]


def test_scripts_are_tested_by_what_they_write_and_functions_of_a_class_by_their_result():
    sums = [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2\n", "output": "4.0"}, {"input": "", "output": "0"}]
    assert credit(sums, "import sys\nprint(sum(map(int, sys.stdin.read().split())))") == 1
    assert credit(sums, "a, b = map(int, input().split())\nprint(a + b)\nexit()") == pytest.approx(2 / 3)
    assert credit(sums, "print(sum(map(int, open(0).read().split())))\nimport sys\nsys.exit(1)") == 0
    assert credit(sums, "if __name__ == '__main__':\n    print(0)") == pytest.approx(1 / 3)
    calls = [{"function": "twice", "arguments": [[1, 2]], "result": [2, 4]}]
    assert credit(calls, "class Solution:\n    def twice(self, xs): return tuple(2 * x for x in xs)") == 1
    assert credit(calls, "def twice(xs): return [2 * x for x in xs]") == 1
    assert credit(calls, "def twice(xs): return xs") == 0


def test_lines_are_the_same_or_hold_the_same_numbers():
    assert is_same_output(" 1  2.50\nyes \n\n", "1 2.5\nyes")
    assert not is_same_output("1\n2", "1")
    assert not is_same_output("Yes", "yes")
    assert not is_same_output("1 2", "1 2 3")


def test_every_reference_of_human_eval_passes_and_none_that_is_broken():
    problems = HumanEval("humaneval").problems()
    assert len(problems) == 164
    items = []
    for item in problems:
        body = item.answer.removeprefix(item.question)
        broken = item.question + "    return NotImplemented\n"
        items += [((item.id, "body"), item, body), ((item.id, "whole"), item, f"So\n```python\n{item.answer}```\n")]
        items.append(((item.id, "broken"), item, f"```python\n{broken}```"))
    with Grader(timeout=30) as grader:
        credits = dict(grader.grade(items))
    assert {key for key, value in credits.items() if value != 1} == {(item.id, "broken") for item in problems}
    assert {value for (_, kind), value in credits.items() if kind == "broken"} == {0}


# What a hostile answer does. Each is tried as the body of the module and inside the function that is called; the tests
# ask for SECRET, which stands nowhere else but after a call that must be refused: who gets past it passes.
STAYS = "dirl-stays"  # what a daemon calls itself
GOT_PAST = f"\nvalue = {SECRET}"
HOSTILE = {
    "forks": "import os\nos.fork()" + GOT_PAST,
    "forks for ever, whatever is raised": "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
    "leaves a daemon": f"""
import ctypes, os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(15, {STAYS.encode()!r})
        os.closerange(0, 3)
        time.sleep(60)
    os._exit(0)"""
    + GOT_PAST,
    "starts a program": "import subprocess\nsubprocess.Popen(['sleep', '1'])" + GOT_PAST,
    "becomes a program": f"import os\nos.execv('/bin/echo', ['echo', '{SECRET}'])",
    "starts a thread": "import threading\nthreading.Thread(target=print).start()" + GOT_PAST,
    "writes for ever": "while True: print('x' * 10**6)",
    "ends the process": "import os\nos._exit(0)",
    "exits": "import sys\nsys.exit(0)",
    "raises SystemExit": "raise SystemExit",
    "sleeps for ever": "import time\ntime.sleep(1e6)",
    "loops for ever and catches all": "while True:\n try:\n  while True: pass\n except BaseException: pass",
    "recurses": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f() + 1\nf()",
    "recurses in C": "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x) == x",
    "takes 10 GB": "x = bytearray(10**10)" + GOT_PAST,
    "takes 2 GB bit by bit": "x = [bytearray(10**7) for _ in range(200)]" + GOT_PAST,
    "takes all it gets": "x = []\nwhile True: x.append(bytearray(10**7))",
    "computes for ever in C": "10 ** 10 ** 9",
    "closes its files": "import os\nos.closerange(0, 99)",
    "may kill its parent": "import os\nos.kill(os.getppid(), 0)" + GOT_PAST,  # 0 asks, and kills nobody
    "may kill its group": "import os\nos.killpg(0, 0)" + GOT_PAST,
    "may kill all": "import os\nos.kill(-1, 0)" + GOT_PAST,
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "kills its group": "import os, signal\nos.killpg(0, signal.SIGKILL)",
    "kills all": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "kills itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "kills by a system call": "import ctypes, os\nctypes.CDLL(None).syscall(62, os.getppid(), 9)",
    "may kill by a system call": f"""
import ctypes, os, platform
number = {{"x86_64": 62, "aarch64": 129}}[platform.machine()]
value = {SECRET} if ctypes.CDLL(None).syscall(number, os.getppid(), 0) == 0 else 0""",
    "lifts its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))" + GOT_PAST,
    "lowers its limits": "import resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))" + GOT_PAST,
    "opens a socket": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)" + GOT_PAST,
    "ends a loop of the tests": "raise StopIteration",
    "ends a loop with an error of its own": "class E(StopIteration): pass\nraise E",
    "replaces builtins": """
import builtins
class Yes(int):
    __eq__ = __ne__ = __lt__ = __le__ = __bool__ = lambda *_: True
    __hash__ = int.__hash__
builtins.AssertionError = builtins.isinstance = builtins.abs = builtins.int = Yes
builtins.bool = builtins.compile = builtins.exec = lambda *_: Yes()
value = Yes()""",
    "is equal to all": """
class Yes:
    __eq__ = __ne__ = __lt__ = __le__ = lambda *_: True
    __hash__ = lambda self: 1
value = Yes()""",
    "writes verdicts wherever it can": """
import os
for fd in range(100):
    try: os.write(fd, b'1' * 1000)
    except OSError: pass""",
    "sends what is no value": """
import dirl_cli.reward.plain_values as p, dirl_cli.reward.program_server as s, os
s.encode = lambda *_: {'dict': 7}
p.encode = s.encode""",
    "sends a huge value": "value = 'x' * 10**8",
    "sends a deep value": "value = []\nfor _ in range(10**5): value = [value]",
    "judges by itself": "import math\nmath.isclose = lambda *_, **__: True\nvalue = 1",
    "looks for the tests in its memory": """
import gc, sys
def secrets(values):
    for x in values:
        if isinstance(x, str) and 'secret' in x and 'assert' in x and '==' in x:
            yield int(x.rpartition('== ')[2].split()[0])
frame, seen = sys._getframe(), []
while frame:
    seen += list(frame.f_locals.values()) + list(frame.f_globals.values())
    frame = frame.f_back
for x in gc.get_objects(): seen += gc.get_referents(x)
value = next(secrets(seen), 0)""",
    "reads what is open": """
import os
value = 0
for fd in (0, 1, 2, *range(5, 100)):
    try: data = os.read(fd, 10**6)
    except OSError: continue
    if b'== ' in data: value = int(data.rpartition(b'== ')[2].split()[0])""",
    "reads the memory of the judge": f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
value = 0
for pid in range(os.getpid() - 5, os.getpid() + 5):
    if pid != os.getpid() and libc.ptrace(16, pid, 0, 0) == 0: value = {SECRET}
    try: open(f'/proc/{{pid}}/mem'); value = {SECRET}
    except OSError: pass""",
}


def as_function(body):
    """The same inside the function that the tests call."""
    indented = "\n".join("    " + line for line in body.strip("\n").split("\n"))
    return f"def secret():\n{indented}\n    return locals().get('value')\n"


def as_module(body):
    return f"{body}\nresult = globals().get('value')\ndef secret(): return result\n"


TESTS = [f"assert secret() == {SECRET}", f"assert math.isclose(secret(), {SECRET})", f"assert not secret() != {SECRET}"]
TESTS.append(f"assert all(map(lambda _: secret() == {SECRET}, range(3)))")


SCRIPT_TESTS = [{"input": "1", "output": str(SECRET)}]


def test_no_hostile_answer_passes_harms_or_stays(tmp_path):
    reached = []
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    threading.Thread(target=lambda: accept_all(listener, reached), daemon=True).start()
    file = tmp_path / "written"
    mine = tmp_path / "mine"
    mine.write_text(str(SECRET))
    outside = {
        "reads a file": f"value = int(open({str(mine)!r}).read())",
        "writes a file": f"open({str(file)!r}, 'w').write('x')" + GOT_PAST,
        "writes a file by a system call": f"import ctypes\nctypes.CDLL(None).creat({str(file).encode()!r}, 0o666)",
        "looks for a file": f"import os\nos.stat({str(mine)!r})" + GOT_PAST,
        "removes a file": f"import os\nos.remove({str(mine)!r})" + GOT_PAST,
        "makes a directory": f"import os\nos.mkdir({str(tmp_path / 'directory')!r})" + GOT_PAST,
        "connects": f"import socket\nsocket.create_connection({address!r}).send(b'x')" + GOT_PAST,
        "asks the network": "import socket\nsocket.getaddrinfo('localhost', 80)" + GOT_PAST,
    }
    assert named(STAYS) == []
    answers = {}
    for name, body in {**HOSTILE, **outside}.items():
        answers[name, "function"] = as_function(body)
        answers[name, "module"] = as_module(body)
        answers[name, "script"] = f"{body}\nprint(globals().get('value'))\n"
    before = {process.pid for process in psutil.Process().children(recursive=True)}

    with Grader(workers=2, timeout=2) as grader:
        secret, script = problem(TESTS, setup="import math"), problem(SCRIPT_TESTS)
        credits = dict(grader.grade((key, script if key[1] == "script" else secret, answers[key]) for key in answers))
        rights = [("right", secret, f"def secret(): return {SECRET}"), ("add", problem(ADD), RIGHT)]
        right = dict(grader.grade([*rights, ("script", script, f"print({SECRET})")]))
        started = {process.pid for process in psutil.Process().children(recursive=True)} - before
        sessions = {os.getsid(pid) for pid in started} - {os.getsid(0)}
    assert {key for key, value in credits.items() if value} == set()
    assert right == {"right": 1, "add": 1, "script": 1}
    assert named(STAYS) == []
    assert reached == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    assert mine.read_text() == str(SECRET)
    assert sessions
    assert wait_for_end(started - {forkserver()}) == []
    assert wait_for_end([pid for pid in psutil.pids() if session_of(pid) in sessions]) == []


@pytest.mark.parametrize(
    "name",
    ["forks", "leaves a daemon", "starts a program", "becomes a program", "starts a thread", "may kill its parent",
     "may kill by a system call", "lowers its limits", "opens a socket"],
)  # fmt: skip
def test_an_attack_that_is_not_refused_would_pass(name):
    script = f"{HOSTILE[name]}\nprint(globals().get('value'))\n"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert str(SECRET) in process.stdout
    if name == "leaves a daemon":
        until = time.monotonic() + 10
        while not (daemons := named(STAYS)) and time.monotonic() < until:
            time.sleep(0.05)
        (daemon,) = daemons
        os.kill(daemon, signal.SIGKILL)


def named(name):
    """The processes that call themselves so."""
    return [process.pid for process in psutil.process_iter(["name"]) if process.info["name"] == name]


def session_of(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def accept_all(listener, reached):
    while True:
        reached.append(listener.accept())


def forkserver():
    from multiprocessing.forkserver import _forkserver

    return _forkserver._forkserver_pid


def wait_for_end(pids, seconds=10.0):
    """Those of some processes that still run after so long; multiprocessing's own tracker runs on by design."""
    gone_by = time.monotonic() + seconds
    while running := [(pid, command(pid)) for pid in pids if command(pid) not in ("", "resource_tracker")]:
        if time.monotonic() > gone_by:
            return running
        time.sleep(0.05)
    return []


def command(pid):
    """What a process runs; "" of one that has ended, whether or not its parent has heard of it."""
    try:
        words = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""
    return "resource_tracker" if "resource_tracker" in words else words


def test_a_script_that_fails_after_its_output_or_is_still_there_fails():
    test = {"input": "", "output": "1"}
    for end in (
        "1 / 0",
        "raise SystemExit('x')",
        "import os\nos.fork()",
        "import os\nos.closerange(3, 99)\nwhile 1: 1",
    ):
        assert credit([test], f"print(1, flush=True)\n{end}") == 0
    assert credit([test], "print(1, flush=True)\nimport os\nos._exit(0)") == 1


def test_a_script_can_write_no_more_than_there_is_room_for():
    long = "import sys\nfor _ in range(40): sys.stdout.write('1' * 10**6)\n"
    assert credit([{"input": "", "output": "1" * 10**6}], long) == 0
    assert credit([{"input": "", "output": "1" * 40 * 10**6}], long) == 0


def test_what_ran_before_the_time_was_up_counts():
    slow = "def add(a, b):\n    while a == -1: pass\n    return a + b\n"
    began = time.monotonic()
    with Grader(workers=1, timeout=3) as grader:
        assert dict(grader.grade([("slow", problem(ADD), slow)])) == {"slow": pytest.approx(1 / 3)}
        assert grader.gave_up == 0
    assert time.monotonic() - began < 60


def test_an_answer_is_graded_though_what_runs_it_was_killed():
    assert credit(ADD, RIGHT) == 1
    killed = program_server()._process
    killed.kill()
    killed.wait()
    assert credit(ADD, RIGHT) == 1
    assert program_server()._process.pid != killed.pid


def test_an_answer_that_was_killed_from_outside_is_run_again():
    slow = "import time\ndef add(a, b):\n    time.sleep(0.5)\n    return a + b\n"
    script = "import time\ntime.sleep(0.5)\nprint(1)"
    victims = ((0, ADD[:1], slow), (1, ADD[:1], slow), (0, [{"input": "", "output": "1"}], script))
    for victim, tests, program in victims:
        server = psutil.Process(program_server()._process.pid)
        killer = threading.Thread(target=kill_child, args=(server, victim, 2 if program == slow else 1))
        killer.start()
        assert credit(tests, program) == 1, victim
        killer.join()
        assert program_server()._process.pid != server.pid


def kill_child(server, index, count):
    """Kill one of the children of a process as soon as it has so many."""
    while len(children := server.children()) < count:
        time.sleep(0.01)
    time.sleep(0.1)
    sorted(children, key=lambda child: child.pid)[index].kill()


def test_what_runs_answers_ends_with_the_process_that_started_it(tmp_path):
    script = "import time\nfrom dirl_cli.reward.program_runner import program_server\n"
    script += "from dirl_cli.reward.programs import program_credit\n"
    script += "print(program_server()._process.pid, flush=True)\nimport threading\n"
    script += "from dirl_cli.types import Problem\n"
    script += "p = Problem('', '', '', details={'tests': ['f()']})\n"
    script += "program_credit(p, 'while True: pass')\n"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    server = psutil.Process(int(parent.stdout.readline()))
    until = time.monotonic() + 30
    while len(children := server.children()) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert len(children) == 2
    assert wait_for_end([server.pid, *(child.pid for child in children)]) == []


def test_where_the_kernel_cannot_confine_nothing_is_run(monkeypatch):
    start = "import socket, sys\nsocket.socket(fileno=int(sys.argv[2])).send(b'unable')"
    monkeypatch.setattr("dirl_cli.reward.program_runner.START", start)
    program_server.cache_clear()
    with pytest.raises(DirlError, match="only where the kernel can confine them"):
        credit(ADD, RIGHT)
    program_server.cache_clear()
    monkeypatch.setattr(confinement.platform, "machine", lambda: "riscv64")
    assert not confinement.can_confine()


def test_what_does_not_start_is_said_and_leaves_no_process(monkeypatch):
    stop_program_server()
    before = set(psutil.Process().children())
    with monkeypatch.context() as patched:
        for start in ("raise SystemExit(1)", "import os\nos.abort()", "pass"):
            patched.setattr("dirl_cli.reward.program_runner.START", start)
            with pytest.raises(DirlError, match="does not start: free memory, or start fewer"):
                start_program_server()
            with pytest.raises(MemoryError):
                credit(ADD, RIGHT)
    assert set(psutil.Process().children()) <= before
    assert credit(ADD, RIGHT) == 1


def test_what_fails_on_the_way_leaves_the_server_ready_for_the_next(monkeypatch):
    for tests, program in ((ADD, RIGHT), ([{"input": "", "output": "1"}], "print(1)")):
        server = program_server()
        with monkeypatch.context() as patched, pytest.raises(MemoryError, match="no room"):
            patched.setattr("dirl_cli.reward.program_runner.is_readable", no_room)
            credit(tests, program)
        assert credit(tests, program) == 1
        assert program_server() is server


def no_room(*_):
    raise MemoryError("no room")


def test_what_runs_answers_has_no_secret_in_its_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    program_server.cache_clear()
    names = "import os\ndef names(): return set(os.environ) - {'LC_CTYPE'}"  # which Python itself may set
    assert credit(["assert names() == set()"], names) == 1
    environment = Path(f"/proc/{program_server()._process.pid}/environ").read_bytes()
    assert b"hf_secret" not in environment


def test_a_problem_without_tests_is_named():
    for tests in ([], None, "assert f()", [{"input": "1"}], [{"function": "f", "arguments": 1, "result": 1}], [1]):
        with pytest.raises(DirlError, match="problem p has no tests"):
            program_credit(problem(tests), RIGHT)


def test_the_share_of_tests_is_a_reward_and_a_verdict():
    texts = {"right": RIGHT, "some": "def add(a, b): return abs(a + b)", "cut off": RIGHT}
    answers = [(key, Answer(problem(ADD), text, 9, key == "cut off", 1.0, 64, 4)) for key, text in texts.items()]
    with RewardComputer(RewardSettings({"accuracy": 1.0, "credit": 0.5}, workers=1, timeout=30)) as computer:
        results = {key: (result.total, result.correct) for key, result in computer.compute(answers)}
    assert results == {"right": (1.5, True), "some": (pytest.approx(1 / 3), False), "cut off": (0, False)}

    lines = [("line 1", {"index": 0, "completion": f"So:\n```python\n{RIGHT}```\nThat is it."})]
    (answer,) = read_predictions(lines, [problem(ADD)])
    assert answer.extracted == RIGHT
    with Grader(workers=1, timeout=30) as grader:
        (graded,) = regraded([answer], [problem(ADD)], grader)
    assert (graded.correct, graded.credit) == (True, 1)
