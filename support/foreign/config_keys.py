"""What other projects call our config keys, so that a name written from habit is answered with ours.

To add a name: write it after our key in NAMES_ELSEWHERE, or, where none of our keys has its meaning, in
NO_KEY. A name that means something else than our key, such as a ratio of it, needs a conversion: see
`support.foreign.config_values`. Names are compared in one spelling: `max-iters` and `maxIters` are max_iters.
"""

import difflib
import re

# Our own keys by section. They are written out because the schema takes seconds to import; a test compares
# them with it.
SECTIONS = {
    "": "base_ckpt seed tokenizer model data training hardware checkpoint logging lora template",
    "tokenizer": "kind vocab_size path",
    "model": (
        "vocab_size d_model n_layers n_heads n_kv_heads head_dim d_ff max_seq_len dropout rope_theta "
        "norm_eps tie_embeddings gradient_checkpointing norm mlp position bias qk_norm zero_init "
        "embed_scale"
    ),
    "data": (
        "source path dtype val_path dataset config revision split val_split text_field streaming "
        "train_docs val_docs val_fraction stride shuffle document_mask fields packing mask_prompt "
        "too_long errors"
    ),
    "training": (
        "max_steps epochs schedule_steps micro_batch_size grad_accum_steps seq_len lr min_lr warmup_steps "
        "schedule optimizer muon_lr weight_decay betas eps grad_clip compile val_every val_batches "
        "train_eval_batches log_every freeze sample_every sample_prompts sample_temperature"
    ),
    "hardware": "accelerator devices num_nodes strategy precision num_workers deterministic tf32",
    "checkpoint": "dir save_every keep_last",
    "logging": "tensorboard wandb",
    "lora": "rank alpha targets",
    "template": "system prompt prompt_with_input multi_turn stop special_tokens",
}
OUR_KEYS = tuple(f"{section}.{key}".strip(".") for section, keys in SECTIONS.items() for key in keys.split())

