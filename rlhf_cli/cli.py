"""The commands: parse, load the recipe, call its stage.

What loads a recipe is imported when there is one to load, and heavy libraries by the stage alone: help is to be quick.
"""

from __future__ import annotations

import gc
import importlib
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from rlhf_cli import __version__
from rlhf_cli.console import leave, of_rank, silence
from rlhf_cli.errors import RunError, Stopped, UsageError
from rlhf_cli.recipe.keys import kind_of
from rlhf_cli.recipe.stages import STAGES, TRAINING_STAGES, Stage
from rlhf_cli.signals import end_with_launcher, stopping
from rlhf_cli.suggest import did_you_mean

if TYPE_CHECKING:
    from rlhf_cli.recipe.load import Loaded

Action = Callable[[], None]
"""What a parsed command line asks for."""

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, suggest_commands=False)

Debug = Annotated[bool, typer.Option("--debug", help="Full tracebacks.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rlhf {__version__}")
        raise typer.Exit


@app.callback(help="Train language models from human feedback. `rlhf COMMAND --help` lists the keys of a command's recipe.")
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


Recipe = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.")]
Values = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="The same as --set KEY=VALUE.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key by its dotted path; repeatable.")
]
Output = Annotated[str | None, typer.Option("--output", metavar="DIR", help="Override the recipe's output.")]
Check = Annotated[bool, typer.Option("--check", help="Validate and tokenise, print the plan, load no weights.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from what an earlier start has saved, if anything.")]
Force = Annotated[bool, typer.Option("--force", help="Move an existing output folder to DIR.old-N first.")]
PlannedDevices = Annotated[
    str | None, typer.Option("--devices", metavar="COUNTxMEMORY", help="With --check: the memory on these, as 8x80GB.")
]
Terminal = Annotated[bool, typer.Option("--terminal", help="Ask in this terminal, not on a page.")]
Port = Annotated[int, typer.Option("--port", metavar="P", min=0, max=65535, help="Of the page on 127.0.0.1; 0: a free one.")]
DumpPairs = Annotated[
    str | None, typer.Option("--dump-pairs", metavar="FILE.jsonl", help="Write the ranked responses as preference data.")
]

OWN_OPTIONS = {"dump_pairs": ("eval",), "devices": tuple(TRAINING_STAGES), "terminal": ("label",), "port": ("label",)}
"""Options that only some stages have."""


class StageCommand(TyperCommand):
    """A command whose help ends with the keys of its recipe, and whose options are those that its recipe has a key for."""

    def __init__(self, name: str, *, params: list[Any], **rest: Any) -> None:
        super().__init__(name, params=[own for own in params if name in OWN_OPTIONS.get(own.name, (name,))], **rest)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from rlhf_cli.recipe.help import key_table

        self.epilog = "\b\n" + key_table(self.name or "")
        super().format_epilog(ctx, formatter)


def _later(body: Callable[..., None]) -> Callable[..., Action]:
    """A command that says what it would do. It is done outside typer, which would swallow Ctrl-C and broken pipes."""

    @wraps(body)
    def command(**given: Any) -> Action:
        return partial(body, **given)

    return command


def _stage_command(name: str, stage: Stage) -> None:
    @app.command(name, cls=StageCommand, help=stage.help)
    @_later
    def command(
        recipe: Recipe,
        values: Values = None,
        overrides: Overrides = None,
        output: Output = None,
        dump_pairs: DumpPairs = None,
        devices: PlannedDevices = None,
        terminal: Terminal = False,
        port: Port = 0,
        check: Check = False,
        resume: Resume = False,
        force: Force = False,
        debug: Debug = False,
    ) -> None:
        """An argument for each option: typer reads them from the signature."""
        from rlhf_cli.recipe.dump import one_line
        from rlhf_cli.recipe.load import Devices, load_recipe

        for value in values or ():
            if "=" not in value:
                what = "after the recipe stand values, KEY=VALUE. a command reads one recipe, whose key base may name another"
                raise UsageError(f"{value}: {what}")
        if resume and force:
            raise UsageError("--resume continues a run and --force starts a new one. give one of the two")
        if devices and not check:
            raise UsageError("--devices plans for machines that are not here, and nothing is trained on them. give --check too")
        planned = Devices.read(devices) if devices else None
        told = [*(overrides or []), *(values or []), *([] if dump_pairs is None else [f"dump_pairs={one_line(dump_pairs)}"])]
        loaded = replace(load_recipe(name, recipe, told, output), devices=planned)
        own = {"terminal": terminal, "port": port} if name == "label" else {}
        _start(loaded, check=check, resume=resume, force=force, **own)


