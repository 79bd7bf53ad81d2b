"""The command line: parse, call minipuzzle.verbs, print. No algorithm, and no torch until a verb
needs it."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import yaml
from click.core import ParameterSource
from safetensors import SafetensorError

from minipuzzle._version import __version__
from minipuzzle.core import environment, interrupt
from minipuzzle.core.budget import MOST_SERVED, human_bytes, parse_quantity
from minipuzzle.core.errors import CorruptArtifact, InputError, MinipuzzleError
from minipuzzle.core.files import CANDIDATES_BYTES, our_error, parse_yaml, read_json, reading

if TYPE_CHECKING:
    import pandas as pd

    from minipuzzle.core.budget import Workload
    from minipuzzle.recipes.schema import Recipe


LONGEST_LINE = 2000  # of an error: what it quotes may be any length


class _Path(click.Path):
    """A path, or with `names` also a name in its place: not empty, and not one that the system
    refuses to look at. The verbs say whether anything is there."""

    def __init__(self, names: bool = False) -> None:
        super().__init__(path_type=str if names else Path)
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail("it is empty; name a file or a folder.", param, ctx)
        try:
            os.stat(value)
        except FileNotFoundError:
            pass
        except NotADirectoryError as error:
            if not self.names:
                self.fail(f"{value}: {error.strerror}.", param, ctx)
        except OSError as error:
            self.fail(f"{str(value)[:100]}: {error.strerror}.", param, ctx)
        return super().convert(value, param, ctx)


class _Verb(click.Command):
    """An argument `section.key=value` is an override, as `--set section.key=value`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if any(param.name == "settings" for param in self.params):
            out: list[str] = []
            for arg in args:
                out += ["--set", arg] if _is_override(arg) and out[-1:] != ["--set"] else [arg]
            args = out
        return super().parse_args(ctx, args)


def _is_override(arg: str) -> bool:
    found = re.match(r"([a-z]+)\.\w+=", arg)
    if found is None:
        return False
    from minipuzzle.recipes.schema import Recipe

    return found[1] in Recipe.model_fields


class _Group(click.Group):
    """Errors that users can cause become one line on stderr and an exit code; bugs keep their
    traceback."""

    command_class = _Verb

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except SystemExit as error:
            if ranks := sys.modules.get("minipuzzle.models.ranks"):
                ranks.end_if_joined(error.code if isinstance(error.code, int) else int(error.code is not None))
            raise

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **kwargs: Any) -> click.Context:
        try:
            for arg in args:
                if "\0" in arg or not _is_utf8(arg):
                    raise click.UsageError(f"{ascii(arg)[:100]} is not UTF-8 text; rename what it names.")
            return super().make_context(info_name, args, *rest, **kwargs)
        except click.UsageError as error:
            _refuse(error)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            _refuse(error)
        except MinipuzzleError as error:
            _say_and_exit(error)
        except (OSError, MemoryError, RuntimeError, SafetensorError) as error:  # the machine's; the others are bugs
            ours = our_error(error, getattr(error, "filename", None) or "the computation")
            if isinstance(ours, CorruptArtifact):
                raise
            _say_and_exit(ours)
        except KeyboardInterrupt:
            click.echo("minipuzzle: interrupted", err=True)
            sys.exit(130)


def _is_utf8(text: str) -> bool:
    """Whether text from the system is; bytes that are not come as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _say_and_exit(error: MinipuzzleError | click.ClickException, text: str = "", more: str = "") -> NoReturn:
    text = " ".join((text or str(error)).split())
    click.echo(f"minipuzzle: {text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + '...'}{more}", err=True)
    sys.exit(error.exit_code)


def _refuse(error: click.UsageError) -> NoReturn:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        raise error
    command = error.ctx.command_path if error.ctx else "minipuzzle"
    _say_and_exit(error, error.format_message(), f" See '{command} --help'.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Make hybrid language models (Mamba-2 + attention + FFN) smaller.

    \b
    minipuzzle prune                                  halve the bundled model's memory
    minipuzzle prune FOLDER --budget memory=8GiB      fit your own model into 8 GiB
    """
    interrupt.install(keeps=False)
    environment.check()


def _pairs(values: tuple[str, ...], option: str) -> dict[str, str]:
    out: dict[str, str] = {}
    for value in values:
        key, equals, right = value.partition("=")
        if not equals or not key or not right:
            raise InputError(f"{option} {value!r}: write KEY=VALUE")
        if key.strip() in out and option == "--budget":  # of a setting the last counts
            raise InputError(f"{option} {key.strip()} is given twice, as {out[key.strip()]} and {right.strip()}")
        out[key.strip()] = right.strip()
    return out