# Our key: names for it in other projects. A name with a dot counts in that section only.
NAMES_ELSEWHERE = {
    "model.d_model": (
        "n_embd n_embed emb_dim embed_dim embedding_dim embedding_size hidden_size hidden_dim model_dim "
        "d_embed dim width"
    ),
    "model.n_layers": "n_layer num_layers num_hidden_layers n_blocks num_blocks depth layers",
    "model.n_heads": "n_head num_heads num_attention_heads heads attention_heads",
    "model.n_kv_heads": "num_key_value_heads num_kv_heads n_kv_head kv_heads n_query_groups",
    "model.d_ff": (
        "intermediate_size ffn_dim ff_dim d_ffn d_hidden mlp_dim dim_feedforward ffn_hidden_size "
        "mlp_hidden_dim n_inner"
    ),
    "model.max_seq_len": (
        "context_length max_pos max_position_embeddings n_positions n_ctx ctx_len context_size "
        "context_len context_window"
    ),
    "model.bias": "qkv_bias use_bias attention_bias",
    "model.norm": "norm_type normalization norm_class",
    "model.mlp": "activation hidden_act activation_function act_fn",
    "model.position": (
        "pos_emb pos_encoding positional_encoding position_embedding position_embedding_type pos_embedding"
    ),
    "model.norm_eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon rmsnorm_eps ln_eps",
    "model.rope_theta": "theta rope_base rotary_base",
    "model.dropout": (
        "dropout drop_rate dropout_rate dropout_p attn_pdrop resid_pdrop embd_pdrop attention_dropout "
        "hidden_dropout"
    ),
    "model.tie_embeddings": (
        "weight_tying tie_weights tie_word_embeddings tied_embeddings share_embeddings weight_tie "
        "tie_embedding"
    ),
    "model.gradient_checkpointing": "grad_checkpointing activation_checkpointing",
    "tokenizer.kind": (
        "data.tokenizer model.tokenizer tokenizer_type tokenizer_name tokenizer.type tokenizer.name encoding"
    ),
    "tokenizer.path": "tokenizer_path tokenizer_file vocab_path vocab_file",
    "tokenizer.vocab_size": "data.vocab_size bpe_vocab_size",
    "data.path": (
        "data_dir data_path train_path train_data train_file input_file text_path text_file corpus "
        "corpus_path dataset_path file_path dataset_dir train_files data_file data_files data.file "
        "data.input"
    ),
    "data.val_path": (
        "val_data val_file valid_path valid_file valid_data validation_file validation_path eval_file "
        "eval_path eval_data"
    ),
    "data.dataset": "dataset_name hf_dataset",
    "data.config": "dataset_config dataset_config_name",
    "data.val_fraction": (
        "val_frac valid_frac val_ratio validation_split val_size valid_ratio validation_fraction"
    ),
    "data.text_field": "text_column text_key dataset_text_field",
    "data.document_mask": "doc_mask",
    "data.mask_prompt": "mask_inputs",
    "training.seq_len": "seq_length sequence_length max_seq_length seqlen train_seq_len",
    "training.micro_batch_size": (
        "batch_size per_device_train_batch_size device_batch_size per_device_batch_size bs micro_batch"
    ),
    "training.grad_accum_steps": (
        "gradient_accumulation_steps grad_accumulation_steps accumulate_grad_batches accum_steps "
        "grad_accum gradient_accumulation accumulation_steps grad_acc_steps"
    ),
    "training.lr": "learning_rate lr max_lr peak_lr base_lr initial_lr learning_rate_max",
    "training.min_lr": "min_learning_rate lr_min eta_min final_lr learning_rate_min",
    "training.warmup_steps": "warmup_iters warmup num_warmup_steps warmup_iterations n_warmup",
    "training.schedule_steps": "lr_decay_iters lr_decay_steps decay_steps decay_iters cosine_cycle_iters",
    "training.schedule": (
        "lr_schedule lr_scheduler_type lr_scheduler scheduler schedule_type scheduler_type scheduler.type "
        "schedule.type"
    ),
    "training.max_steps": (
        "max_iters max_iter max_step num_steps num_iters n_iters n_steps iterations num_iterations "
        "total_steps train_steps max_train_steps num_train_steps training_steps total_iters steps iters"
    ),
    "training.epochs": "num_epochs n_epochs num_train_epochs max_epochs epoch total_epochs",
    "training.optimizer": (
        "optim optim.optimizer optim.name optim.type optimizer.name optimizer.type optimizer_type "
        "optimizer_name"
    ),
    "training.weight_decay": "wd",
    "training.eps": "adam_epsilon adam_eps epsilon",
    "training.grad_clip": (
        "max_grad_norm clip_grad clip_grad_norm gradient_clip_val grad_clip_norm gradient_clipping "
        "grad_norm_clip clip max_l2_norm max_norm grad_clip_val"
    ),
    "training.compile": "torch_compile use_compile",
    "training.val_every": (
        "eval_interval eval_every eval_freq eval_steps val_interval val_freq val_check_interval "
        "evaluation_interval"
    ),
    "training.val_batches": (
        "eval_iters eval_iter eval_batches val_iters val_steps n_val_batches limit_val_batches"
    ),
    "training.log_every": (
        "log_interval log_freq logging_steps log_steps log_every_n_steps logging_interval print_every"
    ),
    "training.freeze": "freeze_layers frozen",
    "training.sample_every": "sample_interval sample_freq generate_every sample_steps",
    "training.sample_prompts": "start_context sample_prompt start_prompt",
    "hardware.devices": "gpus n_gpus num_gpus nproc_per_node world_size",
    "hardware.num_nodes": "nnodes n_nodes",
    "hardware.precision": "dtype amp_dtype torch_dtype mixed_precision",
    "hardware.num_workers": "workers n_workers dataloader_num_workers num_data_workers",
    "hardware.tf32": "allow_tf32 use_tf32 enable_tf32",
    "hardware.deterministic": "cudnn_deterministic deterministic_ops",
    "seed": "runtime.seed random_seed rng_seed manual_seed",
    "checkpoint.dir": (
        "save_dir out_dir output_dir checkpoint_dir ckpt_dir logdir log_dir run_dir results_dir directory "
        "save_path work_dir checkpoint.directory checkpoint.path"
    ),
    "checkpoint.save_every": (
        "save_interval save_steps save_freq checkpoint_every checkpoint_interval checkpoint_freq "
        "ckpt_every ckpt_interval"
    ),
    "checkpoint.keep_last": (
        "keep_last_k keep_last_n save_total_limit max_checkpoints keep_checkpoints max_to_keep"
    ),
    "logging.wandb": "wandb_log use_wandb",
    "logging.tensorboard": "use_tensorboard tensorboard_log",
    "base_ckpt": (
        "checkpoint_path pretrained_model_name_or_path init_from pretrained_path base_model "
        "model_name_or_path base_checkpoint"
    ),
    "lora.rank": "lora_r lora.r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.targets": "target_modules lora_target_modules lora.target_modules lora_targets",
    "template": "prompt_template chat_template prompt_style",
}
# What to do without a key, where none of ours stands for a name: names.
NO_KEY = {
    "best.ckpt has the lowest val_loss": "best_by best_metric monitor metric_for_best_model",
    "each new best validation loss is saved, and the last step": "always_save_checkpoint",
    "python3 eval_val.py --ckpt FILE validates without training": "eval_only",
    "GPUs use NCCL and CPUs Gloo, without a key": "backend ddp_backend dist_backend",
    "the tokenizer decides": (
        "eos_id eos_token eos_token_id bos_id bos_token_id pad_id pad_token pad_token_id"
    ),
    "these are chosen automatically": "pin_memory persistent_workers prefetch_factor",
    "training takes full blocks only, validation all tokens": "drop_last",
    "validation uses training.micro_batch_size": (
        "eval_batch_size eval.batch_size per_device_eval_batch_size val_batch_size"
    ),
    "checkpoint.dir names the run": (
        "wandb_project wandb_run_name wandb_entity run_name experiment_name exp_name project_name"
    ),
    "resume a run with --resume on the command line": (
        "resume resume_from resume_from_checkpoint load_checkpoint"
    ),
    "text is split into training and validation only": "test_frac test_split test_ratio",
    "attention is PyTorch's own, which picks the fastest": (
        "head_size attention_type attn_type flash_attention use_flash"
    ),
}
# Several of our keys that a name stands for: names.
SEVERAL_KEYS = {
    "model.norm, model.mlp and model.position": "model.name",
    "training.sample_every and training.sample_prompts": "sample_n num_samples",
}


