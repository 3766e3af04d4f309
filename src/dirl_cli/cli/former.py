"""What runs of an earlier version were told, as it is said today, so that their own commands go on with them."""

MODULES = {
    "dirl_cli.algo.objective": "dirl_cli.rl.objective",
    "dirl_cli.algo.views": "dirl_cli.diffusion.states",
    "dirl_cli.models.causal": "dirl_cli.models.from_causal",
    "dirl_cli.models.checkpoint": "dirl_cli.models.load",
    "dirl_cli.models.lora": "dirl_cli.models.peft",
    "dirl_cli.training.annealing": "dirl_cli.sft.annealing",
    "dirl_cli.training.metrics": "dirl_cli.report.metrics_log",
    "dirl_cli.training.schedule": "dirl_cli.training.optim",
}
CLASSES = {  # in the modules of today
    "dirl_cli.diffusion.masking.Cosine": "dirl_cli.diffusion.masking.CosineRate",
    "dirl_cli.diffusion.masking.Count": "dirl_cli.diffusion.masking.CountPerBlock",
    "dirl_cli.models.load.Checkpoint": "dirl_cli.models.load.SavedModel",
    "dirl_cli.models.peft.Lora": "dirl_cli.models.peft.LoraFinetune",
    "dirl_cli.models.peft.Whole": "dirl_cli.models.peft.FullFinetune",
    "dirl_cli.report.metrics_log.FileOnly": "dirl_cli.report.trackers.FileOnly",
    "dirl_cli.report.metrics_log.TensorBoard": "dirl_cli.report.trackers.TensorBoard",
    "dirl_cli.report.metrics_log.Wandb": "dirl_cli.report.trackers.Wandb",
    "dirl_cli.reward.scoring.Rewards": "dirl_cli.reward.scoring.RewardSettings",
}

NUMBERS = ("rl.async_rollout",)  # which were true or false


def todays_word(word: str) -> str:
    """A word of the command line, with 1 or 0 for the true or false of a setting that is a number today."""
    key, _, value = word.partition("=")
    if key in NUMBERS and value.lower() in ("true", "false"):
        return f"{key}={int(value.lower() == 'true')}"
    return word


def todays_target(target: str) -> str:
    """The import path of a class, which an earlier version may have written down: the one it has today."""
    module, _, name = target.rpartition(".")
    if module in MODULES:
        target = f"{MODULES[module]}.{name}"
    return CLASSES.get(target, target)