def _settings(values: tuple[str, ...]) -> dict[str, Any]:
    out = {}
    for key, text in _pairs(values, "--set").items():
        try:
            out[key] = parse_yaml(text)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", error)
            raise InputError(f"--set {key}={text}: the value is not YAML ({problem})") from None
    return out


def _memory(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    return None if text is None else parse_quantity(text, "bytes")


def _count(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    return None if text is None else max(1, parse_quantity(text, "decimal"))


Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


def _options(*options: Decorator) -> Decorator:
    """Several decorators as one, in the order in which --help shows them."""
    return lambda command: functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


model_argument = click.argument("model", type=_Path(names=True))
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
device_option = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
redo_option = click.option("--redo", is_flag=True,
                           help="Make damaged stages again, and those that a changed recipe invalidates.")
memory_option = click.option("--memory", "memory_bytes", metavar="SIZE", callback=_memory,
                             help="Memory to use, for example 8GiB. A parent that does not fit is read from the "
                                  "disk layer by layer. Default: all of the device's.")


def recipe_options(*sections: str) -> Decorator:
    """--recipe, --set, and --budget and --data where the verb reads them; the command gets a
    `recipe`. `sections` are those that the verb reads, all if none is named: a file may have
    others, for other verbs, but a setting that would be ignored is refused."""
    options = [
        click.option("--recipe", "name", default="default", show_default=True, type=_Path(names=True),
                     metavar="NAME", help="A shipped recipe or a YAML file."),
        click.option("--set", "settings", multiple=True, metavar="A.B=C",
                     help="Override one key of the recipe. Repeatable; the last value wins.")]
    if not sections or "budget" in sections:
        options.append(click.option("--budget", "budgets", multiple=True, metavar="KEY=VALUE",
                                    help="memory=31.7GiB, params=4.5B, kv_cache=0.5x, ...; replaces the "
                                         "recipe's. Repeatable."))
    if not sections or "calibration" in sections:
        options.append(click.option("--data", help="stdlib, a text, JSONL or parquet file or folder, "
                                                   "hf:owner/name, tokens:DIR; or a=0.7,b=0.3."))

    def decorate(command: Command) -> Command:
        @_options(*options)
        @functools.wraps(command)
        def wrapped(name: str, settings: tuple[str, ...], budgets: tuple[str, ...] = (), data: str | None = None,
                    **rest: Any) -> Any:
            from minipuzzle.recipes.schema import Recipe

            recipe = Recipe.load(name, budget=_pairs(budgets, "--budget"), data=data, settings=_settings(settings))
            refuse_unread(settings, sections)
            return command(recipe=recipe, **rest)
        return wrapped
    return decorate


def _recipe_of_run(run: Path, recipe: Recipe) -> Recipe:
    """The recipe of a run with what else was asked for; `recipe` if one was named."""
    if _given("name"):
        return recipe
    from minipuzzle.verbs.search import run_recipe

    given = click.get_current_context().params
    return run_recipe(run, _pairs(given["budgets"], "--budget"), _settings(given["settings"])).with_overrides(
        data=given.get("data"))


def refuse_unread(settings: tuple[str, ...], sections: tuple[str, ...], why: str = "") -> None:
    """Raise InputError for a `--set` in a section that the verb does not read."""
    for key in _pairs(settings, "--set"):
        if sections and key.partition(".")[0] not in sections:
            raise InputError(f"--set {key}: '{click.get_current_context().command_path}' does not read "
                              f"{key.partition('.')[0]}{why}; it reads {', '.join(sections)}")


def run_options(command: Command) -> Command:
    """What verbs that make a run take. The command gets a `reporter` for -v and -q, and the
    `command` line."""
    @_options(click.option("-o", "--output-dir", type=_Path(), help="Default: derived from the model and the recipe."),
              click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1),
                           help="Seed of everything random."),
              device_option, redo_option, json_option,
              click.option("-v", "--verbose", is_flag=True, help="Also print what each stage reports while it runs."),
              click.option("-q", "--quiet", is_flag=True, help="Print errors only."))
    @functools.wraps(command)
    def wrapped(verbose: bool, quiet: bool, **rest: Any) -> Any:
        from minipuzzle.pipeline.progress import Reporter, Terminal

        if verbose and quiet:
            raise InputError("-v and -q exclude each other")
        interrupt.install(keeps=True)
        out = command(reporter=Reporter() if quiet else Terminal(verbose=verbose),
                      command=shlex.join(["minipuzzle", *sys.argv[1:]]), **rest)
        if interrupt.received():
            click.echo("minipuzzle: the signal came when all but the last files was done; they are finished", err=True)
        return out
    return wrapped


