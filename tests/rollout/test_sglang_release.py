"""The plug-in in the released SGLang's own loop, registry and hooks, on a CPU, against the native engine.

A scheduler is written here, which hands over blocks as SGLang's does; what it calls is SGLang's own code.
"""

import ast
import sys
from array import array
from types import SimpleNamespace

import pytest
import torch

from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.rollout.server_sampler import Question, body_of
from dirl_cli.rollout.sglang_client import AnswerStream, request_body
from dirl_cli.rollout.sglang_plugin import FORWARD
from dirl_cli.types import Decoding
from tests.helpers import sglang_release
from tests.helpers.paths import ROOT
from tests.helpers.served import speaking_lm
from tests.helpers.sglang_release import Reason, released_methods, source
from tests.reference.sampling import last_block_logits

pytestmark = pytest.mark.skipif(not sglang_release.SRT.exists(), reason=sglang_release.ABSENT)

PROMPTS = [[20, 30, 40], [50, 60, 70, 80], [90] * 9, [11, 12, 13, 14, 15]]


@pytest.fixture(scope="module")
def lm():
    return speaking_lm(3)


@pytest.fixture
def registry():
    with sglang_release.imported() as algorithms:
        yield algorithms


class ModelRunner:
    """Computes the logits of each block of a batch, of the whole sequence before it. sequences: what is committed."""

    def __init__(self, lm) -> None:
        self.lm = lm
        self.sequences: list[list[int]] = []

    def forward(self, batch, pp_proxy_tensors=None):
        blocks = batch.input_ids.view(batch.batch_size, -1).tolist()
        starts = batch.positions.view(batch.batch_size, -1)[:, 0].tolist()
        logits = []
        for sequence, start, block in zip(self.sequences, starts, blocks, strict=True):
            logits.append(last_block_logits(self.lm, sequence[:start] + block))
        output = SimpleNamespace(full_logits=torch.cat(logits))
        return SimpleNamespace(logits_output=output, can_run_graph=False)


def request_class():
    """SGLang's request, as far as what ends it goes: its own methods, on the fields that they read."""
    names = ("update_finish_state", "_check_token_based_finish", "_cap_finished_len_at_max_new_tokens", "finished")
    ends = released_methods(
        "managers/schedule_batch.py", "Req", *names, FINISH_MATCHED_TOKEN=Reason, FINISH_LENGTH=Reason
    )
    cut = released_methods("managers/schedule_batch.py", "Req", "output_ids_through_stop")
    fixed = dict.fromkeys(("_check_vocab_boundary_finish", "_check_str_based_finish"), lambda self, tokens: False)
    return type("Req", (SimpleNamespace,), ends | cut | fixed)


def requests_for(lm, decoding: Decoding):
    """SGLang's requests for an answer to each prompt, from the bodies that the client sends."""
    make = request_class()
    requests = []
    for i, prompt in enumerate(PROMPTS):
        question = Question(i, prompt, 0, 1, 5)
        body = body_of(question, decoding, WeightsId(3, "0" * 64), lm.block_size)
        params = request_body(body, lm)["sampling_params"]
        defaults = {"temperature": 1.0, "top_k": 1 << 30, "top_p": 1.0, "sampling_seed": None, "ignore_eos": False}
        requests.append(
            make(
                rid=str(i),
                sampling_params=SimpleNamespace(**defaults | params),
                origin_input_ids=array("q", prompt),
                output_ids=array("q"),
                full_untruncated_fill_ids=array("q"),
                dllm_config=SimpleNamespace(block_size=lm.block_size, mask_id=lm.mask_token_id),
                dllm_algo_state=None,
                dllm_incomplete_ids=array("q"),
                customized_info=None,
                finished_reason=None,
                finished_len=None,
                to_finish=None,
                grammar=None,
                tokenizer=None,
                eos_token_ids=set(),
                body=body,
            )
        )
    return requests


