"""Several GPUs that share a model: the numbers of those that hold it whole."""

import pytest
import torch

from tests.helpers.steps import among, differences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.05)])
def test_two_gpus_that_share_a_model_learn_what_two_do_that_hold_it(tmp_path, dtype, tolerance):
    found = {}
    for launch in ("ddp", "fsdp2"):
        (tmp_path / launch).mkdir()
        found[launch] = among(2, tmp_path / launch, launch, device="cuda", dtype=dtype)[0]
    for task, held in found["ddp"].items():
        assert max(differences(held, found["fsdp2"][task]).values()) < tolerance
