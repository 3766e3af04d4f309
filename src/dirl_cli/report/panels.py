"""Which metrics of a training run are drawn, and what they are called."""

from dirl_cli.report.plot import Panel

SFT_PANELS = (
    Panel(
        "Loss per answer token",
        {"loss": "training", "validation_loss": "validation", "stage_loss": "in smaller blocks"},
        log=True,
    ),
    Panel("Entropy of what is right, per hidden token", {"certainty_loss": "nats"}),
    Panel("Greedy accuracy", {"greedy_accuracy": "accuracy"}, percent=True),
    Panel("Learning rate", {"lr": "learning rate", "adamw_lr": "of AdamW beside Muon"}, smooth=False),
    Panel("Gradient norm", {"grad_norm": "gradient norm"}),
    Panel("Tokens per second", {"tokens_per_s": "tokens"}),
)
RL_PANELS = (
    Panel(
        "Accuracy",
        {
            "accuracy": "rollouts",
            "greedy_accuracy": "greedy, held out",
            "hinted_accuracy": "with hints",
            "greedy_credit": "greedy, in part",
        },
        percent=True,
    ),
    Panel("Reward", {"reward": "reward"}),
    Panel("Tokens per forward", {"tokens_per_forward": "tokens"}),
    Panel("Answer length", {"length": "tokens"}),
    Panel("Entropy", {"entropy": "nats"}),
    Panel("Sampler against trainer", {"mismatch_mean": "mean", "mismatch_max": "largest"}),
    Panel("Critic", {"explained_variance": "explained variance", "value_loss": "loss"}),
    Panel("Divergence from the reference", {"kl": "nats"}),
)
DPO_PANELS = (
    Panel("Loss per pair", {"loss": "training", "validation_loss": "validation"}),
    Panel(
        "Pairs told apart", {"reward_accuracy": "training", "validation_reward_accuracy": "validation"}, percent=True
    ),
    Panel("Margin of implicit rewards", {"reward_margin": "training", "validation_reward_margin": "validation"}),
    Panel("Implicit rewards", {"chosen_reward": "chosen", "rejected_reward": "rejected"}),
    Panel("Log-probs of answers", {"chosen_logprob": "chosen", "rejected_logprob": "rejected"}),
    Panel("Greedy accuracy", {"greedy_accuracy": "accuracy"}, percent=True),
    Panel("Gradient norm", {"grad_norm": "gradient norm"}),
)
PANELS_OF = {"sft": SFT_PANELS, "rl": RL_PANELS, "dpo": DPO_PANELS}
