"""The lab: what does each part of a modern decoder buy? Configs with a hypothesis, over seeds, compared.

    python -m lab.experiments                              # everything, three seeds
    python -m lab.experiments --quick                      # every family once, short: no findings
    python -m lab.experiments --only=norm_layer,kv_heads_1 # some of them, against the baseline
    python -m lab.experiments --corpus=wikitext2           # on other text
    python train.py configs/experiments/kv_heads_1.py --seed=2 --name=mine    # one of them, by hand

An experiment is a file in configs/experiments/: a baseline, a hypothesis, and the lines that differ. Each is
trained with every seed as a run folder of its own, out/experiments/CORPUS/NAME-sSEED, and prints to
NAME-sSEED.log beside it (lab/study.py). A difference from the baseline counts only if the 95 % interval over
the seeds' differences (Student's t) excludes 0.

Families: `ablations`; `gqa`, with decoding speed and cache size; `moe`, with the router's balance;
`race`, how soon a model with all modern parts reaches the final loss of a plain GPT; `streams`, texts longer
than the context, with and without attention sinks; `scaling`, six sizes at three budgets of FLOPs, their
prediction for a larger model, and one more run that tests it; `shapes`, what larger models and batches cost;
`transfer`, a task learnt from scratch, by a pretrained model, or given in a prompt. Everything goes to
out/experiments/CORPUS/experiments.json, and a summary to the terminal.
"""

from support.terminal import run_script

import time

from configs import names_in, parse_config
from lab.families import costs, gqa, moe, race, stream, transfer, transfer_runs
from lab.scaling import scaling, scaling_runs
from lab.study import (
    FOLDER,
    ExperimentConfig,
    Run,
    by_seed,
    compared,
    prepare_tokens,
    run_of,
    settings_of,
    train_all,
)
from support.files import write_json
from support.machine import git_commit, hardware, pick_device, versions
from support.processes import CORES
from support.runs import errors_for_users

FAMILIES = {
    "ablations": """norm_layer norm_none norm_post positions_learned positions_none ffn_gelu ffn_silu untied
        qk_norm heads_8 heads_16 lr_1e3 lr_9e3 lr_3e2 warmup_0 wsd muon batch_1 batch_16 batch_64 vocab_512
        vocab_2048 context_64 context_256 linear sparse_16""".split(),
    "gqa": ["kv_heads_1", "kv_heads_2"],
    "moe": """moe_4_top1 moe_4_top2 moe_8_top1 moe_8_top2 moe_every_2 dense_as_moe_4
        dense_as_moe_8""".split(),
    "race": ["gpt", "modern"],
    "streams": ["sink"],
    "scaling": [],
    "shapes": [],
    "transfer": [],
}
MEASURES = {  # what a family measures beside the loss: f(cfg, runs of the baseline and of the family)
    "gqa": gqa, "moe": moe, "streams": stream, "race": race, "scaling": scaling, "shapes": costs,
    "transfer": transfer,
}  # fmt: skip


def chosen(only: str) -> dict[str, list[str]]:
    """The families, or what --only leaves of them."""
    wanted = names_in(only, [*FAMILIES, *names_of(FAMILIES)])
    families = {}
    for family, names in FAMILIES.items():
        some = names if family in wanted else [name for name in names if name in wanted]
        if some or family in wanted:
            families[family] = some
    return families


def names_of(families: dict[str, list[str]]) -> list[str]:
    """The experiments, the baseline first."""
    return sum(families.values(), ["baseline"])


def plan(cfg: ExperimentConfig) -> list[Run]:
    """All runs, those of the first seed first."""
    families = chosen(cfg.only)
    runs = []
    for seed in cfg.all_seeds:
        for name in names_of(families):
            flags = [f"--corpus={cfg.corpus}"]
            if cfg.quick:
                c = settings_of([str(FOLDER / f"{name}.py")])
                flags += [
                    f"--max_steps={max(4, c.max_steps // 20)}",
                    "--eval_every=0",
                    f"--warmup_steps={min(2, c.warmup_steps)}",
                ]
            runs.append(run_of(cfg, name, f"{name}.py", flags, seed))
    if "scaling" in families:
        runs += scaling_runs(cfg)
    if "transfer" in families:
        runs += transfer_runs(cfg)
    return runs


def measure(cfg: ExperimentConfig, runs: list[Run]) -> dict:
    """{family: what it measures beside the loss}; {} without a baseline."""
    found = {}
    families = chosen(cfg.only) if by_seed(runs, "baseline") else {}
    for family, names in families.items():
        some = [run for run in runs if run.name in ("baseline", *names)]
        if family in MEASURES and (result := MEASURES[family](cfg, some)):
            found[family] = result
    return found


def line(name: str, e: dict) -> str:
    """One experiment for the terminal."""
    if "bits_per_byte" not in e:
        return f"{name:16} failed: {next(iter(e['failed'].values()), 'not run')}"
    d = e.get("difference", {})
    gap = " ".join(f"{key} {d[key]:+.4f}" for key in ("mean", "low", "high") if key in d)
    speed = f"{e['tokens_per_second']['mean']:,.0f} tokens/s"
    return f"{name:16} {e['bits_per_byte']['mean']:.4f} bits/byte, {speed}; {gap} {e.get('verdict', '')}"


def experiment(cfg: ExperimentConfig) -> dict:
    """Trains, measures, compares; returns what experiments.json holds."""
    begun = time.perf_counter()
    families = chosen(cfg.only)
    device = pick_device(cfg.device)
    runs = plan(cfg)
    jobs = cfg.jobs or (1 if device.type == "cuda" else CORES)
    trainings = [run for run in runs if run.script == "train.py"]
    prepare_tokens(trainings)
    failed = train_all(trainings, jobs)
    failed |= train_all([run for run in runs if run.script != "train.py"], jobs)
    measured = measure(cfg, runs)
    check = measured.get("scaling", {}).get("check", {})
    if "failed" in check:
        failed["scaling-check"] = check["failed"]
    found = {
        "corpus": cfg.corpus, "quick": cfg.quick, "seeds": len(cfg.all_seeds), "jobs": jobs,
        "families": families,
        "experiments": {name: compared(name, runs, failed) for name in names_of(families)},
        "measured": measured, "failed": failed,
        "git": git_commit(), "versions": versions(), "hardware": hardware(device),
        "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip
    file = cfg.home / "experiments.json"
    write_json(file, found)
    print("\nbits/byte, and minus the baseline's with its 95 % interval:")
    for name, entry in found["experiments"].items():
        print(line(name, entry))
    print(f"\n{file}: {found['seconds'] / 60:.1f} min" + "; QUICK RUN, no findings" * cfg.quick)
    return found


def main() -> None:
    cfg = parse_config(ExperimentConfig, __doc__)
    with errors_for_users():
        failed = experiment(cfg)["failed"]
    if failed:
        lines = [f"  {folder}: {why}" for folder, why in failed.items()]
        raise SystemExit("\n".join(["these runs failed, their output is in FOLDER.log:", *lines]))


if __name__ == "__main__":
    run_script(main)