def run(lm, requests, registry, is_hooked=True) -> None:
    """Answer all requests in batches of those under way, by SGLang's loop for a forward and for what comes of it."""
    from sglang.srt.dllm.config import DllmConfig

    from dirl_cli.rollout.sglang_algorithm import Dirl, keep_records

    size = lm.block_size
    config = DllmConfig("Dirl", {}, size, lm.mask_token_id, 8, first_done_first_out_mode=True)
    registry.algo_name_to_cls["Dirl"] = Dirl
    worker = SimpleNamespace(dllm_algorithm=registry.get_algorithm(config), model_runner=ModelRunner(lm))
    forward = released_methods(
        "managers/tp_worker.py", "TpModelWorker", "_forward_batch_generation_dllm", GenerationBatchResult=Result
    )["_forward_batch_generation_dllm"]
    process = released_methods("dllm/mixin/scheduler.py", "SchedulerDllmMixin", "process_batch_result_dllm")
    scheduler = SimpleNamespace(
        dllm_config=config,
        token_to_kv_pool_allocator=SimpleNamespace(free_group_begin=lambda: None, free_group_end=lambda: None),
        metrics_reporter=SimpleNamespace(num_generated_tokens=0, report_prefill_stats=lambda **options: None),
        output_streamer=SimpleNamespace(stream_output=lambda requests, logprob: None),
        _finish_dllm_request_if_needed=lambda request: None,
    )

    done = [0] * len(requests)  # tokens of whole blocks whose keys and values SGLang would have
    while under_way := [i for i, request in enumerate(requests) if not request.finished()]:
        batch, worker.model_runner.sequences = next_batch(lm, requests, done, under_way)
        forward_batch = SimpleNamespace(
            batch_size=len(under_way),
            input_ids=torch.tensor([request.full_untruncated_fill_ids[-size:] for request in batch.reqs]).flatten(),
            positions=torch.cat([torch.arange(done[i], done[i] + size, dtype=torch.int32) for i in under_way]),
            dllm_prompt_mask=None,
        )
        if is_hooked:
            result = keep_records(forward, worker, forward_batch, batch)
        else:
            worker.dllm_algorithm.requests = batch.reqs
            result = forward(worker, forward_batch, batch)
        process["process_batch_result_dllm"](scheduler, batch, result)
        for i in under_way:
            if not requests[i].dllm_incomplete_ids:
                done[i] += size


def next_batch(lm, requests, done, under_way):
    """The next block of each request under way, as `_init_fill_ids_for_dllm` has it, and the tokens before it."""
    size = lm.block_size
    sequences = []
    for i in under_way:
        request = requests[i]
        committed = request.origin_input_ids + request.output_ids
        block = request.dllm_incomplete_ids or committed[done[i] : done[i] + size]
        block = block + array("q", [lm.mask_token_id] * (size - len(block)))
        request.full_untruncated_fill_ids = committed[: done[i]] + block
        request.extend_end = done[i] + size
        sequences.append(committed.tolist())
    nothing = {"prefill_stats": None, "dp_cooperation_info": None, "return_logprob": False}
    mode = SimpleNamespace(is_dllm_extend=lambda: True)
    chosen = [requests[i] for i in under_way]
    batch = SimpleNamespace(reqs=chosen, batch_size=lambda: len(chosen), forward_mode=mode, **nothing)
    return batch, sequences


class Result(SimpleNamespace):
    """SGLang's result of a forward."""

    copy_done = None