def _print(data: Any, as_json: bool, lines: list[str]) -> None:
    click.echo(json.dumps(data, indent=1, allow_nan=False) if as_json else "\n".join(lines))


def _warnings(report: dict[str, Any]) -> list[str]:
    return [f"{'WARNING' if text in report.get('alerts', ()) else 'warning'}     {text}" for text in report["warnings"]]


def _given(*names: str) -> list[str]:
    """Those of the current command's options that the user wrote."""
    ctx = click.get_current_context()
    return [n for n in names if ctx.get_parameter_source(n) not in (None, ParameterSource.DEFAULT)]


@main.command()
@click.argument("model", required=False, type=_Path(names=True))
@recipe_options()
@run_options
@memory_option
@click.option("--candidate", help="With a run as MODEL: also distil this candidate, of the run or of a search of "
                                  "it, into RUN/candidates/NAME/.")
@click.option("--scores", type=_Path(), metavar="DIR",
              help="Take the scores of another run, or of 'minipuzzle score -o DIR', in place of measuring them.")
@click.option("--teacher", type=_Path(names=True), metavar="MODEL",
              help="Distil from this model, not from MODEL: the original, where MODEL is a result.")
@click.option("--dry-run", is_flag=True,
              help="Print the plan and stop, with the exit code that the run would have. MODEL may be "
                   "a published name; no weights are read.")
@click.option("--gpu", metavar="NAME", help="With --dry-run: forecast for this card, not this machine.")
@click.option("--gpus", type=click.IntRange(1, 4096), help="How many of them. Default: 1.")
@click.option("--fresh", is_flag=True, help="Delete what the run directory holds and start again.")
def prune(model: str | None, recipe: Recipe, output_dir: Path | None, seed: int, as_json: bool,
          candidate: str | None, scores: str | Path | None, teacher: str | None, dry_run: bool,
          gpu: str | None, gpus: int | None, **options: Any) -> None:
    """Make a model smaller: score, search, measure, distill, export and report.

    MODEL is a Hugging Face folder or a Hub id. The default is the bundled model. A run as MODEL
    goes on; with another budget its model is pruned from its scores, into RUN/budgets/.

    \b
    minipuzzle prune
    minipuzzle prune my-model --budget memory=0.6x --data texts/ -o runs/mine
    minipuzzle prune runs/mine --budget memory=0.7x
    minipuzzle prune runs/mine --candidate c0012
    minipuzzle prune runs/mine/model --teacher my-model --budget memory=0.7x -o runs/smaller
    minipuzzle prune my-model --scores scored --data texts/ -o runs/other
    minipuzzle prune nemotron-h-8b --recipe nemotron-h-4b --dry-run --gpu h100 --gpus 8
    torchrun --nproc-per-node 8 -m minipuzzle prune my-model --device cuda
    """
    from minipuzzle.report.facts import headline
    from minipuzzle.report.report import Report
    from minipuzzle.verbs import prune as verb
    from minipuzzle.verbs.folder import goes_on, is_run, reopen, teacher_of_run

    if model is not None and is_run(model):
        teacher = teacher_of_run(model, teacher)
    if candidate is not None:  # the run has settled the rest
        given = _given("name", "budgets", "data", "settings", "seed", "output_dir", "scores")
        model, recipe, output_dir, seed = reopen(model, given)
    elif model is not None and is_run(model):
        own = _recipe_of_run(Path(model), recipe)
        model, recipe, output_dir, seed, scores = goes_on(model, own, output_dir, seed, scores)
    if dry_run:
        from minipuzzle.verbs.dry_run import dry_run as forecast

        del options["reporter"], options["command"]
        data, words, refused = forecast(model, recipe, output_dir, seed=seed, scores=scores, teacher=teacher, gpu=gpu,
                                        gpus=gpus, **options)
        _print(data, as_json, words)
        if refused:  # as the run would be
            raise refused
        return
    if gpu or gpus:
        raise InputError("--gpu and --gpus forecast a run elsewhere: add --dry-run")
    run = verb.prune(model, recipe, output_dir, seed=seed, candidate=candidate, scores=scores,
                     teacher=teacher, **options)
    if environment.rank() != 0:
        return
    parent, result, paired = (run.report[name] for name in ("parent", "result", "paired"))
    recovered = "" if result["recovery"] is None else f" ({result['recovery']:.0%} of the gap recovered)"
    _print(run.report, as_json, [
        headline(Report.read(run.report)),
        f"loss        {parent['loss']:.3f} parent, {result['loss_sliced']:.3f} sliced, "
        f"{result['loss_distilled']:.3f} {'distilled' if run.report['distillation']['tokens'] else 'not trained'}"
        f"{recovered}",
        f"            {paired['loss_minus_parent']:+.3f} against the parent"
        + ("" if paired["stderr"] is None else f", standard error {paired['stderr']:.3f} (paired)"),
        f"model       {run.model_path}",
        f"report      {run.report_path}",
        *(_quantised(run.report["quantization"]) if run.report.get("quantization") else ()),
        *_warnings(run.report),
    ])


