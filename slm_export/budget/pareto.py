"""``--pareto``: the frontier of size against quality, without an export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slm_export.budget.choices import Allocation
from slm_export.budget.frontier import Point, frontier, log_perplexity, measured, ratio
from slm_export.budget.losses import Ground, before_bits, ground_of, with_losses
from slm_export.budget.problem import Problem, read_problem
from slm_export.budget.search import first_allocation, refuse_impossible
from slm_export.compilation import Plan
from slm_export.compression.distance import Distance
from slm_export.errors import InputError
from slm_export.evaltext import load_documents, load_sentences, token_windows
from slm_export.fidelity.tokens import TOKENS, WINDOW
from slm_export.optimize import optimize
from slm_export.progress import Progress
from slm_export.source.tasks import EMBEDDING, GENERATION


@dataclass(frozen=True)
class Explored:
    """The frontier of a model on a device."""

    name: str
    device: str
    format: str
    quality: str
    """What is plotted against size."""
    points: tuple[Point, ...]
    notes: tuple[str, ...]


def explore(plan: Plan, progress: Progress) -> Explored:
    """Return the frontier; with a budget, the point that it chooses is marked.

    Raises:
        InputError: the model is of a task whose quality is no figure that adds up, or the budget is impossible.
    """
    problem = read_problem(plan, progress)
    refuse_impossible(problem)
    source = problem.source
    if source.task not in (GENERATION, EMBEDDING):
        raise InputError(f"{source.name}: --pareto is of models that write text or embed it")
    documents = load_documents(plan.request.eval_text)
    ground = ground_of(problem, progress)
    expected = with_losses(problem, ground, before_bits(problem, ground, progress), progress)
    chosen = first_allocation(expected, problem.budget) if problem.budget else None
    points = frontier(expected, chosen)
    with progress.stage("measure points of the frontier") as stage:
        measure = (
            _of_decoder(problem, ground, documents)
            if source.task == GENERATION
            else _of_encoder(problem, ground)
        )

        def one(allocation: Allocation) -> float:
            stage.advance(1, f"{len(allocation)} matrices")
            return measure(allocation)

        points = measured(points, one)
    quality = "perplexity ratio" if source.task == GENERATION else "mean cosine"
    notes = ("measured: these weights in torch, on the evaluation text; runtimes round activations besides",)
    return Explored(source.name, plan.profile.title, expected.formats[0], quality, points, notes)


def _of_decoder(problem: Problem, ground: Ground, documents: Sequence[str]) -> Callable[[Allocation], float]:
    tokenizer, source = problem.tokenizer, problem.source
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    length = min(WINDOW, source.positions or WINDOW)
    windows = token_windows(documents, tokenizer.encode, length, bos, TOKENS)
    before = log_perplexity(source, windows)

    def measure(allocation: Allocation) -> float:
        made = optimize(
            problem.recipe(allocation), source, ground.source_sha256, ground.text, None, Progress(silent=True)
        )
        return ratio(before, log_perplexity(made.checkpoint, windows))

    return measure


def _of_encoder(problem: Problem, ground: Ground) -> Callable[[Allocation], float]:
    tokenizer, source = problem.tokenizer, problem.source
    most = source.positions or WINDOW
    windows = [tuple(tokenizer.encode_with_template(text)[:most]) for text in load_sentences()]
    distance = Distance(source, windows, TOKENS)

    def measure(allocation: Allocation) -> float:
        made = optimize(
            problem.recipe(allocation), source, ground.source_sha256, ground.text, None, Progress(silent=True)
        )
        return 1 - distance.to(made.checkpoint)

    return measure