def _start(loaded: Loaded, *, check: bool, resume: bool, force: bool, **own: Any) -> None:
    """Import the stage and run it. own: options that it alone has."""
    from rlhf_cli.hub import why_silent
    from rlhf_cli.recipe.dump import one_line
    from rlhf_cli.runs.folder import refuse_occupied

    os.environ.update({name: one_line(value) for name, value in loaded.recipe.env.items()})
    if not check and not force and os.environ.get("RANK", "0") == "0":
        refuse_occupied(Path(loaded.recipe.output), resume)  # again when the run is opened; here it costs no imports
    if not all(Path(path).exists() for path in loaded.recipe.paths):
        why_silent()  # before anything imports huggingface_hub, which reads the environment once
    for number in stopping():
        signal.signal(number, leave)  # nothing is held yet, and an exception amid imports may be swallowed: end at once
    module = STAGES[loaded.stage].module
    if module not in sys.modules:
        gc.disable()  # it would search the libraries' million objects again and again, and free none
        try:
            importlib.import_module(module)
        finally:
            gc.freeze()
            gc.enable()
    sys.modules[module].run(loaded, check=check, resume=resume, force=force, **own)


for _name, _stage in STAGES.items():
    _stage_command(_name, _stage)


@app.command("import")
@_later
def _import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The YAML file of TRL, LLaMA-Factory or axolotl.")],
    stage: Annotated[str | None, typer.Option("--stage", metavar="STAGE", help="Where the file does not tell.")] = None,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="Devices that it was written for.")] = 1,
    output: Annotated[Path | None, typer.Option("-o", metavar="RECIPE.yaml", help="Write it here; must not exist.")] = None,
    debug: Debug = False,
) -> None:
    """A recipe from another trainer's configuration; what differs stands in comments above it."""
    from rlhf_cli.files import write_atomic
    from rlhf_cli.importing.configuration import import_file

    if output is not None and output.exists():
        raise UsageError(f"-o {output}: exists. give another name, or move it away")
    found, text = import_file(file, stage, gpus)
    if output is None:
        typer.echo(text, nl=False)
        return
    write_atomic(output, text)
    typer.echo(f"{output}: what differs stands at its top. next: rlhf {found} {output} --check")


@app.command("export")
@_later
def _export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The folder to write; must not exist.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into a full model.")] = False,
    push: Annotated[str | None, typer.Option("--push", metavar="REPO", help="Upload it to this repository of the hub.")] = None,
    debug: Debug = False,
) -> None:
    """Write a run as a plain transformers or PEFT folder."""
    from rlhf_cli.hub import check_upload, upload

    repo = None if push is None else check_upload(push)
    from rlhf_cli.runs.export import export

    typer.echo(export(run, dest, merge, repo))
    if repo is not None:
        typer.echo(upload(dest, repo))


@app.command("chat")
@_later
def _chat(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Runs, checkpoints, adapters or models.")],
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system turn before the dialogue.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1.0, help="Of the most likely tokens that together reach it.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 512,
    save: Annotated[Path, typer.Option(metavar="FILE", help="Where /save adds rows.")] = Path("chat.jsonl"),
    debug: Debug = False,
) -> None:
    """Talk to a model, or to several side by side."""
    from rlhf_cli.stages.chat import Settings, chat

    chat(models, Settings(system, temperature, top_p, max_new_tokens, save))


@app.command("runs")
@_later
def _runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that they are below.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="As a list of JSON objects.")] = False,
    tree: Annotated[bool, typer.Option("--tree", help="Draw each run below the one that it started from.")] = False,
    debug: Debug = False,
) -> None:
    """List the runs below a folder: what they are, how they ended, where they come from."""
    from rlhf_cli.stages.runs import list_runs

    list_runs(folder, as_json=as_json, tree=tree)


@app.command("init")
@_later
def _init(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="The command that is to read the recipe.")],
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE.yaml]", help="The file to write; else it is printed.")] = None,
    data: Annotated[list[str] | None, typer.Option("--data", metavar="FILE", help="The rows; repeatable.")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="PATH", help="The model to start from.")] = None,
    debug: Debug = False,
) -> None:
    """Write a commented recipe for rows of your own."""
    from rlhf_cli.stages.init import write_recipe

    if not data:
        raise UsageError("rlhf init: --data is missing. name the file of the rows")
    typer.echo(write_recipe(stage, data, model, recipe), nl=recipe is not None)