def workload_options(command: Command) -> Command:
    """The precisions, --context and --batch; the command gets a `workload`."""
    @_options(click.option("--precision", default="bf16", show_default=True,
                           help="Of the weights: bf16, fp8, int4, nvfp4."),
              click.option("--kv-precision", default="bf16", show_default=True,
                           help="Of the KV cache: bf16, fp8, nvfp4."),
              click.option("--state-precision", default="fp32", show_default=True,
                           help="Of the Mamba state: fp32, bf16."),
              click.option("--context", default="1k", show_default=True, help="Tokens; k = 1024, M = 1024^2."),
              click.option("--batch", default=1, show_default=True, type=click.IntRange(1, MOST_SERVED),
                           help="Sequences at once."))
    @functools.wraps(command)
    def wrapped(precision: str, kv_precision: str, state_precision: str, context: str, batch: int,
                **rest: Any) -> Any:
        from minipuzzle.core.budget import Workload

        return command(workload=Workload(precision, kv_precision, state_precision, (),
                                         parse_quantity(context, "binary"), batch), **rest)
    return wrapped


@main.command()
@model_argument
@workload_options
@json_option
def inspect(model: str, workload: Workload, as_json: bool) -> None:
    """Show a model's architecture, parameters, memory and FLOPs, from its configuration alone.

    MODEL is a folder, a config.json or a published name such as nemotron-h-56b.

    \b
    minipuzzle inspect my-model
    minipuzzle inspect nemotron-h-56b --precision nvfp4 --kv-precision nvfp4 --context 1M
    """
    from minipuzzle.costs.cost import inspect as inspect_architecture
    from minipuzzle.families.architecture import Architecture
    from minipuzzle.verbs.source import config_of, result_of

    arch = Architecture.from_config(config_of(result_of(model)))
    data = inspect_architecture(arch, workload)
    if as_json:
        _print(data, True, [])
    else:
        from minipuzzle.verbs.inspect import print_inspection

        print_inspection(arch, workload, data)


@main.command()
@model_argument
@click.option("--gpu", required=True, metavar="NAME", help="A card that 'minipuzzle devices' lists.")
@workload_options
@click.option("--engine", default="vllm", show_default=True, type=click.Choice(["ideal", "vllm"]),
              help="Whose allocation to count; ideal loses nothing to pages.")
@click.option("--new-tokens", help="Also foretell throughput, with so many tokens of the context generated.")
@json_option
def fit(model: str, gpu: str, workload: Workload, engine: str, new_tokens: str | None, as_json: bool) -> None:
    """Say whether a model fits on a card, from its configuration alone. Exit code 0 either way.

    MODEL is a folder, a config.json or a published name.

    \b
    minipuzzle fit nemotron-h-47b --gpu rtx5090 --precision nvfp4 --kv-precision fp8 --context 1M
    minipuzzle fit runs/mine/model --gpu l4 --context 128k --batch 8
    minipuzzle fit nemotron-h-8b --gpu h100 --context 65k --new-tokens 1k --batch 32
    """
    from minipuzzle.core.devices import find_device
    from minipuzzle.engines import fit as engine_fit
    from minipuzzle.families.architecture import Architecture
    from minipuzzle.verbs.source import config_of, result_of

    device = find_device(gpu)
    arch = Architecture.from_config(config_of(result_of(model)))
    found = engine_fit.fit(arch, workload, device, engine)
    words = engine_fit.sentences(found, device)
    if new_tokens is not None:
        from minipuzzle.engines import speed

        told = speed.foretell(arch, workload, device, parse_quantity(new_tokens, "binary"))
        told["largest_batch"] = speed.largest_batch(arch, workload, device, engine)
        found["throughput"] = told
        words += speed.sentences(told, device)
    _print(found, as_json, words)


@main.command()
@json_option
def devices(as_json: bool) -> None:
    """List the graphics cards whose memory, bandwidth and speed are known.

    \b
    minipuzzle devices
    minipuzzle devices --json
    """
    from minipuzzle.core.devices import devices as known

    rows = [f"{'name':<11}{'card':<25}{'memory':<12}{'bandwidth':<12}dense TFLOP/s"]
    for card in known().values():
        speeds = ", ".join(f"{name} {value / 1e12:g}" for name, value in card.flops.items())
        rows.append(f"{card.name:<11}{card.label:<25}{human_bytes(card.memory_bytes):<12}"
                    f"{card.bandwidth / 1e9:<5,.0f} GB/s  {speeds}")
    _print([card.to_json() for card in known().values()], as_json, rows)