def _answers_by_name() -> dict[str, str]:
    """The three tables as one: another project's name, and what it is answered with."""
    answers = {name: ours for ours, names in NAMES_ELSEWHERE.items() for name in names.split()}
    answers |= {name: f"leave it out: {advice}" for advice, names in NO_KEY.items() for name in names.split()}
    answers |= {name: several for several, names in SEVERAL_KEYS.items() for name in names.split()}
    return answers


FOREIGN_NAMES = _answers_by_name()
# How alike a name must be to one of ours, by difflib; suggestions below that are more often silly than right.
LEAST_LIKENESS = 0.8


def normalised(name: str) -> str:
    """The name in our spelling.

    >>> [normalised(name) for name in ("max-iters", "maxIters", "MAX_ITERS")]
    ['max_iters', 'max_iters', 'max_iters']
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").replace(" ", "_").lower()


def leaf_of(key: str) -> str:
    """The name without its sections: `training.lr` is lr."""
    return key.rsplit(".", 1)[-1]


def our_key(key: str) -> str | None:
    """Our key of this name, in whatever section it was written: `runtime.seed` is seed. If several sections
    have it, the one that was written, else the first."""
    same_leaf = [ours for ours in OUR_KEYS if leaf_of(ours) == leaf_of(key) and leaf_of(ours) not in SECTIONS]
    if key in same_leaf:
        return key
    return same_leaf[0] if same_leaf else None


def answer_to(key: str) -> str | None:
    """The answer to another project's name: our key, several joined by `and`, or `leave it out: ...`; None
    for a name we do not know."""
    name = normalised(key)
    return FOREIGN_NAMES.get(name) or our_key(name) or FOREIGN_NAMES.get(leaf_of(name))


def nearest_key(key: str) -> str | None:
    """Our key whose name is most like this one, its own section first; None if none is alike.

    >>> nearest_key("model.d_modle")
    'model.d_model'
    """
    section = normalised(key).rpartition(".")[0]
    known = [ours for ours in OUR_KEYS if ours not in SECTIONS or "." not in key]
    own_section_last = sorted(known, key=lambda ours: ours.rpartition(".")[0] == section)
    keys_by_leaf = {leaf_of(ours): ours for ours in own_section_last}  # the last of several stays
    near = difflib.get_close_matches(leaf_of(normalised(key)), keys_by_leaf, n=1, cutoff=LEAST_LIKENESS)
    return keys_by_leaf[near[0]] if near else None


def is_key(answer: str | None) -> bool:
    """Whether an answer is one key of ours, not several and not words."""
    return answer in OUR_KEYS
