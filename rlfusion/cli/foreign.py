"""What the field's other programs call a setting of ours: TRL, diffusers' scripts, accelerate, ddpo-pytorch, Flow-GRPO.

Where nothing here means the same, nothing is suggested.
"""

from collections.abc import Sequence

ROWS: tuple[tuple[str, str], ...] = (
    ("pipeline.size size pretrain.size", "resolution image_size img_size height width"),
    (
        "updates train.steps method.steps steps",
        "max_train_steps num_train_epochs num_epochs max_steps total_steps num_train_steps train_steps training_steps "
        "num_updates num_steps",
    ),
    ("updates|agent.epochs train.steps method.steps steps", "num_iterations n_iterations"),
    ("agent.epochs", "num_inner_epochs train_num_inner_epochs ppo_epochs"),
    (
        "agent.micro_batch micro_batch",
        "gradient_accumulation_steps train_gradient_accumulation_steps grad_accum_steps grad_accum accumulation_steps",
    ),
    (
        "agent.micro_batch micro_batch train.batch method.batch batch",
        "train_batch_size per_device_train_batch_size batch_size mini_batch_size minibatch_size",
    ),
    ("rollout.item", "sample_batch_size sample_train_batch_size test_batch_size"),
    ("rollout.prompts|rollout.samples_per_prompt", "num_batches_per_epoch sample_num_batches_per_epoch"),
    (
        "rollout.samples_per_prompt count evaluation.samples",
        "num_image_per_prompt sample_num_image_per_prompt num_images_per_prompt num_generations group_size",
    ),
    ("rollout.workers workers", "num_processes num_gpus n_gpus nproc_per_node max_workers"),
    (
        "chain.steps",
        "num_inference_steps sample_num_steps test_num_steps sample_test_num_steps eval_num_steps inference_steps "
        "sampling_steps num_sampling_steps denoising_steps ddim_steps nfe",
    ),
    ("chain.guidance_scale", "guidance_scale sample_guidance_scale cfg cfg_scale cfg_weight guidance_weight"),
    ("chain.guidance_scale|chain.guidance", "guidance"),
    ("chain.kernel=DDIM(eta=...)", "eta ddim_eta sample_eta"),
    ("chain.kernel=FlowSDE(noise=...)", "noise_level sample_noise_level"),
    ("chain.negative", "negative_prompt negative_prompts"),
    ("pipeline.prompts", "prompt prompt_file prompts_file prompt_path validation_prompt validation_prompts"),
    ("precision pipeline.dtype", "mixed_precision fp16 bf16 amp use_bf16 use_fp16"),
    ("pipeline.dtype precision", "dtype torch_dtype weight_dtype"),
    ("pipeline.checkpointing", "gradient_checkpointing enable_gradient_checkpointing activation_checkpointing"),
    ("out root|name", "output_dir out_dir output_path save_dir"),
    ("root|name", "logdir log_dir logging_dir"),
    ("name", "run_name exp_name experiment_name project_name tracker_project_name"),
    (
        "base teacher checkpoint model",
        "pretrained_model_name_or_path pretrained_model model_name_or_path model_id model_path ckpt_path",
    ),
    (
        "agent.lr method.lr train.lr lr agents=ddpo(lr=...)",
        "learning_rate train_learning_rate learningrate lrate step_size",
    ),
    (
        "agent.optimizer=adamw8bit method.optimizer=adamw8bit train.optimizer=adamw8bit optimizer=adamw8bit",
        "use_8bit_adam train_use_8bit_adam adam_8bit",
    ),
    (
        "agent.optimizer=adamw(betas=...) method.optimizer=adamw(betas=...) train.optimizer=adamw(betas=...) "
        "optimizer=adamw(betas=...)",
        "adam_beta1 adam_beta2 train_adam_beta1 train_adam_beta2 adam_betas betas",
    ),
    (
        "agent.optimizer=adamw(eps=...) method.optimizer=adamw(eps=...) train.optimizer=adamw(eps=...) "
        "optimizer=adamw(eps=...)",
        "adam_epsilon train_adam_epsilon adam_eps",
    ),
    (
        "agent.weight_decay method.weight_decay train.weight_decay weight_decay",
        "adam_weight_decay train_adam_weight_decay wd",
    ),
    (
        "agent.max_grad_norm method.max_grad_norm train.max_grad_norm",
        "train_max_grad_norm grad_clip max_norm clip_grad_norm gradient_clipping max_gradient_norm",
    ),
    ("agent.warmup method.warmup train.warmup warmup", "lr_warmup_steps warmup_steps num_warmup_steps warmup_ratio"),
    (
        "agent.clip agent.clip_low|agent.clip_high",
        "clip_range train_clip_range cliprange ppo_clip clip_eps eps_clip epsilon epsilon_low",
    ),
    ("agent.clip_high", "epsilon_high clip_range_gt"),
    ("agent.advantage_clip", "adv_clip_max train_adv_clip_max"),
    ("agent.step_fraction", "timestep_fraction train_timestep_fraction"),
    (
        "agent.advantage",
        "per_prompt_stat_tracking per_prompt_stat_tracking_min_count scale_rewards global_std sample_global_std",
    ),
    ("agent.advantage_window", "per_prompt_stat_tracking_buffer_size"),
    ("agent.kl_loss agent.kl", "kl_coef kl_coeff kl_beta kl_weight kl_penalty init_kl_coef train_beta"),
    ("agent.steps", "truncated_backprop_timestep backprop_timesteps truncated_backprop"),
    ("lora=LoRA(rank=...)", "rank r lora_r lora_rank use_lora peft peft_config adapter"),
    ("lora=LoRA(alpha=...)", "lora_alpha"),
    ("lora=LoRA(dropout=...)", "lora_dropout"),
    ("lora=LoRA(targets=...)", "lora_target_modules target_modules"),
    ("checkpoint_every", "save_freq save_steps save_every checkpointing_steps save_interval"),
    ("checkpoints.last", "save_total_limit checkpoints_total_limit num_checkpoint_limit max_to_keep save_top_k"),
    ("evaluation.every", "eval_freq eval_steps eval_every validation_steps validation_epochs"),
    ("evaluation.samples count", "num_validation_images num_eval_samples"),
    ("data pretrain.data", "dataset dataset_name train_data_dir train_data data_dir instance_data_dir"),
    ("reward rewards", "reward_fn reward_func reward_funcs reward_function reward_model"),
    ("reward={NAME:WEIGHT}", "reward_weights"),
    ("agent.ema_decay method.ema train.ema ema_decay", "use_ema ema train_ema"),
    ("teacher", "pretrained_teacher_model teacher_model"),
    ("method.w_low", "w_min"),
    ("method.w_high", "w_max"),
    ("track", "report_to log_with tracker trackers use_wandb wandb wandb_project logger loggers"),
    ("seed seeds", "random_seed manual_seed generator data_seed"),
)
"""Ours, the best first ("a|b" for both; "a=TEXT" where it is part of what a writes), and the words of others."""

