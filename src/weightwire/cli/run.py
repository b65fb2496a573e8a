"""``weightwire run``: one replica in the foreground: load, answer, serve its weights to others."""

from __future__ import annotations

import contextlib
import enum
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from weightwire.cli.bars import Bars
from weightwire.cli.frame import (
    JsonOption,
    SecretOption,
    UrlOption,
    VerboseOption,
    begin,
    is_verbose,
    out,
    progress_console,
    require_url,
    secret,
    settings,
)
from weightwire.cli.listing import printable
from weightwire.cli.outcome import Outcome
from weightwire.cli.phase_table import summary
from weightwire.cli.replica import Logs, ReplicaProcess, sigterm_interrupts
from weightwire.config import OnMiss, Settings
from weightwire.errors import ConfigError, MetadataUnreachable, WeightwireError
from weightwire.wire.metadata_client import MetadataStub

SERVER_S = 5.0
MAX_RANKS = 64
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class Format(enum.StrEnum):
    """The engine's load formats by name."""

    AUTO = "auto"
    DUMMY = "dummy"
    PRESHARDED = "presharded"


class Dtype(enum.StrEnum):
    """Of parameters and computation."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Layout(enum.StrEnum):
    """How kernels want their weights."""

    PLAIN = "plain"
    PACKED = "packed"


ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Checkpoint directory; config and tokenizer are enough where a peer has the weights.",
        show_default=False,
    ),
]
FormatOption = Annotated[
    Format,
    typer.Option(
        "--load-format",
        help="auto: from the disk. presharded: from a running replica, else from the disk. dummy: random numbers.",
    ),
]
ModelIdOption = Annotated[
    str,
    typer.Option(
        "--model-id",
        metavar="ID",
        help="What source and target both call the model. Left out: the name of the directory MODEL.",
        show_default=False,
    ),
]
AmplificationOption = Annotated[
    float,
    typer.Option(
        "--max-amplification",
        metavar="TIMES",
        min=0,
        help="From peers with another --tp read at most so many times the bytes needed; 0: take nothing from those.",
    ),
]
MetricsOption = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        metavar="PORT",
        min=0,
        max=65000,
        help="Serve Prometheus metrics: rank 0 at this port, each further rank at the next; 0 chooses free ones.",
        show_default=False,
    ),
]
MaxRateOption = Annotated[
    str | None,
    typer.Option(
        "--max-rate",
        metavar="RATE",
        help="Bandwidth cap: serve others at most so many bytes a second, each rank (200MB/s, 1.5GB, 10Gbit).",
        show_default=False,
    ),
]
MaxReadersOption = Annotated[
    str | None,
    typer.Option(
        "--max-readers",
        metavar="N",
        help="Serve at most so many processes at a time, each rank; others wait, or read elsewhere.",
        show_default=False,
    ),
]
TensorsOfOption = Annotated[
    str,
    typer.Option(
        "--tensors-of",
        metavar="ENGINE",
        help="Where no replica serves, take tensors by Hugging Face names from this program (docs/tensors.md).",
        show_default=False,
    ),
]
RelayOption = Annotated[
    bool, typer.Option("--relay/--no-relay", help="Pass on what is received from a peer while it is being received.")
]
TpOption = Annotated[int, typer.Option("--tp", metavar="N", min=1, max=MAX_RANKS, help="Tensor-parallel ranks.")]
PpOption = Annotated[
    int,
    typer.Option(
        "--pp", metavar="N", min=1, max=MAX_RANKS, help="Pipeline stages, which share layers; each has --tp ranks."
    ),
]
EpOption = Annotated[
    int,
    typer.Option(
        "--ep", metavar="N", min=1, max=MAX_RANKS, help="In so many groups the --tp ranks share a model's experts."
    ),
]
AttentionDpOption = Annotated[
    bool,
    typer.Option(
        "--attention-dp",
        help="The --tp ranks share the rows of a batch and a model's experts; of the rest each has the whole.",
    ),
]
MtpOption = Annotated[
    bool, typer.Option("--mtp", help="With the model's layers for multi-token prediction (DeepSeek-V3).")
]
DraftOption = Annotated[
    Path | None,
    typer.Option(
        "--draft-model",
        metavar="DIR",
        help="Load this model besides, as the draft of MODEL; from a peer only if MODEL is.",
        show_default=False,
    ),
]
RevisionOption = Annotated[
    str,
    typer.Option(
        "--revision", metavar="LABEL", help="Which weights, in your words; a peer must agree.", show_default=False
    ),
]
PromptOption = Annotated[
    str, typer.Option("--prompt", metavar="TEXT", help="Answer this once it is loaded.", show_default=False)
]
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", metavar="N", min=1, max=8192, help="Length of the answer at most.")
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of parameters and computation.")]
LayoutOption = Annotated[Layout, typer.Option("--kernel-layout", help="How kernels want weights.")]
WeightsIdOption = Annotated[
    str,
    typer.Option("--weights-id", metavar="ID", help="Take exactly these weights from peers.", show_default=False),
]
LatestOption = Annotated[
    bool, typer.Option("--latest", help="Where peers hold several weights, take those with the highest ordinal.")
]
UnpinnedOption = Annotated[
    bool, typer.Option("--accept-unpinned", help="Without --revision: take what a peer has, whatever it is.")
]
OnMissOption = Annotated[
    OnMiss | None,
    typer.Option("--on-miss", help="Where no peer serves: read the disk (default) or fail.", show_default=False),
]
OnceOption = Annotated[bool, typer.Option("--once", help="End after the answer instead of serving others.")]


def run(
    *,
    model: ModelArgument,
    tp: TpOption = 1,
    pp: PpOption = 1,
    ep: EpOption = 1,
    attention_dp: AttentionDpOption = False,
    mtp: MtpOption = False,
    draft_model: DraftOption = None,
    load_format: FormatOption = Format.AUTO,
    url: UrlOption = None,
    model_id: ModelIdOption = "",
    revision: RevisionOption = "",
    prompt: PromptOption = "",
    max_tokens: MaxTokensOption = 64,
    dtype: DtypeOption = Dtype.BFLOAT16,
    kernel_layout: LayoutOption = Layout.PLAIN,
    weights_id: WeightsIdOption = "",
    latest: LatestOption = False,
    accept_unpinned: UnpinnedOption = False,
    on_miss: OnMissOption = None,
    once: OnceOption = False,
    max_rate: MaxRateOption = None,
    max_readers: MaxReadersOption = None,
    tensors_of: TensorsOfOption = "",
    max_amplification: AmplificationOption = 2.0,
    relay: RelayOption = True,
    metrics_port: MetricsOption = None,
    secret_file: SecretOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Start a replica of a model (docs/support-matrix.md), say where its weights came from, answer, and serve others.

    It serves until Ctrl-C or SIGTERM; with --once, or without a metadata server, it ends after the answer. The first
    replica reads the disk (auto); later ones take their weights from it (presharded) and serve them, too.
    """
    begin(verbose=verbose)
    found = settings(
        url=url,
        secret_file=secret_file,
        on_miss=on_miss,
        accept_unpinned=accept_unpinned or None,
        max_rate=max_rate,
        max_readers=max_readers,
    )
    _check_ranks(tp, pp, ep, attention_dp=attention_dp)
    _check_tensors_of(tensors_of, load_format, weights_id)
    _check(model, draft_model, load_format, prompt, found)
    options = {
        "model": str(model),
        "model_id": model_id or model.resolve().name,
        "revision": revision or None,
        "tp": tp,
        "pp": pp,
        "ep": ep,
        "attention_dp": attention_dp,
        "mtp": mtp,
        "draft_model": "" if draft_model is None else str(draft_model),
        "load_format": load_format.value,
        "dtype": dtype.value,
        "kernel_layout": kernel_layout.value,
        "weights_id": weights_id,
        "latest": latest,
        "tensors_of": tensors_of,
        "max_amplification": max_amplification,
        "metrics_port": metrics_port,
        "max_rate": found.max_rate,
        "max_readers": found.max_readers,
        "relay": relay,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(sigterm_interrupts())
        replica, outcome = _load(stack, options, found)
        answer = replica.ask([prompt], max_tokens)[0].text if prompt else None
        _tell(str(options["model_id"]), outcome, prompt, answer, as_json=as_json)
        if found.url is not None and not once:
            _serve(replica, outcome, found.url, as_json=as_json)


def _load(stack: contextlib.ExitStack, options: dict[str, Any], found: Settings) -> tuple[ReplicaProcess, Outcome]:
    log = None if is_verbose() else stack.enter_context(Logs("weightwire-run-")).file("ranks")
    with Bars(progress_console(), transient=True) as bars:
        replica = ReplicaProcess("the replica", options, environ=environment(found), log=log, bars=bars)
        stack.enter_context(replica)
        return replica, replica.ready(found)


def environment(found: Settings) -> dict[str, str]:
    """What the ranks are told that options may have changed, as variables."""
    told = {
        "WEIGHTWIRE_ON_MISS": found.on_miss.value,
        "WEIGHTWIRE_ACCEPT_UNPINNED": str(int(found.accept_unpinned)),
    }
    if found.url is not None:
        told["WEIGHTWIRE_URL"] = found.url
    if found.secret_file is not None:
        told["WEIGHTWIRE_SECRET_FILE"] = str(found.secret_file.absolute())
    if is_verbose():
        told["WEIGHTWIRE_LOG_LEVEL"] = "DEBUG"
    return told


def _check_ranks(tp: int, pp: int, ep: int, *, attention_dp: bool) -> None:
    if tp * pp > MAX_RANKS:
        raise ConfigError(f"--tp {tp} and --pp {pp} make {tp * pp} ranks", f"start at most {MAX_RANKS}")
    if tp % ep:
        raise ConfigError(f"--tp {tp} ranks cannot share experts in {ep} groups", "give an --ep that divides --tp")
    if attention_dp and tp == 1:
        raise ConfigError("--attention-dp needs ranks that share a batch", "give --tp 2 or more, or leave it out")


def _check_tensors_of(tensors_of: str, load_format: Format, weights_id: str) -> None:
    if tensors_of and load_format is not Format.PRESHARDED:
        raise ConfigError("--tensors-of is given, and nobody is asked for weights", "add --load-format presharded")
    if tensors_of and weights_id:
        raise ConfigError("--weights-id pins weights of replicas, not --tensors-of", "give one of them")


def _check(model: Path, draft_model: Path | None, load_format: Format, prompt: str, found: Settings) -> None:
    """Refuse at once what would only fail after the processes have started."""
    for directory in filter(None, (model, draft_model)):
        if not directory.is_dir():
            raise ConfigError(f"{directory} is not a directory", "give one with config.json and, if any, weights")
    if prompt and not (model / "tokenizer.json").exists():
        raise ConfigError(f"{model} has no tokenizer.json", "put the model's tokenizer there, or leave --prompt out")
    if load_format is Format.PRESHARDED:
        require_url(found)
    if found.url is None:
        return
    stub = MetadataStub(found.url, secret(found))
    try:
        stub.sources("", SERVER_S)
    except MetadataUnreachable:
        on_disk = any((model / name).exists() for name in WEIGHTS) and found.on_miss is OnMiss.DISK
        if load_format is not Format.PRESHARDED or not on_disk:
            raise  # else it is a step of the ladder, and the replica publishes itself once the server is back
    finally:
        stub.close()


def _tell(model_id: str, outcome: Outcome, prompt: str, answer: str | None, *, as_json: bool) -> None:
    if as_json:
        found = outcome.to_json() | {"model_id": model_id, "prompt": prompt or None, "answer": answer}
        typer.echo(json.dumps(found))
        return
    console = out()
    console.print(f"[bold]{escape(printable(model_id))}[/bold] is ready after {outcome.ready_s:.1f} s")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in summary(outcome):
        style = "[yellow]" if label in ("WARNING", "NOT published") else "[none]"
        grid.add_row(f"{style}{label}[/]", f"{style}{escape(printable(text))}[/]")
    console.print(grid)
    if answer is not None:
        console.print(f"\n[bold]>[/bold] {escape(printable(prompt))}\n{escape(_lines(answer))}\n", soft_wrap=True)


def _serve(replica: ReplicaProcess, outcome: Outcome, url: str, *, as_json: bool) -> None:
    if not outcome.published:
        reason = "; ".join(outcome.not_published) or "WEIGHTWIRE_ROLE says that this replica serves nobody"
        raise WeightwireError(f"nothing to serve: {reason}", "end after the answer with --once")
    if not as_json:
        out().print(f"serving its weights to others (metadata server {url}); Ctrl-C ends it")
    with contextlib.suppress(KeyboardInterrupt):
        replica.attend()
    if not as_json:
        out().print("withdrawing")


def _lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.splitlines())
