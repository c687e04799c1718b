"""What the keys of another trainer's configuration become, from the top as it happens."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_cli.importing.job import LEFT_OUT, OURS, REFUSED, SECRET, TABLES, UNKNOWN, Job, asks
from rlhf_cli.importing.sources import read_sources
from rlhf_cli.recipe.suggest import OTHER_NAMES

NEUTRAL = {"f_divergence_type": "reverse_kl", "peft_init_lora_weights": True}
"""Keys that have no counterpart with another value."""


def convert(job: Job) -> None:
    """Fills the job's values, and says what became of every key of the file."""
    _loss(job)
    _adapter(job)
    _switches(job)
    read_sources(job)
    _steps(job)
    _rates(job)
    _cadence(job, bool(job.values.get("data.eval") or job.values.get("data.holdout")))
    _rest(job)
    defaults, losses = TABLES["defaults"], TABLES["losses"]
    own = defaults.get(f"{job.tool} {job.stage}", {}) | defaults.get(f"{job.tool} {job.kind}", {})
    job.assume(defaults[job.tool] | losses.get(job.kind, {}) | own)
    _differences(job)


def _loss(job: Job) -> None:
    loss, weights = job.take("loss_type", "pref_loss"), job.take("loss_weights", form=list)
    job.take("stage", "rl", "reward_model")
    kinds = loss if isinstance(loss, list) else [loss]
    if kinds[1:] == ["sft"]:
        first, *others = weights or (1.0, 1.0)
        job.put("objective.sft_weight", others[0] if first == 1 and others else weights)
        kinds = kinds[:1]
    loss = kinds[0] if len(kinds) == 1 else str(kinds)
    if asks(job.take("use_weighting", "dpo_use_weighting")):
        job.tell("Done otherwise", "wpo weighs a pair by 1 at most, as its authors do; there the weight may be larger")
        loss = "wpo" if (job.kind or loss or "sigmoid") == "sigmoid" else f"{job.kind or loss} with use_weighting"
    if loss == "ipo":
        job.stage = "ipo"
    elif job.kind or (loss and job.stage in ("dpo", "kto")):
        job.put("objective.kind", job.kind or loss)
    elif loss not in (None, "nll", "chunked_nll"):
        job.refuse(job.name("objective.kind"), f"{loss} has no counterpart in {job.stage}")
    job.kind = str(job.values.get("objective.kind", job.stage))
    if job.stage == "ipo":
        job.put("objective.normalize", "token_mean")  # all three divide by the length
    if loss in ("aot_pair", "aot_unpaired"):
        job.put("objective.pairing", "unpaired")
    if job.kind == "aot" and asks(job.rest.get("label_smoothing")):
        job.refuse("label_smoothing", "has no counterpart in aot. remove it")
    if loss == "bco_pair":
        job.put("objective.decay", 1.0)
        job.tell("Computed", "objective.decay: 1, which keeps the mid-point of the rewards at 0, as bco_pair has it")
    if job.tool == "TRL" and job.stage == "sft" and not asks(job.rest.get("assistant_only_loss")):
        job.tell("Done otherwise", "of `messages` the assistant's turns are learned; without assistant_only_loss there all")
    if job.kind == "orpo" and (weight := job.take(*OTHER_NAMES["objective.beta"])) is not None:
        job.put("objective.lambda", weight)
    for term in [name for name in OTHER_NAMES["objective.sft_weight"] if asks(job.rest.get(name))]:
        there = "each response's tokens, then over responses" if job.tool == "LLaMA-Factory" else "those of a device's part"
        job.tell("Done otherwise", f"{term}: the mean is over all tokens of a batch; there over {there}")
    if job.kind == "orpo" and job.tool != "LLaMA-Factory":
        job.tell("Done otherwise", "the likelihood that is learned is of the responses; there of their prompts as well")


