//! Names of keys in other trainers' configurations: NeMo AutoModel, diffusion-pipe, SimpleTuner,
//! musubi-tuner, sd-scripts, ai-toolkit, torchtitan, DeepSpeed, Lightning and the scripts of
//! diffusers and transformers.

use crate::settings::Habit;

/// Names that stand for a key of ours.
const fn same(theirs: &'static str, ours: &'static [&'static str]) -> Habit {
    Habit { theirs, ours, remark: "" }
}

/// Names of what is said in another way here, or not at all.
const fn other(theirs: &'static str, remark: &'static str) -> Habit {
    Habit { theirs, ours: &[], remark }
}

/// The first entry that has a key's name or dotted path counts.
pub(super) const HABITS: &[Habit] = &[
    // Batches.
    Habit {
        theirs: "batch_size train_batch_size",
        ours: &["data.micro_batch_size_per_gpu", "train.global_batch_size"],
        remark: "of one pass of a rank; of a step of all ranks",
    },
    same(
        "local_batch_size micro_batch_size per_device_train_batch_size train_micro_batch_size_per_gpu \
         image_micro_batch_size_per_gpu batch_size_per_gpu mbs",
        &["data.micro_batch_size_per_gpu"],
    ),
    same("global_batch gbs total_batch_size effective_batch_size", &["train.global_batch_size"]),
    same(
        "gradient_accumulation grad_accum grad_accum_steps grad_acc_steps accumulate_grad_batches accumulation_steps",
        &["train.gradient_accumulation_steps"],
    ),
    same(
        "num_workers dataloader_num_workers max_data_loader_n_workers prefetch_factor",
        &["data.prefetch"],
    ),
    // The optimizer.
    same("learning_rate base_lr max_lr peak_lr lr", &["optimizer.*.lr"]),
    same("betas adam_betas", &["optimizer.*.beta1", "optimizer.*.beta2"]),
    same("adam_beta1", &["optimizer.*.beta1"]),
    same("adam_beta2", &["optimizer.*.beta2"]),
    same("adam_epsilon adam_eps epsilon", &["optimizer.*.eps"]),
    same("adam_weight_decay wd", &["optimizer.*.weight_decay"]),
    Habit {
        theirs: "loraplus_lr_ratio loraplus_unet_lr_ratio",
        ours: &["optimizer.lr_factors"],
        remark: "a LoRA's B by the pattern \"lora_B\"",
    },
    same(
        "lr_multipliers lr_mult param_groups parameter_groups lr_scales",
        &["optimizer.lr_factors"],
    ),
    Habit {
        theirs: "no_decay no_weight_decay no_decay_params weight_decay_exclude wd_mult",
        ours: &["optimizer.decay_factors"],
        remark: "0 by pattern; biases and norms decay with optimizer.decay = \"all\" only",
    },
    other(
        "optimizer.type optimizer.name optimizer_type",
        "the optimizer is the table that is there: [optimizer.adamw]",
    ),
    same(
        "gradient_clipping gradient_clip_val gradient_clip_norm grad_clip grad_clip_norm clip_grad clip_grad_norm \
         clip_grad_max_norm max_norm",
        &["train.max_grad_norm"],
    ),
    // The schedule.
    same(
        "lr_warmup_steps num_warmup_steps lr_warmup warmup warmup_iters warmup_steps",
        &["lr_scheduler.*.warmup_steps"],
    ),
    other(
        "lr_scheduler.type lr_scheduler.name lr_scheduler_type lr_decay_style lr_schedule",
        "the schedule is the table that is there: [lr_scheduler.cosine], for instance",
    ),
    Habit {
        theirs: "min_lr lr_min eta_min lr_end min_lr_ratio lr_min_ratio",
        ours: &["lr_scheduler.*.min_factor"],
        remark: "a share of the peak",
    },
    same("lr_scheduler_num_cycles lr_num_cycles num_cycles", &["lr_scheduler.cosine.restarts"]),
    other("lr_scheduler_power lr_power", "it is `power` in the table [lr_scheduler.polynomial]"),
    same(
        "max_train_steps num_train_steps train_steps training_steps total_steps num_steps_total max_iters iterations \
         steps train.steps training.steps",
        &["max_steps"],
    ),
    same("epochs num_epochs num_train_epochs max_train_epochs", &["max_epochs"]),
    // Checkpoints and the run folder.
    same(
        "ckpt_every_steps checkpointing_steps checkpoint_step_interval checkpoint_every_n_steps checkpoint_every \
         checkpoint_interval checkpoint.interval checkpoint.every save_every_n_steps save_every save_steps \
         save_interval",
        &["checkpoint.every_n_steps"],
    ),
    same(
        "save_every_n_epochs checkpoint_every_n_epochs checkpoint_epoch_interval",
        &["checkpoint.every_n_epochs"],
    ),
    Habit {
        theirs: "checkpoint_every_n_minutes",
        ours: &["checkpoint.every_n_steps"],
        remark: "it counts steps",
    },
    same(
        "checkpoints_total_limit save_total_limit max_step_saves_to_keep keep_latest_k keep_last_n save_last_n_steps",
        &["checkpoint.keep_last"],
    ),
    same("save_best save_best_only save_top_k load_best_model_at_end", &["checkpoint.keep_best"]),
    same("async_save async_mode is_async async_checkpoint", &["checkpoint.asynchronous"]),
    other(
        "checkpoint.enabled checkpoint.enable enable_checkpoint save_checkpoint",
        "checkpoints need not be turned on; checkpoint.every_n_steps says how often they are written",
    ),
    same(
        "checkpoint_dir checkpoint.folder output_directory output_path output_folder out_dir save_dir save_path \
         dump_folder training_folder log_dir logging_dir",
        &["output_dir"],
    ),
    other(
        "resume_from_checkpoint resume_from resume_path restore_from resume",
        "resuming is said when the run is started: --resume latest",
    ),
    // The model.
    same(
        "transformer_dtype torch_dtype compute_dtype weight_dtype param_dtype training_dtype mixed_precision \
         mixed_precision_param precision bf16 fp16",
        &["model.dtype"],
    ),
    same(
        "pretrained_model_name_or_path pretrained_transformer_model_name_or_path pretrained_model_path \
         model_name_or_path name_or_path model_path model_dir transformer_path diffusers_path ckpt_path checkpoint_path",
        &["model.path"],
    ),
    other(
        "model.type model.name model.arch model_type model_family model_flavor flavor",
        "the family is the table that is there, as [model.flux], or what model.path holds",
    ),
    same(
        "lora_rank lora_dim network_dim network_module peft.dim rank network peft",
        &["lora.rank"],
    ),
    same(
        "base_model_precision fp8_base fp8_scaled quantize quantization load_in_4bit load_in_8bit bnb_4bit_quant_type",
        &["model.frozen_dtype"],
    ),
    same("lora_alpha network_alpha peft.alpha", &["lora.alpha"]),
    same("lora_dropout network_dropout rank_dropout peft.dropout_position", &["lora.dropout"]),
    same("lora_target_modules lora_layers lora_modules", &["lora.target_modules"]),
    same("init_lora_weights lora_a_init", &["lora.init"]),
    same("modules_to_save freeze_modules trainable_modules", &["train.trainable"]),
    // Averages of the weights.
    Habit {
        theirs: "use_ema enable_ema ema_enabled ema.enabled ema.use_ema ema_config ema_decay ema_rate ema_beta \
                 ema.ema_decay ema.beta",
        ours: &["ema.decay"],
        remark: "which alone turns averages of the weights on; 0.9999 is usual",
    },
    same("ema_min_decay min_value", &["ema.min_decay"]),
    same("ema_update_after_step ema_start_step ema_start update_after", &["ema.update_after_step"]),
    same("ema_use_ema_warmup ema_warmup ema.warmup", &["ema.use_ema_warmup"]),
    same("ema_inv_gamma", &["ema.inv_gamma"]),
    same("ema_power", &["ema.power"]),
    same("ema_dtype ema_precision ema.precision", &["ema.dtype"]),
    same(
        "ema_update_interval ema_update_every ema_interval update_every ema.update_interval ema.every",
        &["ema.every_n_steps"],
    ),
    other(
        "ema_device ema.device ema_cpu_only ema_offload",
        "averages lie where parallel.offload puts the optimizer's state",
    ),
    other("ema_foreach_disable foreach ema.foreach", "averages move within the optimizer's pass"),
    other("ema_validation", "samples of the report take the averages; `fm-dist sample` with --ema"),
    // Data.
    same(
        "dataset dataset.path datasets dataset_path dataset_config data_dir data_path train_data_dir instance_data_dir \
         data_backend_config cache_dir cache_directory",
        &["data.path"],
    ),
    other(
        "num_repeats dataset_repeats",
        "repeats are those of a dataset in [[data.datasets]], or of a file in dataset.json",
    ),
    // Flow matching.
    same(
        "timestep_sample_method timestep_sampling_method timestep_type weighting_scheme",
        &["flow_matching.timestep_sampling"],
    ),
    same("sigmoid_scale", &["flow_matching.logit_std"]),
    same(
        "discrete_flow_shift timestep_shift flow_schedule_shift sigma_shift flow_matching.shift",
        &["flow_matching.flow_shift"],
    ),
    same(
        "flux_shift flux2_shift qwen_shift auto_shift flow_schedule_auto_shift flux_schedule_auto_shift",
        &["flow_matching.shift_type"],
    ),
    same("pseudo_huber_c huber_delta", &["flow_matching.huber_c"]),
    same(
        "caption_dropout_rate caption_dropout_probability caption_dropout_percent caption_dropout prompt_dropout_prob \
         uncond_prob cond_dropout",
        &["flow_matching.cfg_dropout_prob"],
    ),
    same(
        "embedded_guidance flow_matching.guidance_scale guidance",
        &["flow_matching.adapter.guidance_scale"],
    ),
    // Kernels.
    same(
        "attention_backend attn_implementation attn_backend attn_mode attention_type attention_mechanism \
         sdpa_backend use_flash_attn use_flash_attention flash_attention flash_attn sdpa xformers use_xformers \
         enable_xformers_memory_efficient_attention",
        &["compute.attention"],
    ),
    // Ranks and memory.
    same(
        "gradient_checkpointing activation_checkpointing activation_checkpoint use_gradient_checkpointing \
         recompute_granularity",
        &["parallel.recompute"],
    ),
    same(
        "fsdp fsdp_version distributed dp_shard data_parallel_shard_degree sharding_strategy zero_stage \
         zero_optimization deepspeed",
        &["parallel.sharding"],
    ),
    same(
        "blocks_to_swap cpu_offload enable_cpu_offload offload_optimizer optimizer_cpu_offload low_vram",
        &["parallel.offload"],
    ),
    other(
        "tensor_parallel_size tensor_parallel_degree tp_size pipeline_stages pipeline_parallel_size \
         pipeline_parallel_degree pp_size context_parallel_size context_parallel_degree cp_size",
        "ranks divide a model by parallel.sharding alone; there is no tensor, pipeline or context parallelism",
    ),
    other(
        "num_gpus nproc_per_node num_processes world_size devices num_nodes",
        "the launcher decides how many ranks there are: mpirun -n N",
    ),
    other("compile torch_compile use_compile", "nothing is compiled at run time"),
    // Logs and samples.
    same(
        "log_every log_every_steps log_every_n_steps log_remote_every_step logging_steps log_freq steps_per_print",
        &["flow_matching.summary_log_interval"],
    ),
    same("log_level verbosity", &["log.level"]),
    Habit {
        theirs: "tensorboard enable_tensorboard use_tensorboard wandb use_wandb enable_wandb report_to log_with \
                 tracker_project_name",
        ours: &["log.tensorboard"],
        remark: "TensorBoard's files, which `wandb sync` uploads; metrics.jsonl is always there",
    },
    same("num_inference_steps sample_steps inference_steps", &["sampling.num_steps"]),
    same(
        "val_every_steps eval_every_n_steps eval_steps eval_interval eval_steps_interval validate_every_n_steps \
         val_check_interval validation.freq validation.interval",
        &["validation.every_n_steps"],
    ),
    Habit {
        theirs: "eval_every_n_epochs eval_epoch_interval validate_every_n_epochs",
        ours: &["validation.every_n_steps"],
        remark: "it counts steps",
    },
    same("validation_split val_split", &["validation.share"]),
    same(
        "eval_datasets eval_dataset validation_dataset val_dataset validation_data_dir validation_dataloader",
        &["validation.path"],
    ),
    same(
        "sample_every sample_every_n_steps validation_steps validation_step_interval \
         sample.sample_every",
        &["sampling.every_n_steps"],
    ),
    same(
        "validation_prompt validation_prompts sample_prompt sample_prompts sample.prompts",
        &["sampling.prompts"],
    ),
    same(
        "validation_negative_prompt sample_negative_prompt sample.neg",
        &["sampling.negative_prompt"],
    ),
    same("validation_resolution sample.width sample.height", &["sampling.size"]),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::HABITS;
    use crate::config::RunConfig;
    use crate::error::Error;
    use crate::optim::lr::LrScheduleChoice;
    use crate::settings::Family;

    fn problem(text: &str) -> String {
        match RunConfig::read("test", text, &[]) {
            Err(Error::Config { problems, .. }) => {
                problems.iter().map(ToString::to_string).collect::<Vec<_>>().join(" | ")
            }
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn a_name_stands_once_and_a_hint_names_keys_that_there_are() {
        let mut names = BTreeSet::new();
        // One schedule after another, since a listing has the keys of one.
        let listing: String = LrScheduleChoice::NAMES
            .iter()
            .map(|schedule| {
                let text = format!(
                    "[flow_matching]\nadapter_type = \"flux\"\n[model.flux]\n[lr_scheduler.{schedule}]\n"
                );
                RunConfig::read("test", &text, &[]).expect("defaults").to_toml() + "\n"
            })
            .collect();
        let has = |key: &str| {
            let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
            let mut inside = String::new();
            listing.lines().any(|line| {
                if let Some(header) = line.strip_prefix('[') {
                    inside = header.trim_end_matches(']').into();
                }
                let fits = match table.strip_suffix(".*") {
                    Some(family) => inside.starts_with(&format!("{family}.")),
                    None => inside == table,
                };
                fits && line.trim_start_matches("# ").starts_with(&format!("{name} ="))
            })
        };
        for habit in HABITS {
            assert!(!(habit.ours.is_empty() && habit.remark.is_empty()), "{habit:?}");
            for key in habit.ours {
                assert!(has(key), "{key}");
            }
            for name in habit.theirs.split_whitespace() {
                assert!(names.insert(name), "{name} stands twice");
            }
        }
    }

    #[test]
    fn keys_of_other_trainers_are_sent_to_ours() {
        for (text, hint) in [
            (
                "[data]\nbatch_size = 1",
                "data.batch_size (line 2): unknown key; did you mean data.micro_batch_size_per_gpu or train.global_batch_size? (of one pass",
            ),
            (
                "[train]\ntrain_batch_size = 1",
                "did you mean data.micro_batch_size_per_gpu or train.global_batch_size?",
            ),
            (
                "[train]\ngradient_accumulation = 1",
                "did you mean train.gradient_accumulation_steps?",
            ),
            ("gradient_accumulation_steps = 1", "did you mean train.gradient_accumulation_steps?"),
            ("lr = 1", "lr (line 1): unknown key; did you mean optimizer.adamw.lr?"),
            ("[optimizer.adamw]\nlearning_rate = 1", "did you mean optimizer.adamw.lr?"),
            ("[model]\ntransformer_dtype = \"bfloat16\"", "did you mean model.dtype?"),
            ("save_every_n_steps = 1", "did you mean checkpoint.every_n_steps?"),
            (
                "[checkpoint]\nenabled = true",
                "checkpoint.enabled (line 2): unknown key; checkpoints need not be turned on",
            ),
            (
                "[lr_scheduler.cosine]\n[train]\nwarmup_steps = 3",
                "did you mean lr_scheduler.cosine.warmup_steps?",
            ),
            (
                "[step_scheduler]\nlocal_batch_size = 1\nnum_epochs = 2",
                "step_scheduler.local_batch_size (line 2): unknown key; did you mean data.micro_batch_size_per_gpu? | step_scheduler.num_epochs (line 3): unknown key; did you mean max_epochs?",
            ),
            (
                "[optim]\nlearning_rate = 1",
                "optim.learning_rate (line 2): unknown key; did you mean optimizer.adamw.lr?",
            ),
            ("[training]\nsteps = 3", "did you mean max_steps?"),
            ("val_every_steps = 3", "did you mean validation.every_n_steps?"),
            ("eval_every_n_epochs = 3", "did you mean validation.every_n_steps? (it counts steps)"),
            ("[validation]\ndataset = \"a\"", "did you mean"),
            ("[model]\ntype = \"flux\"", "the family is the table that is there"),
            ("use_ema = true", "did you mean ema.decay? (which alone turns averages"),
            ("[ema]\nema_decay = 0.99", "did you mean ema.decay?"),
            ("[train]\nema_update_interval = 10", "did you mean ema.every_n_steps?"),
        ] {
            assert!(problem(text).contains(hint), "{text}: {}", problem(text));
        }
    }

    #[test]
    fn no_guess_is_far_off() {
        for text in [
            "[data]\nfoo = 1",
            "[train]\nmomentum = 1",
            "[checkpoint]\nformat = 1",
            "[parallel]\nenabled = true",
            "[extra]\nthing = 1",
        ] {
            assert!(!problem(text).contains("did you mean"), "{text}: {}", problem(text));
        }
    }
}
