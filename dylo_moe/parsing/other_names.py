"""What the flags of other trainers are called here: the words of TRL, axolotl, LLaMA-Factory and older scripts."""

from __future__ import annotations

from collections.abc import Set

OTHER_NAMES = {
    # the model
    "base_model": "model",
    "model_id": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "model_path": "model",
    "pretrained_model_name_or_path": "model",
    "base": "model",
    "quantization_bit": "load_in_4bit",
    "use_4bit": "load_in_4bit",
    "qlora": "load_in_4bit",
    "attention": "attn_implementation",
    "attn": "attn_implementation",
    # experts
    "experts": "num_experts",
    "n_experts": "num_experts",
    "lora_rank": "lora_r",
    "shared_rank": "shared_r",
    "rank": "lora_r",
    "r": "lora_r",
    "alpha": "lora_alpha",
    "rslora": "use_rslora",
    "dropout": "lora_dropout",
    "lora_target": "lora_targets",
    "lora_target_modules": "lora_targets",
    "target_modules": "lora_targets",
    "top_k_experts": "top_k",
    "num_experts_per_tok": "top_k",
    "router_aux_loss_coef": "balance_coefficient",
    "aux_loss_coef": "balance_coefficient",
    # data
    "data": "datasets",
    "dataset": "datasets",
    "dataset_name": "datasets",
    "dataset_path": "datasets",
    "train_file": "datasets",
    "dataset_dir": "data_dir",
    "cutoff_len": "max_seq_length",
    "max_length": "max_seq_length",
    "max_len": "max_seq_length",
    "max_seq_len": "max_seq_length",
    "model_max_length": "max_seq_length",
    "block_size": "max_seq_length",
    "seq_len": "max_seq_length",
    "sequence_len": "max_seq_length",
    "context_length": "max_seq_length",
    "sample_packing": "packing",
    "dataset_num_proc": "preprocessing_num_workers",
    "dataset_processes": "preprocessing_num_workers",
    "interleave": "interleaved_sampling",
    "interleave_probs": "mix",
    # optimisation
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "bs": "per_device_train_batch_size batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "grad_accum_steps": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "epoch": "num_train_epochs",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "max_train_steps": "max_steps",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "lr_strategy": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "optimizer": "optim",
    "wd": "weight_decay",
    "clip_grad": "max_grad_norm",
    "max_norm": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "label_smoothing": "label_smoothing_factor",
    "grad_checkpoint": "gradient_checkpointing",
    "checkpointing": "gradient_checkpointing",
    "patience": "early_stopping_patience",
    # the run
    "checkpoint": "resume_from_checkpoint",
    "resume": "resume_from_checkpoint",
    "resume_from": "resume_from_checkpoint",
    "wandb": "report_to",
    "wandb_name": "run_name",
    "wandb_run_name": "run_name",
    "log_with": "report_to",
    "out": "output_dir output",
    "out_dir": "output_dir output",
    "output": "output_dir",
    "output_dir": "output",
    "save_dir": "output_dir output",
    "save_path": "output_dir output",
    "eval_interval": "eval_steps",
    "evaluation_strategy": "eval_strategy",
    "val_steps": "eval_steps",
    "log_steps": "logging_steps",
    "log_interval": "logging_steps",
    "save_interval": "save_steps",
    "random_seed": "seed",
    # generating and judging
    "max_tokens": "max_new_tokens",
    "n_samples": "num_samples",
    "task": "tasks",
    "benchmark": "tasks eval_benchmark",
    "benchmarks": "tasks eval_benchmark",
    "adapter": "expert",
    "timeout": "timeout_seconds",
}
"""For each name the flags that may be meant; the first that a command has is proposed."""