def told_of(request):
    """What the client makes of the response to a request, all of it at once."""
    stream = AnswerStream(request.body, 4)
    length = len(request.output_ids_through_stop)
    kind = "stop" if hasattr(request.finished_reason, "matched") else "length"
    reason = {"type": kind} | vars(request.finished_reason)
    entries = request.customized_info["dirl"][:length]
    blocks = stream.blocks({"dirl": entries, "weight_version": "3:a", "finish_reason": reason})
    lists = []
    for name in ("token_ids", "reveal_step", "logprobs"):
        lists.append([entry for block in blocks for entry in block[name]])
    return *lists, blocks[-1]["denoise_forwards"], blocks[-1]["stop_reason"]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "strategy": "low_confidence_static", "denoising_steps": 2},
        {"temperature": 1.0, "strategy": "entropy_bounded", "threshold": 1.5},
        {"temperature": 1.0, "strategy": "probability_margin", "threshold": 0.3, "confidence": "max"},
        {"temperature": 1.0, "strategy": "bounded_adaptive", "threshold": 0.9, "lowest_threshold": 0.2},
        {"strategy": "sequential"},
    ],
    ids=lambda options: options.get("strategy", "dynamic"),
)
def test_sglangs_loop_with_the_plug_in_gives_the_native_engines_answers(lm, registry, options):
    decoding = lm.decoding(Decoding(**options, max_new_tokens=10, seed=5))
    requests = requests_for(lm, decoding)
    run(lm, requests, registry)
    expected = NativeSampler(lm, max_batch=1).sample(PROMPTS, 1, decoding)
    for request, (answer,) in zip(requests, expected, strict=True):
        token_ids, reveal_step, logprobs, denoise_forwards, stop_reason = told_of(request)
        assert (token_ids, reveal_step) == (answer.token_ids, answer.reveal_step)
        assert logprobs == pytest.approx(answer.logprobs, abs=1e-4)
        assert (denoise_forwards, stop_reason) == (answer.denoise_forwards, answer.stop_reason)


def test_a_block_that_holds_a_stop_token_is_told_whole_though_sglang_cuts_the_answer_at_it(lm, registry):
    free = NativeSampler(lm, max_batch=1).sample(PROMPTS, 1, Decoding(temperature=1.0, max_new_tokens=16, seed=5))
    stops = tuple({answer.token_ids[5] for (answer,) in free})
    decoding = Decoding(temperature=1.0, max_new_tokens=16, seed=5, stop_token_ids=stops)
    requests = requests_for(lm, decoding)
    run(lm, requests, registry)
    is_cut = []
    for request, (answer,) in zip(requests, NativeSampler(lm, max_batch=1).sample(PROMPTS, 1, decoding), strict=True):
        assert told_of(request)[:2] == (answer.token_ids, answer.reveal_step)
        assert request.output_ids_through_stop.tolist() == answer.token_ids[: len(answer.completion_ids) + 1]
        is_cut.append(len(answer.completion_ids) + 1 < len(answer.token_ids))
    assert any(is_cut)


def test_greedy_answers_by_a_threshold_are_those_of_sglangs_own_algorithm(lm, registry):
    from sglang.srt.dllm.algorithm.low_confidence import LowConfidence
    from sglang.srt.dllm.config import DllmConfig

    decoding = Decoding(strategy="low_confidence_dynamic", threshold=0.4, denoising_steps=4, max_new_tokens=12, seed=5)
    requests = requests_for(lm, decoding)
    run(lm, requests, registry)

    algorithm = LowConfidence(DllmConfig("LowConfidence", {"threshold": 0.4}, 4, lm.mask_token_id, 1))
    for request, prompt in zip(requests, PROMPTS, strict=True):
        runner = TextModelRunner(lm)
        sequence = list(prompt)
        while len(sequence) < len(prompt) + 12:
            start = len(sequence) // 4 * 4
            block = sequence[start:] + [lm.mask_token_id] * (start + 4 - len(sequence))
            runner.sequences = [sequence]
            batch = SimpleNamespace(
                batch_size=1,
                input_ids=torch.tensor(block),
                positions=torch.arange(start, start + 4),
                dllm_prompt_mask=None,
            )
            sequence += algorithm.run(runner, batch)[1][0].tolist()
        assert request.output_ids.tolist()[:12] == sequence[len(prompt) :][:12]


class TextModelRunner(ModelRunner):
    """Likewise, without the tokens that we never sample, which SGLang's own algorithm knows nothing of."""

    def forward(self, batch, pp_proxy_tensors=None):
        output = super().forward(batch)
        output.logits_output.full_logits[:, list(self.lm.unsampled_ids)] = -torch.inf
        return output


def test_the_plug_in_registers_its_algorithm_and_its_hook(registry, monkeypatch):
    from importlib import metadata

    from dirl_cli.rollout import sglang_plugin

    monkeypatch.setattr(sglang_plugin, "version", lambda package: metadata.version("sglang"))
    monkeypatch.syspath_prepend(str(sglang_release.RELEASE))
    sglang_plugin.register()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    assert registry.get_algorithm_cls("Dirl").__name__ == "Dirl"
    ((kind, hook, _),) = HookRegistry._hooks[FORWARD]
    assert kind is HookType.AROUND
    assert hook.__name__ == "keep_records"