@main.command()
@model_argument
@recipe_options("calibration", "scores", "space", "evaluation", "surgery", "distillation")
@run_options
@memory_option
def score(model: str, recipe: Recipe, as_json: bool, **options: Any) -> None:
    """Score layers (by ablation) and widths (by activations) -> OUTPUT_DIR/scores/.

    \b
    minipuzzle score my-model --data texts/ -o scored
    torchrun --nproc-per-node 4 -m minipuzzle score my-model --memory 24GiB
    """
    from minipuzzle.stages.results import records
    from minipuzzle.verbs.score import score as score_model

    path, table = score_model(model, recipe, **options)
    if environment.rank() != 0:
        return
    _print({"path": str(path), "layers": records(table)}, as_json,
           [table.to_string(index=False), f"scores      {path}"])


@main.command()
@model_argument
@click.option("--data", required=True, help="stdlib, a text, JSONL or parquet file or folder, or hf:owner/name.")
@click.option("-o", "--output-dir", required=True, type=_Path(), help="Where the tokens go.")
@click.option("--tokens", metavar="COUNT", callback=_count,
              help="Stop after about so many to train on, for example 2.5B. Default: all there are.")
@click.option("--workers", type=click.IntRange(1, 1024), help="Processes. Default: one for each core.")
@json_option
def tokenize(model: str, data: str, output_dir: Path, tokens: int | None, workers: int | None, as_json: bool) -> None:
    """Tokenise texts once, for any number of runs: --data tokens:DIR.

    MODEL is a folder or a Hub id; only its tokenizer is read. The same command continues after a stop.

    \b
    minipuzzle tokenize my-model --data texts/ -o my-tokens
    minipuzzle prune my-model --data tokens:my-tokens
    """
    from minipuzzle.pipeline.progress import Terminal
    from minipuzzle.verbs.tokenize import tokenize_data

    interrupt.install(keeps=True)
    found = tokenize_data(model, data, output_dir, tokens, workers, Terminal())
    _print(found, as_json, [f"{split:11} {count:,} tokens" for split, count in found["tokens"].items()]
           + [f"documents   {found['documents']:,}", f"use         --data {found['data']}"])


@main.command()
@click.argument("run", required=False, type=_Path())
@click.option("--model", "config", type=_Path(), help="A folder, a config.json or a published name.")
@click.option("--scores", type=_Path(),
              help="A run, its scores folder, or a CSV of layer,kind,METRIC.")
@recipe_options("budget", "workload", "scores", "space", "search")
@click.option("-o", "--output-dir", type=_Path())
@json_option
def search(run: Path | None, config: Path | None, scores: Path | None, recipe: Recipe, output_dir: Path | None,
           as_json: bool) -> None:
    """Search for candidates from scores and a budget; reads no weights.

    With RUN, search that run again with its own recipe, into RUN/searches/. Several values of one
    budget make a sweep: a table with the best predicted candidate for each.

    \b
    minipuzzle search --model config.json --scores layers.csv --budget memory=31.7GiB -o found
    minipuzzle search runs/mine --budget memory=0.5x,0.6x,0.7x
    """
    from minipuzzle.verbs.search import research, table

    if run is not None:
        recipe = _recipe_of_run(run, recipe)
    path, data, frame = research(recipe, run, config, scores, output_dir)
    for warning in data["warnings"]:
        click.echo(f"minipuzzle: warning: {warning}", err=True)
    what = "budgets" if "budget" in frame else "candidates"
    lines = [table(frame, recipe.scores.layer_metric), f"{len(frame):,} {what} in {path}"]
    if run is not None and path.parent == run / "searches":
        lines += _how_to_prune(run, frame)
    _print(data, as_json, lines)


def _how_to_prune(run: Path, frame: pd.DataFrame) -> list[str]:
    """The commands that make models of what a search of a run found."""
    best, given = frame.dropna(subset=["name"]).iloc[0], click.get_current_context().params
    recipe = ["--recipe", given["name"]] if _given("name") else []
    budgets = [best["budget"]] if "budget" in frame else given["budgets"]
    same = [*recipe, *(word for b in budgets for word in ("--budget", b)),
            *(word for s in given["settings"] for word in ("--set", s))]
    prune = ["minipuzzle", "prune", str(run)]
    return [f"To measure the best and prune the winner:  {shlex.join([*prune, *same])}",
            f"To prune one of them:                      {shlex.join([*prune, '--candidate', best['name']])}"]


