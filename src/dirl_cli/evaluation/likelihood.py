"""The likelihood of given texts as a benchmark: a line on disk for each text, bits per token over all of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt
from pathlib import Path
from statistics import variance

from dirl_cli.console import PlainConsole
from dirl_cli.errors import DirlError
from dirl_cli.evaluation import report
from dirl_cli.evaluation.answers import checked
from dirl_cli.evaluation.result_card import CARD
from dirl_cli.files import write_text
from dirl_cli.ranges import Count

TEXT_FILE = "texts.jsonl"
CSV_FILE = "likelihood.csv"
CAPTION = (
    "left to right: exact, one token revealed at a time. elbo: by random masks, ±: its standard error over the draws.\n"
    "masked: bits per masked token where that share of a block's tokens is masked, which the elbo averages over."
)


@dataclass(frozen=True)
class Likelihood:
    """`bench=likelihood`: what is measured of the texts of `data=`.

    draws, rates: of the ELBO's masks, see `training/text_likelihood.py`: MaskDraws. row_tokens: of a packed row.
    column: of plain text, all of which is scored; None scores the answers of demonstrations.
    """

    name: str
    draws: Count
    rates: Count
    row_tokens: Count
    column: str | None = None


@dataclass(frozen=True)
class TextLikelihood:
    """A text's log-likelihoods, in nats.

    tokens, bytes: of what is scored. elbo: an estimate for each draw of masks. rate_logprobs, rate_tokens: by masking
    rate from low to high, the sum of the masked tokens' log-probs over all draws, and their number.
    """

    text: str
    tokens: int
    bytes: int
    left_to_right: float
    elbo: list[float]
    rate_logprobs: list[float]
    rate_tokens: list[int]


@dataclass(frozen=True)
class RateLoss:
    """Bits per masked token where between `above` and `up_to` of a block's tokens are masked, None where none were."""

    above: float
    up_to: float
    tokens: int
    bits_per_token: float | None


@dataclass(frozen=True)
class LikelihoodMetrics:
    """Bits over all texts: fewer are better.

    left_to_right, elbo: per scored token; elbo_standard_error: over the masks that were drawn, None for one draw of
    them. per_byte: the same two per byte of the texts, which compares models of different tokenizers.
    """

    texts: int
    tokens: int
    bytes: int
    left_to_right: float
    elbo: float
    elbo_standard_error: float | None
    left_to_right_per_byte: float
    elbo_per_byte: float
    by_rate: list[RateLoss]