NONE = {
    "push_to_hub hub_model_id hub_token": "a training uploads nothing; afterwards: rlfusion push RUN --to REPO",
    "resume_from resume_from_checkpoint resume_path": "expected --resume FOLDER",
    "snr_gamma": "expected --objective min_snr, of pretrain",
    "num_train_timesteps noise_offset num_ddim_timesteps": "there is no such setting here",
    "revision": "expected a folder of that revision as the model",
    "local_rank num_machines main_process_port fsdp deepspeed": "many processes are rollout.workers of finetune",
    "lr_scheduler lr_scheduler_type lr_schedule lr_num_cycles scale_lr dataloader_num_workers "
    "allow_tf32 tf32 center_crop random_flip remove_unused_columns "
    "enable_xformers_memory_efficient_attention use_xformers max_train_samples cache_dir logging_steps": "there is no "
    "such setting here",
}
"""Words of others that nothing here means, and what is said of them."""

_OURS = {word: ours.split() for ours, words in ROWS for word in words.split()}
_SAID = {word: said for words, said in NONE.items() for word in words.split()}


def hint(key: str, leaves: Sequence[str]) -> str:
    """What a plain name (dots within, ``_`` for ``-``) is called here, among the settings of a command; "" where it is
    none that is known.
    """
    within = key.rpartition(".")[0]
    for word in _words(key):
        if word in _SAID:
            return f": {_SAID[word]}"
        there = [name for name in _OURS.get(word, ()) if set(name.partition("=")[0].split("|")) <= set(leaves)]
        own = [name for name in _inside(word, within, leaves) if name]
        for name in own or there[:1]:
            setting, _, text = name.partition("=")
            names = [one for one in setting.split("|") if one != key]
            if text:
                return f"; did you mean --{setting} '{text}'?"
            if names:
                return f"; did you mean {' or '.join(map(repr, names))}?"
    return ""


def _inside(word: str, within: str, leaves: Sequence[str]) -> list[str]:
    """Of ours those in the group that was typed, where it is one of the command's."""
    if not within:
        return []
    ends = {name.rpartition(".")[2] for name in _OURS.get(word, ()) if "=" not in name for name in name.split("|")}
    return [f"{within}.{end}" for end in sorted(ends) if f"{within}.{end}" in leaves][:1]


def known(key: str) -> bool:
    """Whether it is a word of others."""
    return any(word in _OURS for word in _words(key))


def _words(key: str) -> list[str]:
    """What may be the word of others: train.learning_rate, sample.num_steps, reward_fn.aesthetic."""
    return list(dict.fromkeys((key.replace(".", "_"), key.rpartition(".")[2], key.partition(".")[0])))