@main.command()
@model_argument
@click.option("--teacher", type=_Path(names=True), metavar="MODEL",
              help="Compare with this model: KL and agreement.")
@click.option("--latency", is_flag=True,
              help="Also measure tokens per second at the recipe's workload.context and batch.")
@click.option("--tasks", help="Also run these lm-eval tasks, comma-separated; needs the eval extra.")
@click.option("--limit", type=click.IntRange(1), help="Ask only this many questions of each task.")
@recipe_options("calibration", "evaluation", "workload")
@device_option
@json_option
def evaluate(model: str, teacher: str | None, latency: bool, tasks: str | None, limit: int | None, recipe: Recipe,
             device: str, as_json: bool) -> None:
    """Measure held-out loss, perplexity and accuracy; with --teacher also KL and agreement.

    \b
    minipuzzle evaluate runs/mine/model --teacher my-model --data texts/
    minipuzzle evaluate runs/mine/model --latency --set workload.context=4k
    minipuzzle evaluate runs/mine/model --tasks hellaswag,mmlu --limit 200
    """
    from minipuzzle.pipeline.progress import Terminal
    from minipuzzle.verbs.evaluate import evaluate as evaluate_folder
    from minipuzzle.verbs.source import result_of

    if limit is not None and tasks is None:
        raise InputError("--limit is for --tasks")
    if not latency:
        refuse_unread(click.get_current_context().params["settings"], ("calibration", "evaluation"),
                      " without --latency")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not names:
        raise InputError("--tasks names no task; write for example --tasks mmlu,gsm8k")
    data = evaluate_folder(result_of(model), teacher and result_of(teacher), recipe, device, latency, names, limit,
                           Terminal())
    paired = {f"{'' if k.startswith('loss') else 'paired_'}{k}": v for k, v in (data.get("paired") or {}).items()}
    tested = ((data.get("tasks") or {}).get("results") or {}).items()
    answered = {f"{name} {metric.removesuffix(',none')}": value for name, found in tested
                for metric, value in found.items() if isinstance(value, float)}
    found = {f"retrieval_{key}": value for key, value in data["retrieval"].items()
             if key in ("context", "copy_accuracy", "recall_accuracy", *(("kl",) if teacher else ()))}
    parts = (data, paired, found, data.get("latency") or {}, answered)
    _print(data, as_json, [f"{key:26} {value:.5g}" if isinstance(value, float) else f"{key:26} {value}"
                           for part in parts for key, value in part.items()
                           if value is not None and not isinstance(value, dict)])


@main.command()
@click.argument("student", type=_Path(names=True))
@click.option("--teacher", required=True, type=_Path(names=True), metavar="MODEL", help="The parent's folder.")
@recipe_options("calibration", "evaluation", "distillation")
@run_options
@click.option("--cache-teacher", type=_Path(), metavar="DIR",
              help="Write the teacher's distillation.top_k tokens to DIR once, and train from there without it.")
@click.option("--track", help="Also send the metrics to tensorboard or wandb.")
def distill(student: str, teacher: str, recipe: Recipe, output_dir: Path | None, as_json: bool,
            **options: Any) -> None:
    """Distil STUDENT from the teacher's logits -> OUTPUT_DIR/model/.

    \b
    minipuzzle distill small --teacher big --data texts/ --set distillation.tokens=10M -o distilled
    torchrun --nproc-per-node 8 -m minipuzzle distill small --teacher big --device cuda -o distilled
    """
    from minipuzzle.verbs.distill import distill as distill_folder

    if output_dir is None:
        raise InputError("distill needs an output folder: -o FOLDER")
    data = distill_folder(student, teacher, recipe, output_dir, **options)
    if environment.rank() == 0:
        than = "" if data["loss_teacher"] is None else f" (teacher {data['loss_teacher']:.3f})"
        compared = [] if data["kl"] is None else [f"KL          {data['kl_before']:.3f} -> {data['kl']:.3f}"]
        _print(data, as_json, [f"loss        {data['loss_before']:.3f} -> {data['loss']:.3f}{than}", *compared,
                               f"model       {data['path']}", *_warnings(data)])


@main.command()
@model_argument
@click.option("--precision", type=click.Choice(["fp8", "int4", "nvfp4"]),
              help="Of the matrices. Default: the recipe's quantization.precision.")
@click.option("--kv-precision", type=click.Choice(["bf16", "fp8"]), help="Of the KV cache.")
@click.option("--gguf", type=click.Choice(["q8_0", "q4_k_m"]), help="Also, or only, a file for llama.cpp.")
@click.option("--distill", metavar="TOKENS",
              help="First train the rounded weights against the model itself, on so many tokens.")