def read_texts(path: Path) -> list[TextLikelihood]:
    """The texts of a file, none if it is not there. Raises DirlError, with its number, for a line that is none."""
    if not path.exists():
        return []
    texts = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            text = checked(TextLikelihood(**json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise DirlError(f"{path} line {number} is not a text's likelihood: remove it") from error
        texts[text.text] = text
    return list(texts.values())


def measure_texts(texts: Sequence[TextLikelihood]) -> LikelihoodMetrics:
    """The metrics of at least one text."""
    tokens = sum(text.tokens for text in texts)
    num_bytes = max(sum(text.bytes for text in texts), 1)
    exact = -sum(text.left_to_right for text in texts) / log(2)
    draws = len(texts[0].elbo)
    bound = -sum(sum(text.elbo) for text in texts) / draws / log(2)

    # Texts have masks of their own, so that the variances of their means add up.
    error = None
    if draws > 1:
        error = sqrt(sum(variance(text.elbo) for text in texts) / draws) / log(2) / tokens

    by_rate = []
    rates = len(texts[0].rate_tokens)
    for rate in range(rates):
        masked = sum(text.rate_tokens[rate] for text in texts)
        bits = -sum(text.rate_logprobs[rate] for text in texts) / log(2)
        by_rate.append(RateLoss(rate / rates, (rate + 1) / rates, masked, bits / masked if masked else None))
    return LikelihoodMetrics(
        texts=len(texts),
        tokens=tokens,
        bytes=num_bytes,
        left_to_right=exact / tokens,
        elbo=bound / tokens,
        elbo_standard_error=error,
        left_to_right_per_byte=exact / num_bytes,
        elbo_per_byte=bound / num_bytes,
        by_rate=by_rate,
    )


def rows_of(metrics: LikelihoodMetrics) -> dict[str, dict[str, str]]:
    """The table of one evaluation: text by row and column."""
    elbo = f"{metrics.elbo:.4f}"
    if metrics.elbo_standard_error is not None:
        elbo += f" ± {metrics.elbo_standard_error:.4f}"
    rows = {
        "left to right": likelihood_cells(
            metrics.tokens, f"{metrics.left_to_right:.4f}", f"{metrics.left_to_right_per_byte:.4f}"
        ),
        "elbo": likelihood_cells(metrics.tokens, elbo, f"{metrics.elbo_per_byte:.4f}"),
    }
    for rate in metrics.by_rate:
        bits = "" if rate.bits_per_token is None else f"{rate.bits_per_token:.4f}"
        rows[rate_name(rate)] = likelihood_cells(rate.tokens, bits, "")
    return rows


def likelihood_cells(tokens: int, per_token: str, per_byte: str) -> dict[str, str]:
    return {"tokens": f"{tokens:,}", "bits/token": per_token, "bits/byte": per_byte}


def rate_name(rate: RateLoss) -> str:
    """Such as: masked 25-50 %."""
    return f"masked {100 * rate.above:.0f}-{100 * rate.up_to:.0f} %"


def likelihood_table(title: str, metrics: LikelihoodMetrics) -> report.Fitting:
    """The table of one evaluation."""
    return report.draw(title, rows_of(metrics))


def csv_line(metrics: LikelihoodMetrics) -> dict[str, str | int | float]:
    """An evaluation as one line of a CSV file, empty where nothing is known."""
    error = metrics.elbo_standard_error
    line: dict[str, str | int | float] = {
        "texts": metrics.texts,
        "tokens": metrics.tokens,
        "bits_per_token_left_to_right": metrics.left_to_right,
        "bits_per_token_elbo": metrics.elbo,
        "elbo_standard_error": "" if error is None else error,
        "bits_per_byte_left_to_right": metrics.left_to_right_per_byte,
        "bits_per_byte_elbo": metrics.elbo_per_byte,
    }
    for rate in metrics.by_rate:
        bits = rate.bits_per_token
        line[f"bits_per_masked_token_to_{rate.up_to:g}"] = "" if bits is None else bits
    return line


def metrics_of_card(card: Mapping[str, object]) -> LikelihoodMetrics | None:
    """The metrics of an evaluation's card; None where it is of another benchmark."""
    values = card.get("likelihood")
    if not isinstance(values, dict):
        return None
    return LikelihoodMetrics(**{**values, "by_rate": [RateLoss(**rate) for rate in values["by_rate"]]})


def likelihoods(jobs: Sequence[tuple[Sequence[str], Path]]) -> dict[str, LikelihoodMetrics]:
    """The metrics of a sweep's jobs by their overrides; empty where one of them is of another benchmark."""
    by_job = {}
    for overrides, out in jobs:
        metrics = metrics_of_card(json.loads((out / CARD).read_bytes()))
        if metrics is None:
            return {}
        by_job[", ".join(overrides)] = metrics
    return by_job


def show_likelihoods(title: str, folder: Path, members: Mapping[str, LikelihoodMetrics], console: PlainConsole) -> None:
    """Print a sweep's evaluations as one table, and write them to one CSV file in `folder`."""
    rows = {}
    lines = []
    for name, metrics in members.items():
        error = metrics.elbo_standard_error
        rows[name] = {
            "texts": str(metrics.texts),
            "left to right": f"{metrics.left_to_right:.4f}",
            "elbo": f"{metrics.elbo:.4f}" + ("" if error is None else f" ± {error:.4f}"),
        }
        lines.append({"run": name, **csv_line(metrics)})
    console.print(report.draw(f"{title}: bits per token", rows))
    file = folder / f"{title}.csv"
    write_text(file, report.csv_text(lines))
    console.print(str(file), soft_wrap=True)
