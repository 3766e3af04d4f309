"""Dataclasses that several rooms exchange: plain values that a test can write by hand and another process can send."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from dirl_cli.errors import DirlError
from dirl_cli.ranges import AnswerSeed, Count, Finite, Natural, NotNegative, OneOf, Share, SomeShare, require_fields

StopReason = Literal["stop", "length"]
Confidence = Literal["sampled", "max", "entropy"]
STATE = "state.json"  # in every checkpoint of a training run
HELD = 0  # as a reveal step, of a token that stood in the answer from the start: see `Trajectory`

# Ways to launch a run: in the first every process holds the whole model, in the others the processes share it.
UNSHARDED_LAUNCHES = ("auto", "single", "ddp", "cpu_gloo")
SHARDED_LAUNCHES = ("fsdp2", "zero2")


@dataclass(frozen=True)
class Problem:
    """A question with a verifiable answer; `id` is unique in its source, `subset` a label to report apart.

    system: what stands before the question as a system turn. solution: a worked one, from which hints are taken, or "".
    verifier: how answers are verified, a name of reward/verifiers.py. details: what that needs besides `answer`, which
    is one right answer; values of JSON.
    """

    id: str
    question: str
    answer: str
    subset: str = ""
    system: str = ""
    verifier: str = "math"
    details: dict[str, Any] = field(default_factory=dict)
    solution: str = ""

    @property
    def is_gradable(self) -> bool:
        """Whether there is anything to grade an answer by."""
        return bool(self.answer.strip() or self.details)


@dataclass(frozen=True)
class Instruction:
    """How a question is put to a model.

    text: what is asked of it, on a line after the question (role user) or in a turn before it (role system).
    think: whether the prompt ends in `<think>`, so that the answer begins with a thought.
    """

    text: str | None = None
    role: Annotated[str, OneOf("user", "system")] = "user"
    think: bool = False

    def __post_init__(self) -> None:
        require_fields(self, "instruction")

    def messages(self, question: str, system: str = "") -> list[dict[str, str]]:
        """The turns that put the question. system: what stands before it as a system turn, "" for nothing."""
        if self.text and self.role == "user":
            question = f"{question}\n{self.text}"
        elif self.text:
            system = f"{system}\n{self.text}" if system else self.text

        turns = [{"role": "user", "content": question}]
        if system:
            turns.insert(0, {"role": "system", "content": system})
        return turns


@dataclass(frozen=True)
class Decoding:
    """How a completion is sampled (the strategies are in diffusion/unmasking.py).

    block_size: tokens per block; None takes the model's own.
    denoising_steps: forwards in which a block is filled at the latest; None for as many as it has tokens.
    strategy: a name from diffusion/unmasking.py, or the import path of a function like those.
    threshold: reveal above this confidence (dynamic) or margin of probability, never ask for more confidence than this
        (bounded_adaptive), or the bound on summed entropy in nats (entropy_bounded).
    threshold_by_step, threshold_by_position: what the dynamic threshold gains from a block's first denoising step to
        its last, and from its first token to its last.
    lowest_threshold: never ask for less confidence than this (bounded_adaptive).
    confidence: `sampled` (probability of the drawn token), `max` or `entropy` (of the distribution alone).
    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off.
    max_new_tokens: the answer ends with the first whole block that reaches it, or with the model's last position.
    stop_token_ids: the answer ends with the block that holds one of them; the text is cut there.
    """

    block_size: Count | None = None
    denoising_steps: Count | None = None
    strategy: str = "low_confidence_dynamic"
    threshold: NotNegative = 0.9
    threshold_by_step: Finite = 0.0
    threshold_by_position: Finite = 0.0
    lowest_threshold: Share = 0.6
    confidence: Annotated[str, OneOf(*get_args(Confidence))] = "sampled"
    temperature: NotNegative = 0.0
    top_k: Natural = 0
    top_p: SomeShare = 1.0
    max_new_tokens: Count = 256
    stop_token_ids: tuple[Natural, ...] = ()
    seed: AnswerSeed = 0

    def __post_init__(self) -> None:
        require_fields(self, "decoding")
        if self.strategy in ("low_confidence_dynamic", "probability_margin") and self.threshold > 1:
            scored = "a margin" if self.strategy == "probability_margin" else "confidence"
            raise DirlError(
                f"decoding.threshold={self.threshold:g}: {scored} is at most 1, so nothing is above it: give less"
            )
        if self.strategy == "bounded_adaptive" and not self.lowest_threshold <= self.threshold <= 1:
            raise DirlError(
                f"decoding.threshold={self.threshold:g} is to be from decoding.lowest_threshold="
                f"{self.lowest_threshold:g} to 1, since these bound a confidence: change one of them"
            )
        if self.is_threshold_scheduled:
            self._require_schedule()

    def _require_schedule(self) -> None:
        """Raises DirlError for a threshold that moves where no strategy reads it, or out of what confidence may be."""
        if self.strategy != "low_confidence_dynamic":
            raise DirlError(
                "decoding.threshold_by_step and threshold_by_position are of decoding=dynamic, whose"
                f" threshold they move: leave them out of decoding.strategy={self.strategy}"
            )
        changes = (self.threshold_by_step, self.threshold_by_position)
        lowest = self.threshold + sum(min(change, 0.0) for change in changes)
        highest = self.threshold + sum(max(change, 0.0) for change in changes)
        if lowest < -1e-9 or highest > 1 + 1e-9:  # 0.9 and 0.1 add up to 1 but for rounding
            raise DirlError(
                f"decoding.threshold goes from {lowest:g} to {highest:g} by threshold_by_step and"
                " threshold_by_position, and confidence from 0 to 1: change one of them"
            )

    @property
    def is_threshold_scheduled(self) -> bool:
        """Whether the threshold depends on the denoising step or the place in the block."""
        return self.threshold_by_step != 0 or self.threshold_by_position != 0

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p leave tokens out; greedy decoding truncates nothing."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


SENT_AS_IT_IS = (
    "temperature",
    "top_p",
    "top_k",
    "strategy",
    "threshold",
    "threshold_by_step",
    "threshold_by_position",
    "lowest_threshold",
    "confidence",
)  # of `Decoding`: what a request to a server says by the same names


@dataclass(frozen=True)
class Trajectory:
    """A completion and how it came about; one entry per answer token, whole blocks, stop token and tail included.

    What other processes sampled has arrays for lists, which read alike: see rollout/arrays.py.
    reveal_step: the denoising step inside its block, from 1, at which a token was revealed; HELD for a token of a hint,
        which stood there from the start.
    logprobs: its log-probability then, under the distribution it was drawn from
        (under the model's own at temperature 0); 0 for a token that was held.
    denoise_forwards: forwards that revealed tokens; forwards: those and the ones that only cached.
    weights_version: optimizer steps that the weights had taken at its first block.
    block_size: tokens per block; None where that was not noted.
    versions: of the weights that drew each token, where there were new ones before it ended; else empty.
    entropies: in nats, of the distribution before top-k and top-p when a token was revealed, 0 for one that was held;
        empty where the sampler was not asked to record them.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    reveal_step: list[int]
    logprobs: list[float] = field(default_factory=list)
    stop_reason: StopReason = "length"
    denoise_forwards: int = 0
    forwards: int = 0
    weights_version: int = 0
    stop_token_ids: tuple[int, ...] = ()
    block_size: int | None = None
    versions: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    @property
    def token_versions(self) -> list[int]:
        """The version of the weights that drew each token."""
        return self.versions or [self.weights_version] * len(self.token_ids)

    @property
    def num_revealed(self) -> int:
        """How many answer tokens denoising steps revealed: all but those that were held."""
        return len(self.reveal_step) - self.reveal_step.count(HELD)

    def revealed_at(self, block_size: int) -> list[int]:
        """The denoising forward of the answer, counted from 1 over all its blocks, that revealed each of its tokens.

        HELD for a token that none revealed.
        """
        first = len(self.prompt_ids)
        steps = [((first + i) // block_size, step) for i, step in enumerate(self.reveal_step)]
        revealing = sorted({(block, step) for block, step in steps if step != HELD})
        number = {step: n for n, step in enumerate(revealing, start=1)}
        return [number.get(step, HELD) for step in steps]

    @property
    def is_hinted(self) -> bool:
        """Whether any of its tokens were held."""
        return HELD in self.reveal_step

    @property
    def completion_ids(self) -> list[int]:
        """The answer's tokens up to and without the first stop token."""
        import numpy as np  # here, so that a command's help need not wait for it

        stops = np.isin(np.asarray(self.token_ids), self.stop_token_ids).nonzero()[0]
        return self.token_ids[: int(stops[0])] if len(stops) else self.token_ids[:]