def test_sglangs_hooks_put_it_around_the_forward_of_a_class(registry, monkeypatch):
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    module = SimpleNamespace(TpModelWorker=type("TpModelWorker", (), {"forward": lambda self, batch: batch + 1}))
    monkeypatch.setitem(sys.modules, "stand_in", module)
    HookRegistry.reset()
    times_ten = lambda original, *arguments: original(*arguments) * 10  # noqa: E731
    HookRegistry.register("stand_in.TpModelWorker.forward", times_ten, HookType.AROUND)
    HookRegistry.apply_hooks()
    assert module.TpModelWorker().forward(1) == 20
    HookRegistry.reset()


def test_a_request_that_the_server_would_decode_otherwise_is_refused(lm, registry):
    from dirl_cli.rollout.sglang_algorithm import Dirl

    request = requests_for(lm, Decoding(seed=5))[0]
    assert Dirl.validate_request(request) is None
    params = request.sampling_params.custom_params
    for change, sentence in {
        "block_size": "start it with `block_size: 8` in the file of --dllm-algorithm-config",
        "mask_token_id": "masks with token",
        "dirl": "another version of dirl",
    }.items():
        request.sampling_params.custom_params = params | {change: 8}
        assert sentence in Dirl.validate_request(request)
    request.sampling_params.custom_params = params | {"strategy": "os.system"}
    assert "strategy=os.system" in Dirl.validate_request(request)
    request.sampling_params.custom_params = {"dirl": 1}
    assert Dirl.validate_request(request)


def test_a_plain_request_as_of_sglangs_warm_up_is_answered_too(lm, registry):
    requests = requests_for(lm, Decoding(max_new_tokens=6, seed=5))
    for request in requests:
        request.sampling_params.custom_params = None
        request.sampling_params.top_k = 1  # what temperature 0 becomes
    run(lm, requests, registry, is_hooked=False)
    assert all(len(request.output_ids) >= 6 for request in requests)


def test_what_the_plug_in_and_its_client_rest_on_stands_in_the_release():
    worker = {node.name: node for node in ast.parse(source("managers/tp_worker.py")).body if hasattr(node, "name")}
    owner, name = FORWARD.rsplit(".", 2)[1:]
    assert owner in worker
    assert f"def {name}(\n        self,\n        forward_batch: ForwardBatch,\n        batch:" in source(
        "managers/tp_worker.py"
    )
    for file, text in {
        "managers/schedule_batch.py": "self.customized_info: Optional[Dict[str, List[Any]]] = None",
        "managers/scheduler_components/output_streamer.py": "values = req_values[send_token_offset : len(output_ids_)]",
        "managers/tokenizer_manager.py": '"weight_version": self.config_value("weight_version")',
        "managers/scheduler.py": "if error_msg := self.validate_dllm_request(req):",
        "arg_groups/fields/serving.py": "incremental_streaming_output: A[",
        "arg_groups/fields/exec_.py": "dllm_fdfo: A[",
        "sampling/sampling_params.py": "custom_params: Optional[",
    }.items():
        assert text in source(file), file
    for route in ("/generate", "/server_info", "/model_info", "/health_generate", "/update_weights_from_disk"):
        assert f'"{route}"' in source("entrypoints/http_server.py")
    for field in ("model_path: str", "weight_version: Optional[str] = None", "flush_cache: bool = True"):
        assert field in source("managers/io_struct.py").partition("class UpdateWeightFromDiskReqInput")[2][:2000]
    assert '"max_req_input_len": self.max_req_input_len' in source("managers/scheduler.py")
    assert '"version": __version__' in source("entrypoints/http_server.py")


def test_the_pin_of_the_tests_is_the_version_that_works_and_the_entry_point_is_the_plug_in():
    assert "sglang==0.5.23" in (ROOT / "tests" / "sglang.txt").read_text()
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["sglang.srt.plugins"] == {"dirl": "dirl_cli.rollout.sglang_plugin:register"}