def _adapter(job: Job) -> None:
    """LoRA, or all weights: an absent adapter means all there."""
    said = "lora" if asks(job.take("use_peft")) else job.take("finetuning_type", "adapter")
    kind = said or ("lora" if job.tool == "LLaMA-Factory" else "full")
    if kind not in ("lora", "qlora", "full"):
        job.refuse(job.name("lora"), f"{kind} has no counterpart. there are LoRA and all weights")
    names = [name for name in job.rest if OURS.get(name, "").startswith("lora.")]
    if parent := job.take("adapter_name_or_path", "lora_model_dir"):
        names += [name for name in OTHER_NAMES["model.path"] if name in job.rest]
        job.leave_out("the adapter that it starts from goes on as it is, on its own base", *names)
        job.put("model.path", parent)
        return
    if kind == "full":
        job.leave_out("without LoRA it has no effect", *names)
        job.assume({"lora": None})
        if said:
            del job.assumed["lora"]
        return
    linear, target = asks(job.take("lora_target_linear")), job.take("lora_target", "lora_target_modules")
    if linear or target in ("all", "all-linear", "all_linear"):
        target = "all-linear"
    elif isinstance(target, str) and not re.search(r"[()|*\\]", target):
        target = [part.strip() for part in target.split(",")]
    if target is not None:
        job.put("lora.target_modules", target)
    for name in [name for name in names if name in job.rest]:
        job.put(OURS[name], job.take(name))
    rank = job.values.get("lora.r", 8)
    twice = {"lora.alpha": 2.0 * rank} if job.tool == "LLaMA-Factory" and isinstance(rank, int) else {}
    job.assume(TABLES["lora"][job.tool] | twice)
    job.values.setdefault("lora.r", job.usual["lora.r"])  # a section of defaults alone is LoRA too


def _switches(job: Job) -> None:
    stored, said = job.take("torch_dtype", "dtype"), {name: job.take(name) for name in TABLES["switches"]}
    for name, value in said.items():
        ours, on, _ = TABLES["switches"][name]
        if value != "auto" and asks(value) and ours not in job.values:
            job.put(ours, on)
    if half := job.values.get("model.dtype"):
        frozen = "" if job.values.get("lora", 0) is None else f", frozen ones {half}"
        beside = f", torch_dtype {stored} or not" if stored not in (None, half) else ""
        job.tell("Done otherwise", f"compute is {half}{beside}; trained weights are float32{frozen}")
    elif stored:
        job.put("model.dtype", stored)
    for name, value in said.items():
        ours, _, off = TABLES["switches"][name]
        if value is not None and not asks(value) and off is not None and ours not in job.values:
            job.put(ours, off)
    for name in ("chat_template", "chat_template_path", "template", "chat_template_jinja"):
        template = str(job.take(name) or "jinja")
        if "{" in template or len(template) > 200:
            job.tell("To fill in", f"model.chat_template: write the text of {name} to a file, and name the file")
        elif Path(template).is_file():
            job.put("model.chat_template", template)
        elif template != "jinja":
            job.tell("Done otherwise", f"{name} {template}: the tokenizer's own is used, or a file: model.chat_template")
    if job.rest.get("model_revision") == "main":
        job.take("model_revision")


def _steps(job: Job) -> None:
    each, times = job.take("per_device_train_batch_size", "micro_batch_size"), job.take("gradient_accumulation_steps")
    if job.tool == "axolotl" and (whole := job.take("batch_size")):
        each, times = whole, 1
    each, times = each or (1 if job.tool == "axolotl" else 8), times or 1
    if isinstance(each, int) and isinstance(times, int):
        job.put("train.batch_size", each * times * job.gpus)
        words = f"{each} a device × {times} accumulated × {job.gpus} (--gpus)"
        job.tell("Computed", f"train.batch_size: {words} = {each * times * job.gpus}")
    else:
        job.refuse("gradient_accumulation_steps", f"{each} × {times} is no number of rows. write whole numbers")
    epochs, steps = job.take("num_train_epochs", "num_epochs", form=(int, float)), job.take("max_steps", form=int)
    if steps is not None and steps > 0:
        job.put("train.steps", steps)
        job.leave_out("max_steps goes before it", *["num_train_epochs"] * (epochs is not None))
        del job.usual["train.epochs"]
    elif epochs is not None:
        job.put("train.epochs", epochs)
    if None in (job.given.get("max_length", 0), job.given.get("max_seq_length", 0)):
        job.put("data.overlong", "error")
        job.tell("To fill in", "data.max_length: there is no limit there; it is 1024 now, and a longer row is an error")


def _rates(job: Job) -> None:
    """Numbers of the optimiser that are not taken as they stand."""
    name = "warmup_steps" if job.rest.get("warmup_steps") else "warmup_ratio"
    warmup = job.take(name, "warmup_steps")
    job.leave_out("warmup_steps goes before it", *["warmup_ratio"] * asks(job.rest.get("warmup_ratio")))
    if "constant" in (job.rest.get("lr_scheduler_type"), job.rest.get("lr_scheduler")):
        job.put("train.warmup", 0.0)
        job.leave_out("`constant` has no warm-up there", *[name] * bool(warmup))
    elif warmup is not None:
        job.put("train.warmup", warmup)
    betas = job.take("adam_beta1"), job.take("adam_beta2")
    if betas != (None, None):
        job.put("train.betas", [given or usual for given, usual in zip(betas, job.usual["train.betas"], strict=True)])
    if job.rest.get("max_grad_norm") == 0:
        job.rest["max_grad_norm"] = 1e9  # 0 clips nothing there
    if job.rest.get("adam_epsilon") == 1e-8:
        job.take("adam_epsilon")


