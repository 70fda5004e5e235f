"""What a name or a value that does not exist was meant to be: the words of other libraries, then the nearest one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

# Keys as other libraries call them. Dashes and capitals do not count.
_KEYS = {
    "trainer.devices": "gpus num_gpus n_gpus ngpus n_gpu num_devices gpus_per_node nproc nproc_per_node processes "
    "tasks_per_node world_size",
    "trainer.nodes": "num_nodes n_nodes nnodes",
    "trainer.max_steps": "steps num_steps n_steps total_steps max_iters iterations train_steps epochs max_epochs "
    "num_epochs num_train_epochs",
    "trainer.precision": "dtype torch_dtype fp16 bf16 amp mixed_precision",
    "trainer.float32_matmul_precision": "tf32 allow_tf32 matmul_precision",
    "trainer.strategy": "distributed distributed_strategy",
    "trainer.zero_stage": "zero zero_optimization stage",
    "trainer.context_parallel": "cp sequence_parallel context_parallel_size cp_size",
    "trainer.accumulate": "accumulate_grad_batches gradient_accumulation_steps grad_accum grad_accumulation "
    "accumulation gradient_accumulation",
    "trainer.activation_checkpointing": "gradient_checkpointing checkpointing recompute grad_checkpointing",
    "trainer.valid_every": "val_check_interval eval_every eval_steps eval_interval val_every validate_every "
    "val_interval",
    "trainer.checkpoint_every": "save_every save_steps save_interval checkpoint_steps ckpt_every checkpoint_interval",
    "trainer.keep_checkpoints": "save_top_k save_total_limit keep_last max_checkpoints",
    "trainer.log_every": "log_every_n_steps logging_steps log_interval",
    "trainer.time_limit": "max_time time walltime",
    "trainer.ema_decay": "ema",
    "optim.name": "optimizer optim",
    "optim.momentum": "muon_momentum beta",
    "optim.decay_fraction": "decay_steps cooldown cooldown_fraction",
    "optim.lr": "learning_rate base_lr peak_lr max_lr",
    "optim.base_dim": "mup base_width mup_base_width base_shape",
    "optim.final_lr": "min_lr lr_min eta_min lr_end",
    "optim.warmup_steps": "warmup num_warmup_steps warmup_iters lr_warmup_steps",
    "optim.schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule",
    "optim.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optim.eps": "epsilon adam_epsilon",
    "optim.weight_decay": "wd decay",
    "optim.clip": "grad_clip gradient_clip gradient_clip_val max_grad_norm clip_grad grad_norm gradient_clipping",
    "optim.implementation": "fused",
    "data.train": "data files fasta train_files train_file dataset input inputs path paths train_data data_path "
    "data_dir sources",
    "data.valid": "val validation valid_files val_files dev eval_data",
    "data.test": "test_files",
    "data.length": "seq_len seq_length sequence_length max_length max_len max_seq_len block_size context "
    "context_length n_ctx ctx_len",
    "data.batch_tokens": "batch_size batch global_batch_size train_batch_size micro_batch_size tokens_per_batch "
    "per_device_train_batch_size",
    "data.workers": "num_workers n_workers dataloader_num_workers",
    "data.shuffle_buffer": "buffer_size shuffle shuffle_buffer_size",
    "data.tokenizer": "vocab vocabulary alphabet vocab_file tokenizer_path",
    "data.valid_fraction": "val_fraction valid_split val_split validation_split",
    "model.dim": "hidden_size hidden d_model width embed_dim emb_dim n_embd embedding_dim hidden_dim model_dim",
    "model.depth": "layers num_layers n_layers n_layer num_hidden_layers blocks",
    "model.heads": "num_heads n_heads n_head nhead num_attention_heads",
    "model.ffn_dim": "intermediate_size mlp_dim d_ff ff_dim dim_feedforward ffn_hidden_size",
    "model.preset": "size model_size",
    "model.block": "block_type recipe",
    "model.norm_kind": "norm_type normalization",
    "model.ffn": "activation hidden_act act_fn mlp ffn_type",
    "model.conv": "short_conv conv_size conv_kernel d_conv",
    "model.value_residual": "resformer value_embeds",
    "model.objective": "task mlm causal loss",
    "data.fim_rate": "fim infill_rate fim_prob spm_rate",
    "model.init_from": "pretrained checkpoint ckpt ckpt_path load_from from_pretrained init weights pretrained_model",
    "attention.features": "nb_features num_features m n_features num_random_features",
    "attention.kind": "attention_type attn attn_implementation attn_type",
    "attention.kernel": "feature_map kernel_type kernel_fn",
    "attention.window": "local_window window_size sliding_window",
    "attention.layers": "layer_types attn_layers attention_layers layer_pattern hybrid",
    "attention.redraw_every": "feature_redraw_interval redraw redraw_interval",
    "run.branch": "fork branch",
    "run.name": "name run_name experiment exp_name job_name",
    "run.dir": "output output_dir out out_dir outdir save_dir logdir log_dir dir work_dir root root_dir "
    "default_root_dir",
    "run.seed": "seed random_seed",
}
_OTHERS = {word: key for key, words in _KEYS.items() for word in words.split()}

# Values as other libraries call them, by the key that has the choice.
_VALUES = {
    "trainer.accelerator": {"cuda": "gpu gpus nvidia cuda:0", "cpu": "none"},
    "trainer.precision": {
        "fp32": "32 float32 float full single 32-true f32",
        "bf16": "bfloat16 bf16-mixed bf16-true brain",
        "fp16": "16 float16 half 16-mixed 16-true f16 mixed amp",
    },
    "trainer.strategy": {
        "deepspeed": "fsdp zero zero1 zero2 zero3 deepspeed_stage_1 deepspeed_stage_2 deepspeed_stage_3 ds sharded",
        "ddp": "dp distributed ddp_spawn ddp_find_unused_parameters_true",
        "single": "none single_device one",
    },
    "model.objective": {
        "causal": "clm autoregressive ar gpt lm next next_token unidirectional uni decoder causal_lm",
        "fim": "infill infilling fill_in_the_middle psm",
        "masked": "mlm bert bidirectional bid mask encoder masked_lm",
    },
    "attention.kind": {
        "favor": "performer linear favor+ fast",
        "exact": "softmax full standard transformer sdpa flash quadratic vanilla",
    },
    "attention.backend": {"torch": "pytorch python", "native": "cpp c++ cpu", "triton": "cuda gpu"},
    "optim.schedule": {
        "constant": "none flat",
        "cosine": "cos cosine_annealing linear",
        "wsd": "trapezoidal warmup_stable_decay",
        "inverse_sqrt": "inv_sqrt rsqrt noam",
    },
    "optim.name": {"adamw": "adam torch"},
    "optim.implementation": {"torch": "adamw adam", "cpu": "cpuadam deepspeedcpuadam", "fused": "fusedadam"},
    "data.packing": {
        "concat": "packed pack join",
        "crop": "pad padding none single",
        "bucket": "sort buckets sorted",
        "family": "families msa",
    },
    "data.format": {"fasta": "fa faa protein proteins", "text": "txt plain", "jsonl": "json", "images": "image"},
    "data.tokenizer": {
        "protein": "aa amino amino_acids residues",
        "dna": "rna nucleotides bases genome",
        "bytes": "byte char chars characters utf8 utf-8",
    },
    "model.position": {"rotary": "rope", "learned": "absolute embedding"},
    "trainer.offload_optimizer": {"cpu": "true ram", "none": "false null off", "nvme": "disk ssd"},
    "trainer.offload_params": {"cpu": "true ram", "none": "false null off", "nvme": "disk ssd"},
    "trainer.on_bad_step": {"stop": "raise error fail", "skip": "ignore continue"},
    "gpu_request": {"gpus-per-node": "gpus gpus_per_node"},
    "container": {"apptainer": "singularity", "pyxis": "enroot docker"},
}


def near_key(name: str, known: Mapping[str, str]) -> str | None:
    """The key of ``known`` (each with its meaning) that was meant by ``name``; None where nothing is near.

    Keys that end alike go first, then those that other libraries call so, then those whose meaning has the words. The
    section alone makes nothing alike.
    """
    last = name.rpartition(".")[2].lower().replace("-", "_")
    other = _OTHERS.get(last, "")
    if other in known and name.partition(".")[0] in (last, other.partition(".")[0]):  # model.layers is model.depth
        return other
    alike = {key: difflib.SequenceMatcher(None, key.rpartition(".")[2], last).ratio() for key in known}
    ranked = sorted(alike, key=lambda key: (-alike[key], key.partition(".")[0] != name.partition(".")[0]))
    if ranked and alike[ranked[0]] == 1:
        return ranked[0]
    if other in known:
        return other
    words = last.replace("_", " ")
    by_meaning = [key for key in known if len(words) > 3 and re.search(rf"\b{re.escape(words)}\b", known[key])]
    by_meaning.sort(key=lambda key: key.partition(".")[0] != name.partition(".")[0])
    near = [key for key in ranked if alike[key] > 0.8] or by_meaning or [key for key in ranked if alike[key] > 0.6]
    return near[0] if near else None


def keys_of_options(words: Sequence[str], known: Mapping[str, str]) -> str:
    """What options that do not exist are as key=value, the end of a sentence: --devices 2 is trainer.devices=2.

    known: the keys of the verb, each with its meaning.
    """
    found = []
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        key = near_key(name.lstrip("-"), known) if name.startswith("--") else None
        if key:
            given = value if equals else after if after and not after.startswith("-") else "..."
            found.append(f"{key}={given}")
    return f": keys are written without dashes, as {' '.join(found)}" if found else ""


def unknown_key(full: str, known: Iterable[str], has: str) -> str:
    """The sentence about a key of one of a list's entries that does not exist; ``has``: "A source has"."""
    near = difflib.get_close_matches(full.rpartition(".")[2], known, n=1)
    return f"unknown key {full!r}. " + (f"Did you mean {near[0]}?" if near else f"{has} {', '.join(known)}.")


def near_choice(key: str, value: str, choices: Sequence[str]) -> str | None:
    """The choice that was meant by ``value``."""
    word = value.lower()
    others = _VALUES.get(key, {})
    meant = [choice for choice, words in others.items() if choice in choices and word in words.split()]
    return next(iter(meant or nearest(word, choices)), None)


def nearest(word: str, words: Iterable[str]) -> list[str]:
    """The one of ``words`` that is written most alike, in a list; an empty one where none is."""
    known = {each.lower(): each for each in words}
    return [known[each] for each in difflib.get_close_matches(word.lower(), known, n=1)]