NO_FLAGS = {
    "tokenizer": "the tokenizer is always that of --model",
    "tokenizer_name": "the tokenizer is always that of --model",
    "tokenizer_name_or_path": "the tokenizer is always that of --model",
    "template": "the chat template is always that of the tokenizer of --model",
    "chat_template": "the chat template is always that of the tokenizer of --model",
    "val_size": "a tenth of the rows is held out, or a validation split; --eval_subset says how many are used",
    "val_set_size": "a tenth of the rows is held out, or a validation split; --eval_subset says how many are used",
    "finetuning_type": "experts are always LoRA adapters, so leave it out",
    "use_peft": "experts are always LoRA adapters, so leave it out",
    "use_lora": "experts are always LoRA adapters, so leave it out",
    "stage": "training is always supervised, so leave it out",
    "do_sample": "--temperature above 0 samples",
    "max_samples": "--training_subset and --eval_subset take a percentage of the rows",
    "flash_attn": "type --attn_implementation flash_attention_2",
    "flash_attention": "type --attn_implementation flash_attention_2",
    "use_flash_attention_2": "type --attn_implementation flash_attention_2",
    "dtype": "--bf16 or --fp16 choose the precision; without them the base's own is used",
    "torch_dtype": "--bf16 or --fp16 choose the precision; without them the base's own is used",
    "precision": "--bf16 or --fp16 choose the precision; without them the base's own is used",
    "mixed_precision": "--bf16 or --fp16 choose the precision; without them the base's own is used",
    "load_in_8bit": "8 bits are not offered; --load_in_4bit is",
    "device": "a GPU is used where there is one; --use_cpu leaves it alone",
    "no_cuda": "a GPU is used where there is one; --use_cpu leaves it alone",
    "num_gpus": "start as many processes with torchrun or accelerate launch (docs/distributed.md)",
    "gpus": "start as many processes with torchrun or accelerate launch (docs/distributed.md)",
    "wandb_project": "the environment variable WANDB_PROJECT names the project (docs/tracking.md)",
    "disable_early_stopping": "without --early_stopping_patience nothing stops early, so leave it out",
    "cosine_restarts": "type --lr_scheduler_type cosine_with_restarts --lr_scheduler_kwargs '{\"num_cycles\": 2}'",
    "keep_truncated": "rows over --max_seq_length are kept and cut; --overlong drop leaves them out",
    "overwrite_output_dir": "a folder that holds a run is never overwritten; give a new --output_dir",
    "completion_only_loss": "only responses are trained unless --loss_on is all",
    "assistant_only_loss": "only responses are trained unless --loss_on is all",
    "train_on_inputs": "--loss_on all trains the prompts too",
    "recipe": "a recipe is given as --config RECIPE",
    "adapter": "experts are always LoRA adapters, so leave it out",
    "use_dora": "experts are plain LoRA adapters; DoRA is not offered",
    "modules_to_save": "only experts and router are trained, so leave it out",
    "lora_modules_to_save": "only experts and router are trained, so leave it out",
    "evals_per_epoch": "--eval_strategy steps and --eval_steps say how often",
    "saves_per_epoch": "--save_strategy steps and --save_steps say how often",
    "pad_to_sequence_len": "rows are padded to the longest of their batch; --packing fills them with texts",
    "eval_split": "a tenth of the rows is held out, or a validation split; --eval_subset says how many are used",
    "neat_packing": "--packing keeps the texts of a row apart",
}
"""What to do in place of a flag that has no counterpart here."""


OTHER_VALUES = {
    "optim": {"adam": "adamw_torch", "adamw": "adamw_torch", "adamw_hf": "adamw_torch", "adam8bit": "adamw_8bit"},
    "lr_scheduler_type": {"cosine_restarts": "cosine_with_restarts", "wsd": "warmup_stable_decay", "none": "constant"},
}
"""What the values of some flags are called elsewhere, each with ours."""


def meant_by(name: str, offered: Set[str]) -> str | None:
    """The answer to a flag of another trainer: the flag of ours that is meant, or what to do instead.

    Args:
        name: without dashes.
        offered: the flags of the command; only these are proposed.

    Returns:
        None for a name that the tables do not have, or whose counterparts this command does not offer.
    """
    for flag in OTHER_NAMES.get(name, "").split():
        if flag in offered:
            return f"here it is called --{flag}"
    advice = NO_FLAGS.get(name)
    if advice is None:
        return None
    named = [word.strip("-;,'") for word in advice.split() if word.startswith("--")]
    return advice if all(flag in (*offered, "config") for flag in named) else None
