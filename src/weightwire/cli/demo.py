"""``weightwire demo``: a real model, three replicas of it on this machine, and what each of them took from whom."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from weightwire.cli.comparison import Check, from_them, same_manifests, same_tokens
from weightwire.cli.demo_stage import Model, Stage
from weightwire.cli.frame import JsonOption, VerboseOption, begin, is_verbose, out, progress_console, settings
from weightwire.cli.listing import human_bytes, printable
from weightwire.cli.outcome import Outcome
from weightwire.cli.phase_table import origin, phase_table
from weightwire.cli.replica import Answer, Logs, ReplicaProcess, sigterm_interrupts
from weightwire.errors import LoadError

TOKENS = 32
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "What is two plus two?",
    "Write one sentence about the sea.",
    "Who wrote Hamlet?",
    "What does a compiler do?",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
)


@dataclass
class _Story:
    """What happened so far, told as it happens to people, or all at the end as JSON."""

    console: Console | None
    outcomes: list[Outcome] = field(default_factory=list)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    def tell(self, what: RenderableType = "") -> None:
        """To people; text is taken as markup."""
        if self.console is not None:
            self.console.print(what, soft_wrap=isinstance(what, str))

    @property
    def names(self) -> dict[str, str]:
        """How peers call a rank -> its replica."""
        return {peer: outcome.name for outcome in self.outcomes for peer in outcome.peers}

    def loaded(self, outcome: Outcome) -> None:
        """One more replica."""
        self.outcomes.append(outcome)
        given = f"{human_bytes(outcome.nbytes)} from {origin(outcome, self.names)}"
        verified = ", every byte verified" if outcome.verified else ""
        self.tell(f"[bold]{outcome.name:<9}[/bold]{given}{verified}; ready after {outcome.ready_s:.1f} s")

    def check(self, check: Check) -> None:
        """One more thing that must be so."""
        self.checks.append(check)
        mark = "[green]ok[/green]       " if check.ok else "[bold red]WRONG[/bold red]    "
        self.tell(f"{mark}{escape(check.detail)}")


def demo(
    *,
    tp: Annotated[int, typer.Option("--tp", metavar="N", help="Ranks of each replica: 1 or 3.")] = 3,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Load a real model into one replica from the disk, into a second from the first, into a third from both.

    Builds SmolLM2-135M once (270 MB, kept in the user's cache), then starts a metadata server and the replicas on this
    machine; the second and the third have config and tokenizer, but no weight files. Exits with 1 unless the first two
    give the same 8 x 32 greedy tokens and hold the same manifests, and the third took all its bytes from these.
    """
    begin(verbose=verbose)
    if tp not in (1, 3):
        raise typer.BadParameter("SmolLM2-135M has 3 key-value heads: give 1 or 3", param_hint="--tp")
    story = _Story(None if as_json else out())
    with contextlib.ExitStack() as stack:
        stack.enter_context(sigterm_interrupts())
        logs = None if is_verbose() else stack.enter_context(Logs("weightwire-demo-logs-"))
        stage = stack.enter_context(Stage(settings(), tp, logs, progress_console()))
        model = _play(stage, tp, story)
        if as_json:
            typer.echo(json.dumps(document(model, story)))
        wrong = [check.detail for check in story.checks if not check.ok]
        if wrong:
            raise LoadError("; ".join(wrong), "please report this")


def _play(stage: Stage, tp: int, story: _Story) -> Model:
    model = stage.build()
    ranks = f"{tp} ranks each" if tp > 1 else "one rank each"
    story.tell(
        f"[bold]model[/bold]    {escape(model.model_id)}, bf16 safetensors in\n         {escape(str(model.path))}"
    )
    story.tell(f"[bold]server[/bold]   metadata server at {stage.serve()}; replicas of {ranks}:")
    first, second = _load(stage, model, story, "first"), _load(stage, model, story, "second")
    story.tell()
    story.tell(phase_table(story.outcomes, story.names))
    _ask({"first": first, "second": second}, story)
    story.tell()
    given = {name: [answer.tokens for answer in answers] for name, answers in story.answers.items()}
    story.check(same_tokens(QUESTIONS, given["first"], given["second"]))
    story.check(same_manifests(*story.outcomes))
    story.tell()
    _load(stage, model, story, "third")
    for (peer, path), nbytes in story.outcomes[-1].taken(story.names).items():
        story.tell(f"         {human_bytes(nbytes):>8} from {peer} over {escape(printable(path))}")
    story.check(from_them(story.outcomes[-1].taken(story.names), ("first", "second")))
    return model


def _load(stage: Stage, model: Model, story: _Story, name: str) -> ReplicaProcess:
    replica, outcome = stage.start(name, model, weights=name == "first")
    story.loaded(outcome)
    for warning in outcome.notes:
        story.tell(f"         [yellow]{escape(printable(warning))}[/yellow]")
    return replica


def _ask(replicas: dict[str, ReplicaProcess], story: _Story) -> None:
    story.tell(f"\n[bold]>[/bold] {QUESTIONS[0]}")
    for name, replica in replicas.items():
        with progress_console().status(f"{name} answers {len(QUESTIONS)} questions"):
            story.answers[name] = replica.ask(QUESTIONS, TOKENS, whole=True)
        story.tell(f"[bold]{name:<9}[/bold]{escape(printable(story.answers[name][0].text))}")


def document(model: Model, story: _Story) -> dict[str, Any]:
    """All of it as JSON."""
    third = story.outcomes[-1].taken(story.names)
    return {
        "ok": all(check.ok for check in story.checks),
        "model": {"id": model.model_id, "path": str(model.path)},
        "replicas": [outcome.to_json() for outcome in story.outcomes],
        "question": QUESTIONS[0],
        "answers": {name: answers[0].text for name, answers in story.answers.items()},
        "tokens": {name: [list(answer.tokens) for answer in answers] for name, answers in story.answers.items()},
        "third_took": [{"from": peer, "path": path, "nbytes": nbytes} for (peer, path), nbytes in third.items()],
        "checks": [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in story.checks],
    }