@app.command("data")
@_later
def _data(
    source: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Files, folders, or data sets of the hub.")],
    format: Annotated[str, typer.Option("--format", metavar="FORMAT", help="The rows' format.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Say what is in rows, and which commands can use them."""
    from rlhf_cli.data.formats import FORMATS
    from rlhf_cli.sections import Source
    from rlhf_cli.stages.rows import describe_rows

    if format not in ("auto", *FORMATS):
        raise UsageError(f"--format {format}: no such format. {did_you_mean(format, FORMATS, ', '.join(FORMATS))}")
    describe_rows([Source(path, format=format) for path in source], as_json=as_json)  # type: ignore[arg-type]


@app.command("schema")
@_later
def _schema(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A command that reads a recipe.")], debug: Debug = False
) -> None:
    """Print the JSON schema of a command's recipe, for editors."""
    import json

    from rlhf_cli.recipe.schema import recipe_schema

    if stage not in STAGES:
        advice = did_you_mean(stage, STAGES, f"they are {', '.join(STAGES)}")
        raise UsageError(f"rlhf schema {stage}: no command with a recipe. {advice}")
    typer.echo(json.dumps(recipe_schema(stage), indent=2, ensure_ascii=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (without the program's name) and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    end_with_launcher()
    if "OMP_WAIT_POLICY" not in os.environ:
        # Before torch is loaded: idle OpenMP threads would spin so long that a second busy process on the same cores slows small
        # steps more than twentyfold; 1,000 rounds keep a lone process within a sixth of its best speed, and two at a fair half.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Which peft imports wherever it is installed: it speaks of kernels that it lacks, and of every cast to half precision.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed stdin, stdout or stderr is opened on nothing, or the next file opened would receive stray prints
    os.close(descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal must not end a run
    try:
        code = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except (RunError, TyperException) as error:
        return _fail(error, debug)
    except KeyboardInterrupt:
        of_rank().note("stopped by Ctrl-C")
        return 130
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            silence(stream)  # what is still buffered, or the interpreter would report the closed pipe at its exit
        return 141
    except Exception as error:
        return _crash(error, debug)


def _run(arguments: list[str]) -> int:
    command = next((word for word in arguments if not word.startswith("-")), None)
    names = [str(known.name) for known in app.registered_commands]
    if command is not None and command not in names:
        hint = _command_of(command) or did_you_mean(command, names, f"commands: {', '.join(names)}")
        raise UsageError(f"rlhf {command}: no such command. {hint}")
    result = app(arguments or ["--help"], prog_name="rlhf", standalone_mode=False)
    if callable(result):
        result()
        return 0
    return int(result or 0) if arguments else 2


def _command_of(word: str) -> str | None:
    """The command that has what other tools, or we, call by this word."""
    named = {"merge": "rlhf export RUN DEST --merge merges an adapter", "reward": "rlhf train-rm", "rm": "rlhf train-rm"}
    kinds = {kind_of(kind): name for name, stage in TRAINING_STAGES.items() for kind in stage.objectives}
    owner = f"rlhf {kinds[word]} has it: objective.kind: {word}" if word in kinds else None
    return named.get(word) or owner


def _fail(error: RunError | TyperException, debug: bool) -> int:
    """What every rank finds alike, as a fault in a recipe, is told by rank 0."""
    console = of_rank(every=isinstance(error, RunError) and error.one_rank)
    if debug:
        console.note("".join(traceback.format_exception(error)))
    if isinstance(error, Stopped):
        console.note(str(error))
    elif isinstance(error, TyperException):
        console.error(f"{error.format_message().rstrip('.')}. see rlhf --help")
    else:
        console.error(str(error))
    return error.exit_code


def _crash(error: Exception, debug: bool) -> int:
    """An error nobody foresaw: one process's own, so every rank tells it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "rlhf_cli" in Path(frame.filename).parts]
    places = dict.fromkeys(f"{frame.filename}:{frame.lineno}" for frame in (*frames[-1:], *ours[-1:]))
    rank, console = os.environ.get("RANK", "0"), of_rank(every=True)
    what = (str(error).splitlines() or [""])[0][:300]
    if debug:
        console.note("".join(traceback.format_exception(error)))
    console.error(f"{f'rank {rank}: ' if rank != '0' else ''}{type(error).__name__}: {what}")
    console.error(f"at {', from '.join(places)}" + ("" if debug else ". --debug shows the full traceback"))
    return 1
