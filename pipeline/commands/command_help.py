"""Help of commands that is said without what the command imports."""

from __future__ import annotations

HELP: dict[str, str] = {
    "recipes": "usage: mnemos recipes\n\nEvery recipe, one line each.",
    "doctor": (
        "usage: mnemos doctor [--json FILE]\n\nWhat this machine has: devices, kernels, attention backends, versions."
    ),
    "eval": (
        "usage: mnemos eval CHECKPOINT [--suite NAME [its flags]] [flags of the recipe]\n"
        "       mnemos eval FOLDER --suite downstream [its flags] [--data.tokenizer NAME]\n\n"
        "CHECKPOINT is a checkpoint's folder, OUT/checkpoints/best, or a run directory for its latest one. FOLDER is a"
        " model\nwithout a run: one that `export` wrote, or save_pretrained, or OLMo.\n\n"
        "  --suite long        gap closed too, what its memory is worth beyond the window\n"
        "  --suite recall      what stood far back is asked for instead\n"
        "    --lengths N,...   in tokens, such as 1024,16384\n"
        "    --queries N       questions a point at the least (default 96)\n"
        "    --forms A,B       of needle, variables, common words, qa1, qa2, qa3, about text (default all)\n"
        "  --suite peptides    likelihoods and drawn peptides, of a model of peptides\n"
        "    --samples N       peptides of each kind that are drawn (default 1000)\n"
        "    --peptides N      held-out peptides of each kind that are scored at the most (default 1000)\n"
        "    --decoys N        other targets beside the true one of each (default 9)\n"
        "    --guidance X, --temperature X   of what is drawn (default 1)\n"
        "  --suite contexts    rank of context vectors, what they forget and what can be read from them\n"
        "    --control RUN     a run of the same data whose model has no context, to compare perplexities with\n"
        "  --suite downstream  tasks of lm-evaluation-harness instead (pip install -e '.[eval]')\n"
        "    --tasks A,B       by name; default hellaswag,winogrande,sciq,copa,arc_easy,openbookqa\n"
        "    --limit N         the first N documents of each task\n"
        "    --task-path DIR   a folder of further tasks, in the harness's YAML form\n"
        "  --raw-weights       those of the last update, not their moving average (--optimizer.ema-decay)\n\n"
        "The result goes to OUT/evals. `mnemos eval CHECKPOINT --help` lists the common flags,"
        " `--help-all` every one."
    ),
    "bench": (
        "usage: mnemos bench throughput [--lengths N ...] [--ranks N] [RECIPE] [flags]\n"
        "       mnemos bench dense [--rounds N] [--threads N] [--ranks 1 2] [--compile] [RECIPE] [flags]\n"
        "       mnemos bench kernels [--shapes 1x8192x4x64 ...] [--ops NAME ...] [--backends NAME ...]\n"
        "       mnemos bench resume [--ranks N] [RECIPE] [flags]\n"
        "       mnemos bench report FOLDER\n\n"
        "All but report take --json FILE and --help, and all of these but dense --repeats N."
    ),
    "plan": (
        "usage: mnemos plan RECIPE [--ranks N] [--device NAME | --all-devices] [--utilisation SHARE] [--reserve GIB]\n"
        "                   [--tokens N,...] [flags of the recipe]\n\n"
        "  --ranks N            devices in all (default 1)\n"
        "  --device NAME        a device of the table in docs/plan.md, or its driver's name (default H200)\n"
        "  --all-devices        a table of what fits on every device of that table\n"
        "  --utilisation SHARE  share of the peak that model FLOPs are expected to reach (default 0.4)\n"
        "  --tokens N,...       numbers of tokens, such as 1B,3T: a table of their time on one device and on eight\n"
        "  --reserve GIB        memory of a device that stays free (default 2 GiB and 5 % of the device's)\n\n"
        "`mnemos plan RECIPE --help` lists the recipe's common flags too, `--help-all` every one."
    ),
}
"""Help of the commands whose flags are not a recipe's alone."""
