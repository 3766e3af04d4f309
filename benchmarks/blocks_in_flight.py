"""What would be gained by denoising a block before the one ahead of it is full, if answers are to stay as they are.

python -m benchmarks.blocks_in_flight MODEL BENCH PROBLEMS        # a minute or two on one core

A block that is drafted behind a half-revealed one sees masks where the attention rule has it see clean tokens. As
randomness belongs to position and step, one forward behind the full block tells of all drafted steps together which are
what they would have been: those states see no more of each other than the views of reinforcement do. So the draft is
kept up to its first other step, whose right outcome that forward tells too. Greedy answers, without a cache; forwards
are counted, each of a block together with the draft behind it.
"""

import sys
from dataclasses import dataclass

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from dirl_cli.cli.build import build
from dirl_cli.data.chat import encode_problems
from dirl_cli.diffusion.sampling import make_candidates, temper
from dirl_cli.diffusion.unmasking import State, find_strategy, quota, reveal, spread
from dirl_cli.files import conf_dir
from dirl_cli.models.load import DiffusionLM, SavedModel
from dirl_cli.types import Decoding, Instruction

STRATEGIES = {"threshold 0.9": "low_confidence_dynamic", "one token a step": "low_confidence_static"}
OPENED = (0.1, 0.5)  # shares of a block beyond which the one behind it is drafted
LONGEST = 96


@dataclass
class Tally:
    """Forwards one after another and with drafts, drafted steps, and how many of them were right."""

    plain: int = 0
    in_flight: int = 0
    drafted: int = 0
    right: int = 0


def next_state(lm: DiffusionLM, logits: Tensor, block: list[int], step: int, decoding: Decoding) -> list[int]:
    """A block after one more step. logits: (B, V)."""
    masked = torch.tensor([token == lm.mask_token_id for token in block])
    logprobs = temper(logits[masked], 0.0, torch.tensor(lm.unsampled_ids)).log_softmax(-1)
    drawn = make_candidates(logprobs, logprobs, logprobs.argmax(-1), decoding.confidence)
    owed = quota(torch.tensor([step]), len(block), decoding.denoising_steps)
    revealed = reveal(find_strategy(decoding.strategy), State(masked[None], drawn, owed, decoding.threshold))[0]
    return torch.where(revealed, spread(drawn.tokens, masked), torch.tensor(block)).tolist()


def logits_of(lm: DiffusionLM, token_ids: list[int]) -> Tensor:
    """(L, V) of whole blocks, each of which sees those before it as they are."""
    block = torch.arange(len(token_ids)) // lm.block_size
    return lm.model(torch.tensor([token_ids]), attention_mask=(block[:, None] >= block)[None, None]).logits[0]


@torch.inference_mode()
def count(lm: DiffusionLM, prompt_ids: list[int], decoding: Decoding, opened: float) -> Tally:
    """Answer a prompt and count. opened: see OPENED."""
    tally, size, mask = Tally(), lm.block_size, lm.mask_token_id
    sequence, draft = list(prompt_ids), []  # of the block to come its states, from all masks on
    while len(sequence) < len(prompt_ids) + decoding.max_new_tokens:
        start = len(sequence) // size * size
        before, given = sequence[:start], sequence[start:]
        block = given + [mask] * (size - len(given))
        step = 1

        # All drafted states in one forward, behind the block that is full now.
        if len(draft) > 1:
            tally.in_flight += 1
            tally.drafted += len(draft) - 1
        for i, state in enumerate(draft if len(draft) > 1 else []):
            if mask not in state or state != block:
                break
            block = next_state(lm, logits_of(lm, before + state)[start:], state, step, decoding)
            step += 1
            tally.plain += 1
            tally.right += draft[i + 1 : i + 2] == [block]

        # Step by step, the block behind drafted in the same forward.
        draft = []
        while mask in block:
            if not draft and sum(token != mask for token in block) > opened * size:
                draft = [[mask] * size]
            is_drafting = bool(draft) and mask in draft[-1]
            logits = logits_of(lm, before + block + (draft[-1] if is_drafting else []))[start:]
            if is_drafting:
                draft.append(next_state(lm, logits[size:], draft[-1], len(draft), decoding))
            block = next_state(lm, logits[:size], block, step, decoding)
            step += 1
            tally.plain += 1
            tally.in_flight += 1
        sequence = before + block
        if set(block[len(given) :]) & set(lm.stop_token_ids):
            break
    return tally


def main(model: str, bench: str, problems: int) -> None:
    lm = SavedModel("", model).load("float32", "cpu")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("eval", [f"bench={bench}", "model=tiny"])
    OmegaConf.resolve(cfg)
    asked = build(cfg.bench).problems()[:problems]
    prompts = encode_problems(lm.tokenizer, asked, build(cfg.instruction, Instruction), lm.longest_prompt)

    print("| | drafted from | forwards | with drafts | drafted steps | right |\n|---|--:|--:|--:|--:|--:|")
    for name, strategy in STRATEGIES.items():
        decoding = lm.decoding(Decoding(strategy=strategy, threshold=0.9, max_new_tokens=LONGEST))
        for opened in OPENED:
            tallies = [count(lm, list(prompt), decoding, opened) for prompt in prompts]
            plain, in_flight, drafted, right = (
                sum(getattr(tally, field) for tally in tallies) for field in ("plain", "in_flight", "drafted", "right")
            )
            print(f"| {name} | {opened:.0%} | {plain} | {in_flight} | {drafted} | {right} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