@recipe_options("quantization", "workload", "calibration", "evaluation", "distillation")
@run_options
def quantize(model: str, precision: str | None, kv_precision: str | None, gguf: str | None, distill: str | None,
             recipe: Recipe, output_dir: Path | None, as_json: bool, **options: Any) -> None:
    """Quantise MODEL, or the result of a run, by nvidia-modelopt -> OUTPUT_DIR/model/.

    The folder is the checkpoint that vLLM, SGLang and TensorRT-LLM load. Needs minipuzzle[quantize].

    \b
    minipuzzle quantize runs/mine --precision fp8 --kv-precision fp8 -o runs/mine-fp8
    minipuzzle quantize my-model --precision nvfp4 --distill 10M --data texts/ -o small
    """
    from minipuzzle.verbs.quantize import quantize as quantize_folder
    from minipuzzle.verbs.search import run_recipe

    if output_dir is None:
        raise InputError("quantize needs an output folder: -o FOLDER")
    given = click.get_current_context().params
    chosen = {"precision": precision, "kv_precision": kv_precision, "gguf": gguf, "distill": distill}
    settings = _settings(given["settings"]) | {
        f"quantization.{key}": value for key, value in chosen.items() if value is not None}
    if (Path(model) / "run.json").is_file() and not _given("name"):
        recipe = run_recipe(Path(model), {}, {})
    recipe = recipe.with_overrides(data=given["data"], settings=settings)
    data = quantize_folder(model, recipe, output_dir, **options)
    _print(data, as_json, _quantised(data))


def _quantised(data: dict[str, Any]) -> list[str]:
    lines, before = [], data["before"]["loss"]
    if file := data.get("gguf"):
        lines = [f"gguf        {file['type']}, loss {before:.4f} -> {file['loss']:.4f} in llama.cpp, "
                 f"{human_bytes(file['bytes'])}", f"            {file['path']}"]
    if data["precision"] is None:
        return lines
    after, size = data["after"], data["size"]
    return [f"quantised   {data['precision']}, loss {before:.4f} -> {after['loss']:.4f}, "
            f"KL {after['kl']:.5f}, the same next token in {after['agreement']:.1%}",
            f"weights     {human_bytes(size['written_bytes'])}, priced {human_bytes(size['priced_bytes'])}",
            *(f"            {amount:+,.0f} bytes: {label}" for label, amount in size["differences"].items()),
            f"model       {data['path']}", *(f"note        {note}" for note in data["notes"]), *lines]


@main.command()
@model_argument
@click.argument("repo", required=False)
@click.option("--public", is_flag=True, help="Make a new repository that all may see. Default: private.")
@click.option("--dry-run", is_flag=True, help="Name the files and stop; uses no network.")
@json_option
def push(model: str, repo: str | None, public: bool, dry_run: bool, as_json: bool) -> None:
    """Upload the result of a run, with its card, to the Hugging Face Hub.

    MODEL is a run, or a folder that minipuzzle wrote. REPO is owner/name; left out, the name of the
    run in your account. The token is that of 'hf auth login', or HF_TOKEN.

    \b
    minipuzzle push runs/mine --dry-run
    minipuzzle push runs/mine my-name/my-model-half --public
    """
    from minipuzzle.verbs.push import push as upload

    told = upload(model, repo, not public, dry_run)
    seen = "public" if public else "private"
    _print(told, as_json, [*(f"            {name}" for name in told["files"]),
                           f"{'would push' if dry_run else 'pushed'}  {len(told['files'])} files, "
                           f"{human_bytes(told['bytes'])}, to {told['url'] or told['repo']} ({seen} if new)"])


