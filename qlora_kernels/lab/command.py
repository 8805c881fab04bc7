"""`python -m qlora_kernels lab`: what its five commands compute, print and write."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_kernels.finetune.interrupt import StopRequest, stop_on_signals
from qlora_kernels.formats.definitions import import_definitions
from qlora_kernels.lab import (
    assignment,
    fidelity,
    init,
    options,
    plots,
    sensitivity,
    sweep,
    train,
)
from qlora_kernels.lab.cache import CellCache
from qlora_kernels.lab.console import run, say
from qlora_kernels.lab.outputs import Table, text_table, write_table

SUMMARY = "compare quantization formats: error, size, what they do to a model"
DESCRIPTION = """
Compare quantization formats: the registered ones, and yours with --define. Every command writes
CSV, JSON, Markdown and PNG, and keeps what it has computed: the same command again, or one that was
killed, goes on where it was. qlora_kernels/lab/README.md is a walk-through.
"""
PRINTED_ROWS = 40
PLOTTED_LAYERS = 60


def add_commands(parser: argparse.ArgumentParser) -> None:
    """The commands and their options."""
    commands = parser.add_subparsers(dest="lab_command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        options.add_shared(added, name)
        return added

    added = command("fidelity", "errors of formats x block sizes on weights")
    options.add_variants(added, options.BLOCK_SIZES)
    options.add_weights(added)
    added = command("sweep", "the best format for each bit budget, and the Pareto front")
    options.add_variants(added, options.BLOCK_SIZES, **options.SWEPT)
    options.add_weights(added)
    options.add_sweep(added)
    added = command(
        "sensitivity", "error of each layer alone; the best mixed assignment of formats"
    )
    options.add_variants(added, options.MIXED_BLOCK_SIZES, options.FEW)
    options.add_model(added)
    options.add_sensitivity(added)
    added = command("init", "how much of the error each LoRA initialisation takes back")
    options.add_variants(added, [options.OWN], options.FEW)
    options.add_model(added)
    options.add_init(added)
    added = command("train", "a short fine-tune of the embedded model per format")
    options.add_variants(added, [options.OWN], options.FEW)
    options.add_train(added)


def main(given: argparse.Namespace) -> int:
    """Run the command and return the exit status."""
    return run(lambda: dispatch(given))


def dispatch(given: argparse.Namespace) -> None:
    """Run one command. Raises the errors that `console.run` knows."""
    import_definitions(given.define)
    COMMANDS[given.lab_command](given)


def fidelity_command(given: argparse.Namespace) -> None:
    variants, sets = options.chosen_variants(given), options.chosen_weights(given)
    began = time.perf_counter()
    with CellCache(given.cache) as cache:
        measured = fidelity.run_fidelity(sets, variants, cache, embeddings=True)
        told = effort(cache, began)
    rows = [one.row for one in measured]
    drawn: dict[str, bytes] = {}
    for weights in sets:
        lines = points([one for one in measured if one.weights == weights.name])
        drawn |= plots.draw(f"fidelity-{weights.name}.png", plots.errors_over_bits(lines))
    finish(given, Table("Fidelity of formats", rows, fidelity.NOTES), drawn)
    numel = sum(weights.numel for weights in sets)
    say(f"fidelity: {len(variants)} variants on {numel:,} weights, {told}")


def sweep_command(given: argparse.Namespace) -> None:
    variants = sweep.with_baseline(options.chosen_variants(given))
    sets = options.chosen_weights(given)
    began = time.perf_counter()
    with CellCache(given.cache) as cache:
        measured = [
            one
            for weights in sets
            for one in sweep.run_sweep(weights, variants, cache, given.margin)
        ]
        told = effort(cache, began)
    rows: list[dict[str, Any]] = []
    best: list[sweep.Best] = []
    drawn: dict[str, bytes] = {}
    for weights in sets:
        own = [one for one in measured if one.weights == weights.name]
        front = sweep.front(own)
        rows += [one.row for one in front]
        best += [sweep.best_at(own, budget) for budget in given.budgets]
        labelled = [(p.figures.bits, p.figures.nmse_db, p.variant.label) for p in front]
        drawn |= plots.draw(
            f"sweep-{weights.name}.png",
            plots.pareto(points(own), labelled, given.budgets, weights.name),
            height=6.4,
        )
    notes = [*(one.sentence for one in best), "The rows are the Pareto front.", *fidelity.NOTES[:4]]
    facts = {"best": [one.row for one in best], "all": [one.row for one in measured]}
    finish(given, Table("Best format for each size", rows, notes, facts), drawn)
    for one in best:
        sys.stdout.write(one.sentence + "\n")
    kept = len(measured) / len(sets)
    say(f"sweep: {len(variants)} variants, {kept:.0f} of them near the front, {told}")


def sensitivity_command(given: argparse.Namespace) -> None:
    variants = options.chosen_variants(given)
    studied = options.chosen_model(given)
    assignment.check_budget_of(studied, variants, given.budget)
    began = time.perf_counter()
    with CellCache(given.cache) as cache:
        costs = sensitivity.measure_layers(studied, variants, given.metric, cache)
        told = effort(cache, began)
    picked = assignment.solve(costs, given.budget)
    rows = assignment.compared(studied, costs, picked, given.budget, given.metric)
    unit = studied.unit if given.metric == "model" else "relative squared error, summed"
    notes = [*sensitivity.NOTES, f"Errors are {unit}."]
    facts = {"metric": given.metric, "unit": unit, "budget": given.budget}
    layers = [cost.row for layer in costs.values() for cost in layer]
    table = Table("Assignment of formats to layers", rows, notes, facts)
    errors = {name: {c.variant.label: max(c.error, 1e-12) for c in costs[name]} for name in costs}
    # The most sensitive ones, in the model's order, where there are more than a plot has room for.
    shown = sorted(errors, key=lambda name: -max(errors[name].values()))[:PLOTTED_LAYERS]
    errors = {name: errors[name] for name in errors if name in shown}
    assigned = {name: picked[name].variant.label for name in errors}
    fill = plots.layer_errors(errors, assigned, unit)
    drawn = plots.draw("sensitivity.png", fill, 2.0 + 0.2 * len(errors))
    write_table(given.out, "layers", Table("Sensitivity of layers", layers, notes, facts), {})
    path = given.out / "assignment.json"
    assignment.write_assignment(path, picked, {**facts, "model": given.model})
    finish(given, table, drawn)
    say(f"sensitivity: {len(costs)} layers x {len(variants)} variants, {told}; {path}")


def init_command(given: argparse.Namespace) -> None:
    variants = options.chosen_variants(given)
    studied = options.chosen_model(given)
    alpha = 2.0 * given.rank if given.alpha is None else given.alpha
    began = time.perf_counter()
    with CellCache(given.cache) as cache:
        rows = init.compare_starts(studied, variants, given.methods, given.rank, alpha, cache)
        told = effort(cache, began)
    facts = {"rank": given.rank, "alpha": alpha, "model": given.model}
    labels = [f"{row['format']} {row['method']}" for row in rows]
    fill = plots.bars(labels, [row["held out"] for row in rows], "output error, held-out text")
    drawn = plots.draw("init.png", fill, 1.5 + 0.2 * len(rows))
    finish(given, Table("Starts of adapters", rows, init.NOTES, facts), drawn)
    say(f"init: {len(studied.layers)} layers, {told}")


def train_command(given: argparse.Namespace) -> None:
    variants = options.chosen_variants(given)
    settings = train.default_settings(
        given.out,
        data=tuple(given.data),
        steps=given.steps,
        batch=given.batch,
        seq_len=given.seq_len,
        rank=given.rank,
        alpha=options.TRAINING.scaling * given.rank,
        lr=given.lr,
        seed=given.seed,
    )
    with stop_on_signals(StopRequest()) as stop:
        trained = train.train_variants(variants, settings, stop)
    drawn = plots.draw("train.png", plots.losses(train.curves(trained)))
    facts = {"settings": settings.compared_on_resume(), "losses": train.curves(trained)}
    finish(
        given, Table("Fine-tuning per format", [t.row for t in trained], train.NOTES, facts), drawn
    )


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "fidelity": fidelity_command,
    "sweep": sweep_command,
    "sensitivity": sensitivity_command,
    "init": init_command,
    "train": train_command,
}


def points(measured: Sequence[fidelity.Measured]) -> dict[str, list[tuple[float, float]]]:
    """Format -> (bits, dB) of its variants."""
    found: dict[str, list[tuple[float, float]]] = {}
    for one in measured:
        pair = (one.figures.bits, one.figures.nmse_db)
        found.setdefault(one.variant.name, []).append(pair)
    return found


def effort(cache: CellCache, began: float) -> str:
    """How long it took and how much of it was there already."""
    seconds = time.perf_counter() - began
    return f"{seconds:.1f} s, {cache.computed} cells computed"


def finish(given: argparse.Namespace, table: Table, drawn: Mapping[str, bytes]) -> None:
    """Write the files and print the table, a long one cut short."""
    written = write_table(given.out, given.lab_command, table, drawn)
    rows = table.rows[:PRINTED_ROWS]
    sys.stdout.write(text_table(Table(table.title, rows)))
    if len(table.rows) > len(rows):
        sys.stdout.write(f"... and {len(table.rows) - len(rows)} more rows in the files\n")
    names = ", ".join(path.name for path in written)
    say(f"{given.out} holds {names}")
