"""`edgevl measure`: what a checkpoint lost against its original, on text and on pictures. Needs torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevl.console import Progress, note, print_json, progress, table
from edgevl.errors import MissingExtraError, UsageError
from edgevl.files import atomic_file
from edgevl.journal import encode

if TYPE_CHECKING:
    from calibration.rendered import Question, Rendered, Score
    from edgevl.engine import Engine

    Pictures = list[tuple[Rendered, list[Question]]]

_LONGEST = 192  # tokens of an answer about a picture
_CONTEXT = 2048  # tokens; no question about a picture needs more


@click.command(name="measure", short_help="Compare a quantized checkpoint with its original.")
@click.argument("model")
@click.argument("checkpoint")
@click.option("--text", type=click.Path(path_type=Path), help="A UTF-8 text; default: a held-out text of edgevl's own.")
@click.option(
    "--images",
    type=click.IntRange(min=0),
    default=0,
    metavar="COUNT",
    help="Rendered pictures to ask about; 300 are usual.",
)
@click.option("--answers", type=click.Path(path_type=Path), help="With --images: JSON lines of all answers.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--report", is_flag=True, help="Put the figures into CHECKPOINT's report.json and report.html.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    model: str,
    checkpoint: str,
    text: Path | None,
    images: int,
    answers: Path | None,
    device: str,
    report: bool,
    as_json: bool,
) -> None:
    """Compare CHECKPOINT, a version of MODEL, with MODEL itself on text.

    With --images, both are also built for this machine and asked about pictures of the held-out test set, at least one
    of each kind. The demo is trained for these pictures; of another model they tell little.
    """
    try:
        from quantize.measure import calibrated_on, compare
        from quantize.report import add_measurement
        from quantize.report_page import check_plots
        from quantize.torch_ops import check_device
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise MissingExtraError("edgevl measure", "torch", "'edgevl[quantize]'") from error
        raise
    from calibration import held_out_text
    from edgevl.checkpoint import open_checkpoint

    check_device(device)
    if answers is not None and not images:
        raise UsageError("--answers writes what is said about pictures; add --images with their number")
    try:
        words = held_out_text() if text is None else text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{text} cannot be read as UTF-8 text ({problem})") from problem
    original, quantized = open_checkpoint(model), open_checkpoint(checkpoint)
    if images and original.config.vision is None:
        raise UsageError(f"{model} is a language model without eyes; --images needs one that sees")
    if answers is not None and not answers.absolute().parent.is_dir():
        raise UsageError(f"the folder of {answers} does not exist; make it first, so that no answer is lost")
    if report:
        check_plots()
        if not Path(checkpoint).is_dir():
            raise UsageError(f"--report writes into the folder of a checkpoint, and {checkpoint} is none")
    seen = calibrated_on(quantized, words)
    if seen > 0:
        note(f"{100 * seen:.1f} % of the text is what {checkpoint} was calibrated on; figures on it flatter")
    pictures = _pictures(images) if images else []
    with progress() as move:
        result = compare(original, quantized, words, device, move)
        context = min(_CONTEXT, original.config.text.max_positions)
        scores, said = _ask_both((model, checkpoint), pictures, context, move)
    if answers is not None:
        with atomic_file(answers) as file:
            file.writelines(encode(line) for line in said)
    found = result.to_json() | {"calibrated_on": seen, "images": {a.task: _task_json(a, b) for a, b in scores}}
    if report:
        name = "edgevl's held-out text" if text is None else text.name
        add_measurement(Path(checkpoint), found | {"text": name})
    if as_json:
        print_json(found)
        return
    click.echo(f"tokens      {result.tokens}")
    ratio = _error(result.ratio_error, result.perplexity_original)
    click.echo(f"perplexity  {result.perplexity_original:.3f} -> {result.perplexity_quantized:.3f}{ratio}")
    click.echo(f"KL          {result.kl:.4f}{_error(result.kl_error, 1, 4)} nats a token")
    click.echo(f"top-1       {100 * result.top1:.1f}{_error(result.top1_error, 100, 1)} % the same")
    if scores:
        rows = [[f"{a.task}, {a.metric}", str(a.count), _percent(a), _percent(b)] for a, b in scores]
        table("pictures (95 % interval)", ["task", "questions", model, checkpoint], rows)


def _error(value: float | None, factor: float, digits: int = 3) -> str:
    """A standard error behind its figure; nothing of a text that is too short for one."""
    return "" if value is None else f" ± {factor * value:.{digits}f}"


def _pictures(count: int) -> Pictures:
    from calibration.rendered import measured_pictures

    pictures = measured_pictures(count)
    note(f"{len(pictures)} pictures with {sum(len(q) for _, q in pictures)} questions, which both models are asked")
    return pictures


def _ask_both(
    models: tuple[str, str], pictures: Pictures, context: int, move: Progress
) -> tuple[list[tuple[Score, Score]], list[dict[str, str]]]:
    """Scores of both models, task by task, and what they said; f16 bundles of what is not quantized, greedy."""
    from calibration.rendered import score
    from deploy.build import BuildSettings, build
    from edgevl.engine import Engine

    found, lines = [], []
    if not pictures:
        return [], []
    for which, model in zip(("original", "quantized"), models, strict=True):
        with tempfile.TemporaryDirectory(prefix="edgevl-measure-") as folder:
            build(model, Path(folder) / "bundle", BuildSettings(context=context), move)
            engine = Engine.open(Path(folder) / "bundle")

            def asked(done: int, stage: str = f"{which} pictures") -> None:
                move(stage, done, len(pictures))

            given = ask(engine, pictures, asked)
            del engine
        found.append(score((q.task, q.answer, text) for q, text in given))
        lines += [
            {"model": model, "task": q.task, "question": q.question, "right": q.answer, "given": t} for q, t in given
        ]
    return list(zip(*found, strict=True)), lines


def ask(engine: Engine, pictures: Pictures, move: Callable[[int], None]) -> list[tuple[Question, str]]:
    from edgevl.engine import Request, Result
    from edgevl.image import load_image
    from edgevl.prompt import Message

    given = []
    for done, (rendered, questions) in enumerate(pictures):
        move(done)
        seen = tuple(load_image(frame) for frame in rendered.frames)
        for question in questions:
            request = Request((Message("user", (*seen, question.question)),), max_tokens=_LONGEST)
            last = list(engine.stream(request))[-1]
            assert isinstance(last, Result)
            given.append((question, last.text))
    move(len(pictures))
    return given


def _task_json(original: Score, quantized: Score) -> dict[str, Any]:
    return {
        "metric": original.metric,
        "original": original.value,
        "quantized": quantized.value,
        "count": original.count,
        "original_interval": [original.low, original.high],
        "quantized_interval": [quantized.low, quantized.high],
    }


def _percent(score: Score) -> str:
    return f"{100 * score.value:.1f} % ({100 * score.low:.1f}–{100 * score.high:.1f})"
