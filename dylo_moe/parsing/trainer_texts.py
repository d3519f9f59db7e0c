"""The help of the Trainer's flags that every help shows, in our words; `TrainerOptions` has the texts of the others."""

from __future__ import annotations

TRAINER_TEXTS = {
    "max_steps": "Optimizer steps to train, whatever num_train_epochs says; -1: as many as its passes have.",
    "per_device_train_batch_size": "Rows of a training batch, in each process.",
    "per_device_eval_batch_size": "Rows of an evaluation batch, in each process.",
    "gradient_accumulation_steps": "Batches whose gradients make one optimizer step.",
    "lr_scheduler_type": "How the learning rate changes.",
    "lr_scheduler_kwargs": "More settings of that schedule, as JSON: '{\"num_cycles\": 2}'.",
    "warmup_steps": "Steps in which the learning rate rises to its peak; below 1: their share of all steps.",
    "weight_decay": "Weight decay of the experts and the gate.",
    "max_grad_norm": "Longer gradients are scaled down to this norm.",
    "bf16": "Load the base in bfloat16, and compute in it.",
    "fp16": "Compute in float16 where that is exact enough; for GPUs without bfloat16.",
    "label_smoothing_factor": "Share of each label that is spread over the vocabulary.",
    "gradient_checkpointing": "Save memory: compute activations again in the backward pass instead of keeping them.",
    "eval_steps": "Steps between evaluations with --eval_strategy steps; default: logging_steps.",
    "save_steps": "Steps between checkpoints with --save_strategy steps.",
    "save_total_limit": "Checkpoints to keep; the oldest are deleted, with --load_best_model_at_end never the best.",
    "metric_for_best_model": "The logged figure by which the best checkpoint is chosen; default: loss.",
    "report_to": "Where metrics go besides metrics.jsonl: none, tensorboard, wandb, mlflow, ...",
    "run_name": "Name of the run at the tracker.",
    "seed": "Seed of everything random: the experts' weights, the split, the order of the rows, dropout.",
}
