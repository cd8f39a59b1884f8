"""Settings of a finetune that takes a second."""

TINY = (
    *("--pretrain.train.steps", 60, "--pretrain.train.batch", 32, "--pretrain.checkpoint_every", 20),
    *("--pretrain.model.net", "ResidualMLP(width=32, depth=1)", "--chain.steps", 4),
    *("--updates", 6, "--checkpoint_every", 3, "--evaluation.samples", 60),
    *("--rollout.prompts", 4, "--rollout.samples_per_prompt", 6, "--rollout.item", 10, "--agent.micro_batch", 64),
)
