"""The command line: `python -m common sweep job.toml`, `train`, `choose`, `status file`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from common.choosing.choose import Choice
from common.jobs import Job, run_choose, run_sweep, run_train, status

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
JobFile = Annotated[Path, typer.Argument(help="A job (TOML), as docs/scaling.md shows it.")]
Address = Annotated[
    str | None, typer.Option(help="Where workers run: 'local', 'auto' (a cluster here), host:port.")
]


@app.command("sweep")
def sweep_command(job: JobFile, engine: Address = None) -> None:
    """Run the sweep of a job, or what is missing of it; vectors that are not there are trained."""
    read = _said(Job.read, job)
    frame = _said(run_sweep, read, engine)
    typer.echo(f"{len(frame)} rows in {read.results}")


@app.command("train")
def train_command(job: JobFile, engine: Address = None) -> None:
    """Train the vectors of a job that are not there yet."""
    for name, path in _said(run_train, _said(Job.read, job), engine).items():
        typer.echo(f"{name}: {path}")


@app.command("choose")
def choose_command(job: JobFile) -> None:
    """Choose layer and multiplier for the vectors of a job, and write each with its card."""
    _said(run_choose, _said(Job.read, job), _say_choice)


@app.command("status")
def status_command(file: Annotated[Path, typer.Argument(help="The file of a sweep.")]) -> None:
    """Say how far a sweep has come."""
    for name, value in _said(status, file).items():
        typer.echo(f"{name}: {value}")


def _say_choice(name: str, choice: Choice, files: list[Path]) -> None:
    typer.echo(f"{name}: layer {choice.layer}, multiplier {choice.multiplier:.4g}")
    typer.echo(f"  {choice.card.verdict}\n  {choice.card.beside_prompting}")
    typer.echo(f"  {', '.join(map(str, files[:3]))}")


def _said(function: Callable, *arguments: Any) -> Any:
    """Call a function; what is wrong with a job is one sentence, without a traceback."""
    try:
        return function(*arguments)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if type(error).__module__.startswith("ray"):  # the worker's traceback is the message
            raise
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app(prog_name="python -m common")