@main.command()
@click.argument("runs", nargs=-1, required=True, type=_Path())
@click.option("-o", "--output", type=_Path(), help="The comparison's file; default comparison.html.")
@json_option
def report(runs: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Write report.html again from report.json; with several runs, one page that compares them.

    \b
    minipuzzle report runs/mine
    minipuzzle report runs/half runs/third -o comparison.html
    """
    from minipuzzle.pages.compare import comparison, write_comparison
    from minipuzzle.pages.html import showing, write_report

    found = {str(run): _report_of(run) for run in runs}
    if len(found) < len(runs):
        raise InputError("report: a run is named twice")
    if len(runs) > 1:
        with showing("report.json of one of the runs"):
            page = write_comparison(found, output or Path("comparison.html"))
            data = comparison(found)
        _print(data | {"path": str(page)}, as_json, [str(page)])
        return
    if output is not None:
        raise InputError("report writes RUN/report.html; -o is for the comparison of several runs")
    with showing(str(runs[0] / "report.json")):
        page = write_report(found[str(runs[0])], runs[0])
    _print({"path": str(page)}, as_json, [str(page)])


def _report_of(run: Path) -> dict[str, Any]:
    path = run / "report.json"
    if not path.is_file():
        raise InputError(f"{path} does not exist; the run is not finished: 'minipuzzle prune' continues it")
    hint = "'minipuzzle prune' writes it again"
    with reading(path, hint=hint):
        return dict(read_json(path, hint=hint, limit=CANDIDATES_BYTES))


@main.command()
@click.argument("model", required=False, type=_Path(names=True))
@json_option
def doctor(model: str | None, as_json: bool) -> None:
    """Check this installation: versions, kernels, devices, memory, disk, causality of the SSM.

    With MODEL (a folder, a Hub id, a config.json or a published name), also check whether that
    model can be pruned here. With a run instead, compare every byte of its stages with what was
    written; exit code 5 if one differs.

    \b
    minipuzzle doctor
    minipuzzle doctor nemotron-h-8b
    minipuzzle doctor runs/mine
    """
    from minipuzzle.verbs.doctor import examine, examine_run

    is_run = model is not None and (Path(model) / "stages").is_dir()
    checks = examine_run(Path(model)) if model is not None and is_run else examine(model)
    _print(checks, as_json, [f"{'ok ' if c['ok'] else 'BAD'} {c['name']}: {c['value']}" for c in checks])
    bad = [c for c in checks if not c["ok"]]
    if bad and is_run:
        raise CorruptArtifact(bad[0]["value"] + (f" (and {len(bad) - 1} more)" if bad[1:] else ""))
    if bad:
        sys.exit(1)


@main.group()
def recipes() -> None:
    """List, show, explain, copy and check recipes.

    \b
    minipuzzle recipes explain search.measure
    minipuzzle recipes show default
    minipuzzle recipes copy default mine.yaml
    """


@recipes.command("ls")
@json_option
def recipes_ls(as_json: bool) -> None:
    """List the shipped recipes. Example: minipuzzle recipes ls"""
    from minipuzzle.recipes.schema import shipped_recipes

    rows = [{"name": file.name.removesuffix(".yaml"), "about": file.read_text().splitlines()[0].lstrip("# ")}
            for file in shipped_recipes()]
    _print(rows, as_json, [f"{row['name']:20} {row['about']}" for row in rows])


@recipes.command("show")
@click.argument("name")
@json_option
def recipes_show(name: str, as_json: bool) -> None:
    """Print a recipe; with --json, all keys as resolved. Example: minipuzzle recipes show default"""
    from minipuzzle.recipes.schema import Recipe, recipe_text

    _print(Recipe.load(name).model_dump() if as_json else {}, as_json, [recipe_text(name)[0].rstrip()])


@recipes.command("copy")
@click.argument("name")
@click.argument("file", type=_Path())
@json_option
def recipes_copy(name: str, file: Path, as_json: bool) -> None:
    """Copy a recipe to a file. Example: minipuzzle recipes copy default mine.yaml"""
    from minipuzzle.recipes.schema import recipe_text

    text = recipe_text(name)[0]
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise InputError(f"{file} exists already; choose another name") from None
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror})") from None
    _print({"path": str(file)}, as_json, [str(file)])


@recipes.command("validate")
@click.argument("names", nargs=-1)
@json_option
def recipes_validate(names: tuple[str, ...], as_json: bool) -> None:
    """Check recipes, by default all shipped. Example: minipuzzle recipes validate mine.yaml"""
    from minipuzzle.recipes.schema import Recipe, shipped_recipes

    every = names or tuple(f.name.removesuffix(".yaml") for f in shipped_recipes())
    valid = [name for name in every if Recipe.load(name)]
    _print(valid, as_json, [f"{name}: valid" for name in valid])


@recipes.command("explain")
@click.argument("key", required=False)
@json_option
def recipes_explain(key: str | None, as_json: bool) -> None:
    """What the keys of a recipe mean. KEY is a section or a key; the default is one line for each.

    \b
    minipuzzle recipes explain
    minipuzzle recipes explain distillation.tokens
    """
    from minipuzzle.recipes.explain import explain, lines

    entries = explain(key)
    _print(entries, as_json, lines(entries, whole=key is not None))


@recipes.command("schema")
def recipes_schema() -> None:
    """The JSON schema of a recipe, for editors. Example: minipuzzle recipes schema > schema.json"""
    from minipuzzle.recipes.schema import json_schema

    _print(json_schema(), True, [])


if __name__ == "__main__":
    main()