def _cadence(job: Job, held_out: bool) -> None:
    """Looks at held-out rows and checkpoints: every so many steps, shares of a run, or so many an epoch."""
    epochs = job.values.get("train.epochs", TABLES["defaults"][job.tool]["train.epochs"])
    for word in ("eval", "save"):
        how, steps = str(job.take(f"{word}_strategy", f"{word}uation_strategy") or "").lower(), job.take(f"{word}_steps")
        often, ours = job.take(f"{word}s_per_epoch", form=int), f"train.{word}_every"
        name, often = f"{word}s_per_epoch" if often else f"{word}_steps", 1 if how == "epoch" else often
        if how in ("no", "false") or (word == "eval" and not held_out):
            job.leave_out("no rows are held out, or the file's strategy is `no`", *[name] * bool(steps or often))
            if word == "save":
                job.put(ours, None)
        elif often and ("train.steps" in job.values or not epochs):
            job.leave_out("how long an epoch is, is not known here", name)
        elif often:
            share = round(1 / (often * epochs), 6)
            job.put(ours, share if share < 1 else None)
            job.tell("Computed", f"{ours}: {often} an epoch × {epochs:g}: " + (f"{share:g}" if share < 1 else "at the end"))
        elif steps:
            job.put(ours, steps)
    if (every := job.rest.get("logging_steps")) is not None and not (isinstance(every, int) and every > 0):
        job.leave_out("train.log_every is a number of steps", "logging_steps")
    best, metric = asks(job.take("load_best_model_at_end")), job.take("metric_for_best_model")
    rises = job.take("greater_is_better")
    metric = str(metric or "loss").removeprefix("eval_")
    if best and held_out:
        mode = "max" if asks(not metric.endswith("loss") if rises is None else rises) else "min"
        job.put("train.keep_best", {"metric": metric, "mode": mode})
    elif best:
        job.leave_out("no rows are held out", "load_best_model_at_end")


def _rest(job: Job) -> None:
    """What is left: trackers, keys with one of ours, keys without a place, and those that nobody knows."""
    report, wandb, board = job.take("report_to"), job.take("wandb_project"), job.take("use_tensorboard")
    names = [str(name) for name in (report if isinstance(report, list) else [report]) if asks(name) and name != "all"]
    names += ["wandb"] * bool(wandb) + ["tensorboard"] * asks(board)
    own = {"project": wandb or job.take("project"), "name": job.take("run_name", "wandb_name")}
    own = {key: value for key, value in own.items() if value}
    if report == "all":
        job.leave_out("trackers are named, one by one", "report_to")
    if names:
        job.put("trackers", dict.fromkeys(names, own) if own else names)
    elif own:
        job.leave_out("no tracker is named", *[key for key in ("project", "run_name", "wandb_name") if key in job.given])
    for name, value in list(job.rest.items()):
        ours, asked = OURS.get(name), asks(value) and value != NEUTRAL.get(name)
        if SECRET.search(name) or name in LEFT_OUT:
            job.leave_out(LEFT_OUT.get(name, LEFT_OUT["token"]), *[name] * asked)
        elif name in REFUSED:
            if asked:
                job.refuse(name, REFUSED[name])
        elif ours in job.usual:
            job.put(str(ours), value)
        elif ours is not None:
            job.leave_out(f"it has no effect in {job.stage}", *[name] * asked)
        else:
            job.told[UNKNOWN].append(name)


def _differences(job: Job) -> None:
    truncated, full = str(job.values.get("data.overlong")).startswith("truncate"), job.values.get("lora", 0) is None
    for applies, words in (
        (truncated and job.tool == "LLaMA-Factory", "of rows that are too long the response is cut; there the prompt too"),
        (truncated, "rows that are cut count in data.max_lost, which ends a run of more than 5 % of them; there all are cut"),
        (full and job.values.get("train.weight_decay"), "train.weight_decay is of all weights; there not of biases and norms"),
        (job.stage == "kto", "KTO compares with the mean log-ratio of the whole batch; there of each device's part of it"),
        ("train.warmup" not in job.values, "train.warmup is 3 % of the steps; there too, but never more than 100"),
        (True, "the same seed gives another order of rows, and other first weights of an adapter"),
        (True, "train.save_every, eval_every, log_every and keep_checkpoints, where they are not written, are our own defaults"),
    ):
        if applies:
            job.tell("Done otherwise", words)
