"""The command line: ``llmppl demo``, ``llmppl write``, ``llmppl infill``, ``llmppl report``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Language models as Pyro distributions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CORES = os.cpu_count() or 1

Samples = Annotated[int, typer.Option(min=2, help="Importance samples for each story.")]
Seed = Annotated[int, typer.Option(help="Seed of every random number.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch; the number of idle cores.")]


@app.command()
def demo(
    program: Annotated[
        str, typer.Option(help="keyword: a sentence with a word in it; infilling: a missing sentence.")
    ] = ("keyword"),
    pairs: Annotated[int, typer.Option(min=1, help="Simulated sentences to train on, of the keyword program.")] = 256,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps: 240 quick ones of keyword, 16 of 15 s of infilling.")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Importance samples of each proposal.")] = 24,
    held_out: Annotated[int, typer.Option(min=1, max=12, help="Held-out observations to report on.")] = 6,
    seed: Seed = 0,
    save: Annotated[Path | None, typer.Option(help="Write the trained guide to this file.")] = None,
    threads: Threads = CORES,
) -> None:
    """Train a guide on a real language model, and report how far it is from the posterior."""
    try:
        if program == "keyword":
            from llmppl.demo.keyword import run as run_keyword

            run_keyword(pairs, steps or 240, samples, held_out, seed, save, threads)
        elif program == "infilling":
            from llmppl.demo.infilling import run as run_infilling

            run_infilling(steps or 16, samples, held_out, seed, save, threads)
        else:
            raise typer.BadParameter(f"{program!r} is neither keyword nor infilling.", param_hint="--program")
    except ModuleNotFoundError as error:
        typer.echo(f"llmppl demo: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def write(
    beginning: Annotated[str, typer.Argument(help="The text so far.")],
    keyword: Annotated[str, typer.Option(help="The word that the next sentence shall have.")],
    guide: Annotated[
        Path | None, typer.Option(help="A guide saved by `llmppl demo --save`; the shipped one by default.")
    ] = None,
    samples: Samples = 32,
    seed: Seed = 0,
    threads: Threads = CORES,
) -> None:
    """Go on with BEGINNING in a sentence that has a word in it, by a saved guide."""
    if not beginning.strip():
        raise typer.BadParameter("it is empty; give some text.", param_hint="BEGINNING")

    from llmppl.demo.keyword import shipped_guide
    from llmppl.demo.keyword import write as run

    try:
        posterior = run(beginning, keyword, guide or shipped_guide(), samples, seed, threads)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        typer.echo(f"llmppl write: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(
        f"log Ẑ {posterior.log_evidence:.2f} ± {posterior.log_evidence_error:.2f} nats, ESS {posterior.ess:.1f} of "
        f"{samples}, {posterior.impossible} draws without the word"
    )
    for text, weight in posterior.top("sentence", 6):
        if weight > 0:
            typer.echo(f"  {weight:6.1%}  {text.strip()!r}")


@app.command()
def infill(
    beginning: Annotated[str, typer.Argument(help="The story so far, ending with a full stop.")],
    ending: Annotated[str, typer.Argument(help="Its last sentence.")],
    guide: Annotated[
        Path | None,
        typer.Option(help="An adapter saved by `llmppl demo --program infilling --save`; the shipped one by default."),
    ] = None,
    samples: Samples = 32,
    seed: Seed = 0,
    threads: Threads = CORES,
) -> None:
    """Infill the sentence between BEGINNING and ENDING with a saved guide."""
    for name, text in (("BEGINNING", beginning), ("ENDING", ending)):
        if not text.strip():
            raise typer.BadParameter("it is empty; give some text.", param_hint=name)

    from llmppl.demo.infilling import infill as run
    from llmppl.demo.infilling import shipped_adapter
    from llmppl.posterior.inference_gap import inference_gap

    try:
        proposals = run(beginning, ending, guide or shipped_adapter(), samples, seed, threads)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        typer.echo(f"llmppl infill: {error}", err=True)
        raise typer.Exit(2) from None
    posteriors = [p.posterior for p in proposals]
    for proposal in proposals:
        posterior = proposal.posterior.row(0)
        gap = inference_gap(proposal.posterior, *posteriors)
        typer.echo(f"\n{proposal.name}, {samples} samples, {proposal.cpu_seconds:.1f} CPU s:")
        typer.echo(
            f"  ELBO {posterior.elbo:.2f} ± {posterior.elbo_error:.2f}, log Ẑ {posterior.log_evidence:.2f} ± "
            f"{posterior.log_evidence_error:.2f} nats, ESS {posterior.ess:.1f}, k̂ {posterior.khat:.2f}, "
            f"gap at least {gap.gap[0]:.2f} nats"
        )
        for text, weight in posterior.top("middle", 6):
            typer.echo(f"  {weight:6.1%}  {text.strip()!r}")


@app.command()
def report(
    adapter: Annotated[
        Path | None,
        typer.Argument(help="A guide saved by `llmppl demo --save`; the shipped one by default."),
    ] = None,
    program: Annotated[str, typer.Option(help="That of the guide: keyword or infilling.")] = "keyword",
    data: Annotated[
        Path | None,
        typer.Option(
            help='Stories, one JSON object a line with "beginning" and "keyword", or "ending" for infilling; held-out '
            "ones by default."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    samples: Samples = 24,
    simulations: Annotated[int, typer.Option(min=2, help="Simulated stories, for bounds and calibration.")] = 8,
    seed: Seed = 0,
    threads: Threads = CORES,
) -> None:
    """Write one HTML page that says how far a saved guide is from the posterior."""
    if program not in ("keyword", "infilling"):
        raise typer.BadParameter(f"{program!r} is neither keyword nor infilling.", param_hint="--program")

    from llmppl.demo.infilling import shipped_adapter
    from llmppl.demo.keyword import shipped_guide
    from llmppl.demo.report import report as run

    shipped = shipped_guide() if program == "keyword" else shipped_adapter()
    try:
        diagnosis = run(program, adapter or shipped, data, out, samples, simulations, seed, threads)
    except (OSError, ModuleNotFoundError, ValueError) as error:
        typer.echo(f"llmppl report: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(diagnosis.verdict)
    typer.echo(f"written to {out}")


if __name__ == "__main__":
    app()
