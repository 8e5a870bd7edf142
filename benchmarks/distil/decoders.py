"""What a teacher is worth to a decoder of half its size, and what training on the grid is worth to its export.

    python benchmarks/distil/decoders.py --out FOLDER

The child is examples/pycode-5m with half its layers and fewer neurons. For as many tokens each, in the same order, it
learns with its teacher; alone, from the same cut weights; alone, from random weights. Then the taught child learns on
for as many steps again, in floats and (from half way on) on the grid of int4, and what the export stores of both is
measured. Training text is Python's standard library, held-out text the files that the teacher has not seen either
(heldout.tsv), without those that share a run of 13 words with the training text. Writes decoders.json and plots; one
thread.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from quality.heldout import heldout_documents  # noqa: E402

from slm_export.errors import InputError  # noqa: E402
from slm_export.learning.distil_decoder import decoder_loss  # noqa: E402
from slm_export.learning.distil_settings import Grid  # noqa: E402
from slm_export.learning.evaluation import documents_of, log_perplexities  # noqa: E402
from slm_export.learning.grid import OnGrid, put_on_grid, stored_as  # noqa: E402
from slm_export.learning.held_out import overlap  # noqa: E402
from slm_export.learning.measures import Interval, mean  # noqa: E402
from slm_export.learning.models import Model, load, save  # noqa: E402
from slm_export.learning.places import place  # noqa: E402
from slm_export.learning.settings import Training  # noqa: E402
from slm_export.learning.shapes import parse_shape, shrink  # noqa: E402
from slm_export.learning.teachers import LiveTeacher  # noqa: E402
from slm_export.learning.texts import Document, read_texts  # noqa: E402
from slm_export.learning.trainer import Curve, train  # noqa: E402
from slm_export.learning.windows import windows  # noqa: E402
from slm_export.optimizers.group_quantize import quantize  # noqa: E402
from slm_export.progress import Progress  # noqa: E402
from slm_export.source.load import load_checkpoint  # noqa: E402

SHAPE = "layers=0.5,neurons=0.667"
LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "pycode-5m")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--more-steps", type=int, default=240, help="in floats, and on the grid")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--characters", type=int, default=3_000_000, help="of training text")
    parser.add_argument("--held-out-characters", type=int, default=250_000)
    parser.add_argument("--plots", type=Path, help="folder [default: OUT]")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(given)
    bench.run()


class Bench:
    """The text, the teacher, and what has been measured so far; written after every figure."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.progress, self.began = given, Progress(), time.monotonic()
        self.teacher = load(given.model)
        held_out = heldout(given.model, given.held_out_characters)
        training = library(given.characters)
        self.training_documents = training
        clashing = {where for where, _ in overlap(training, held_out)}
        self.held_out_documents = [d for d in held_out if d.where not in clashing]
        self.training = windows(training, self.teacher.tokenizer, LENGTH)
        self.held_out = windows(self.held_out_documents, self.teacher.tokenizer, LENGTH)
        self.loss = decoder_loss(LiveTeacher(self.teacher.module), temperature=1.0, hard=0.1)
        self.alone = decoder_loss(LiveTeacher(self.teacher.module), temperature=1.0, hard=1.0)
        self.found = self.earlier() or {
            "model": given.model.name,
            "shape": SHAPE,
            "training": {"documents": len(training), "windows": len(self.training)},
            "held_out": {
                "documents": len(self.held_out_documents),
                "left_out_for_overlap": len(clashing),
                "windows": len(self.held_out),
            },
            "options": options_of(given),
            "rows": [],
            "curves": {},
        }

    def earlier(self) -> dict[str, Any] | None:
        """Return what an interrupted run of the same options has found."""
        path = self.given.out / "decoders.json"
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = found["shape"] == SHAPE and found["options"] == options_of(self.given)
        return found if same else None

    def has(self, name: str) -> bool:
        """Whether a model was measured by an interrupted run."""
        return any(row["name"] == name for row in self.found["rows"])

    def run(self) -> None:
        """Measure one after the other."""
        given, teacher = self.given, self.teacher
        cut = given.out / "cut"
        if not cut.is_dir():
            shrink(teacher, parse_shape(SHAPE), self.training, cut, self.progress)
        if not self.has("teacher"):
            self.say("teacher", teacher)
            self.say("cut, before learning", load(cut))
        first = self.training_of(given.steps, 1e-3)
        if not self.has("without a teacher"):
            self.say("without a teacher", self.learn("alone", load(cut), self.alone, first))
        if not self.has("from random weights"):
            fresh = random_weights(load(cut))
            self.say("from random weights", self.learn("random", fresh, self.alone, first))
        if not self.has("taught by its teacher"):
            taught = self.learn("taught", load(cut), self.loss, first)
            save(taught, given.out / "taught", torch.float32)
            self.say("taught by its teacher", taught)
        self.quantized(given.out / "taught")
        self.plot()

    def quantized(self, taught: Path) -> None:
        """Teach the child for longer, in floats and on the grid, and compare what is stored of both."""
        more = self.training_of(self.given.more_steps, 5e-4)
        checkpoint, grid = load_checkpoint(taught), Grid(bits=4)
        stored = stored_as(checkpoint, grid)
        floats = self.learn("on in floats", load(taught), self.loss, more)
        plain = self.say("taught on, in floats", floats)
        self.against("rounded to nearest (min-max)", rounded(floats, stored, search=False), plain)
        self.against("rounded with scale search", rounded(floats, stored, search=True), plain)
        student = load(taught)
        loss = OnGrid(self.loss, student.module, checkpoint, grid, more)
        on_grid = self.learn("on the grid", student, loss, more, watchers=[loss])
        put_on_grid(on_grid.module, stored)
        self.against("taught on, on the grid", on_grid, plain)

    def training_of(self, steps: int, rate: float) -> Training:
        """Return the loop of an arm."""
        return Training(
            steps=steps, batch=self.given.batch, together=8, length=LENGTH, rate=rate, measure_every=10**6
        )

    def learn(self, name: str, student: Model, loss: Any, training: Training, watchers: Any = ()) -> Model:
        """Train, and keep the curve."""
        key = {
            "what": f"benchmark: {name}",
            "options": self.found["options"],
            "training": training.recorded(),
        }
        with place(key) as work:
            curve = train(
                student.module,
                self.training,
                loss,
                training,
                work,
                self.progress,
                pad_id=student.tokenizer.pad_id,
                watchers=watchers,
                name=name,
            )
            work.done()
        self.found["curves"][name] = points(curve)
        return student

    def say(self, name: str, model: Model) -> tuple[list[float], list[float]]:
        """Measure perplexity, print and keep it; return what it was made of."""
        sums, counts = log_perplexities(model.module, self.held_out, model.tokenizer.pad_id)
        figure = self.mean(sums.tolist(), counts.tolist()).through(math.exp)
        self.keep({"name": name, "parameters": model.parameters, "perplexity": as_list(figure)})
        print(f"{name}: {model.parameters:,} parameters, perplexity {figure}", flush=True)
        return sums.tolist(), counts.tolist()

    def against(self, name: str, model: Model, plain: tuple[list[float], list[float]]) -> None:
        """Measure a stored model, and what it loses to the one in floats, window by window."""
        sums, counts = log_perplexities(model.module, self.held_out, model.tokenizer.pad_id)
        figure = self.mean(sums.tolist(), counts.tolist()).through(math.exp)
        lost = self.mean([a - b for a, b in zip(sums.tolist(), plain[0], strict=True)], counts.tolist())
        self.keep(
            {
                "name": name,
                "parameters": model.parameters,
                "perplexity": as_list(figure),
                "lost": as_list(lost),
            }
        )
        print(f"{name}: perplexity {figure}, ln ratio to floats {lost}", flush=True)

    def mean(self, sums: list[float], counts: list[float]) -> Interval:
        """Return the mean per token."""
        return mean(sums, counts, documents_of(self.held_out))

    def keep(self, row: dict[str, Any]) -> None:
        """Add a row, and write all there is."""
        self.found["rows"].append(row)
        self.found["seconds"] = time.monotonic() - self.began
        (self.given.out / "decoders.json").write_text(json.dumps(self.found, indent=1), encoding="utf-8")

    def plot(self) -> None:
        """Draw perplexities and losses, with their intervals."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        rows = self.found["rows"]
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
        for axis, key, label in (
            (axes[0], "perplexity", "perplexity"),
            (axes[1], "lost", "ln ratio to floats"),
        ):
            shown = [row for row in rows if key in row and (key == "lost" or "lost" not in row)]
            values = [row[key] for row in shown]
            spread = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
            axis.barh(
                [row["name"] for row in shown],
                [v[0] for v in values],
                xerr=spread,
                capsize=3,
                color="#4477aa",
            )
            axis.invert_yaxis()
            axis.set_xlabel(f"{label}, held-out text")
        axes[0].set_xscale("log")
        figure.tight_layout()
        figure.savefig((self.given.plots or self.given.out) / "distil-decoders.svg")


def options_of(given: argparse.Namespace) -> dict[str, int]:
    """Return the options that decide the figures."""
    return {name: value for name, value in vars(given).items() if isinstance(value, int)}


def library(characters: int) -> list[Document]:
    """Return modules of the standard library, until there are so many characters."""
    made, room = [], characters
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [
        p for p in sorted(folder.rglob("*.py")) if "site-packages" not in p.parts and "test" not in p.parts
    ]
    # Not by name: a prefix of the list would be all of one kind.
    generator = torch.Generator().manual_seed(1)
    for index in torch.randperm(len(files), generator=generator).tolist():
        try:
            documents = read_texts([files[index]]).documents
        except InputError:  # empty, or in another encoding
            continue
        made += documents
        room -= sum(len(document.text) for document in documents)
        if room <= 0:
            break
    return made


def heldout(model: Path, characters: int) -> list[Document]:
    """Return files that the teacher was not trained on, evenly from its list."""
    texts = heldout_documents(model)
    made: list[Document] = []
    for index in torch.randperm(len(texts), generator=torch.Generator().manual_seed(2)).tolist():
        if characters <= 0:
            break
        made.append(Document(f"held-out file {index}", texts[index]))
        characters -= len(texts[index])
    return made


def random_weights(model: Model) -> Model:
    """Return the same shape with weights that transformers draws."""
    torch.manual_seed(0)
    fresh = type(model.module)(model.module.config).float()
    return replace(model, module=fresh.eval())


def rounded(model: Model, stored: Any, *, search: bool) -> Model:
    """Return a model with what an export stores of its weights."""
    made = replace(model, module=type(model.module)(model.module.config).float().eval())
    made.module.load_state_dict(model.module.state_dict())
    parameters = dict(made.module.named_parameters())
    with torch.no_grad():
        for name, how in stored.items():
            parameters[name].copy_(quantize(parameters[name].detach(), how.bits, how.group, search).float32())
    return made


def points(curve: Curve) -> list[tuple[int, float]]:
    """Return (step, loss)."""
    return [(point.step, point.loss) for point in curve.points if point.loss is not None]


def as_list(figure: Interval) -> list[float]:
    """Return value, low, high."""
    return [figure.value, figure.low, figure.high]


if __name__ == "__main__":
    main()
