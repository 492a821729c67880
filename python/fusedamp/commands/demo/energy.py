"""Measures the energy of the demo's training steps, where the device has an energy counter."""

from __future__ import annotations

from functools import partial

from fusedamp.commands.demo.options import Options
from fusedamp.commands.demo.report import Outcome
from fusedamp.energy import EnergyError, compare

SECONDS = 2.0


def energy_lines(outcome: Outcome, options: Options) -> list[str]:
    """Return lines on joules per sample of further steps: of FP32 with torch, and of fusedamp's runs with
    master weights."""
    batch, reference = outcome.task.finetune(options.seed, 0), outcome.reference
    runs = [run for run in outcome.runs if run.variant.stack == "fusedamp" and run.variant.masters]
    arms = {run.variant.name: partial(run.step, batch) for run in [reference, *runs]}
    samples, rounds = len(batch[0]), 3 if options.quick else 5
    try:
        comparison = compare(arms, samples=samples, seconds=SECONDS, rounds=rounds, devices=[options.device])
    except EnergyError as error:
        return [f"{outcome.task.name}: energy was not measured: {error}"]
    verdicts = [comparison.verdict(reference.variant.name, run.variant.name) for run in runs]
    if options.device.type == "cpu":
        note = "On a CPU, 16-bit layers multiply in FP32: their energy here says nothing about a GPU's."
    else:
        note = "The networks are too small to fill a GPU: `make evidence` measures a larger one."
    return [f"{outcome.task.name}, {samples} samples per step. {comparison}", *verdicts, note]
