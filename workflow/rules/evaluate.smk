# Accuracy. A job takes one (model, scheme, task) through all seeds with the model loaded once;
# finished seeds survive a kill in <results>/resume. Where a study says so, a job takes all tasks.

# Snakemake tries each output of a rule for each file that it looks for, so that a rule of another
# study than this one has few.
TOGETHER = list(STUDY.tasks) if STUDY.evaluation.tasks_per_job == "all" else ["none"]


rule evaluate:
    """Accuracy of one scheme on one task, for every seed of the study."""
    input:
        model=weights,
        prompts=asked,
        data=read_text,
        quantizer=quantizer,
    output:
        MEASURED(
            expand(
                "<results>/eval/{{model}}/{{scheme}}/{{task}}/seed{seed}/{file}",
                seed=SEEDS,
                file=["run.json", "samples.jsonl"],
            )
        ),
    log:
        "<logs>/evaluate/{model}/{scheme}/{task}.log",
    wildcard_constraints:
        task=TASKS if STUDY.evaluation.tasks_per_job == "one" else "none",  # a key of `tasks`
    benchmark:
        "<logs>/benchmarks/evaluate/{model}/{scheme}/{task}.jsonl"
    threads: threads_of("evaluate")
    priority: lambda wildcards: -place_in_line(STUDY, **wildcards)
    resources:
        **resources_of("evaluate"),
    params:
        study=STUDY_FILE,
        digests=eval_digests,
        seeds=SEEDS,
        device=DEVICE_KIND,
        out=lambda wildcards, output: Path(output[0]).parents[1],
        resume=STUDY_FILE.parent / "resume",
        prompts=option("--prompts", "prompts"),
        data=option("--data-manifest", "data"),
        quantizer=option("--quantizer", "quantizer"),
    message:
        "Evaluating {wildcards.scheme} on {wildcards.task} ({wildcards.model})"
    shell:
        "OMP_NUM_THREADS={threads} python -m kvquant evaluate --study {params.study:q}"
        " --model {wildcards.model:q} --scheme {wildcards.scheme:q} --task {wildcards.task:q}"
        " --seeds {params.seeds:q} --model-manifest {input.model:q} {params.prompts:q} {params.data:q}"
        " {params.quantizer:q} --device {params.device:q} --out-dir {params.out:q} --resume-dir {params.resume:q}"
        " > {log:q} 2>&1"


rule evaluate_all:
    """Accuracy of one scheme on all tasks, for every seed, if `evaluation.tasks_per_job` is `all`."""
    input:
        model=weights,
        prompts=all_asked,
        data=all_read,
        quantizer=quantizer,
    output:
        MEASURED(
            expand(
                "<results>/eval/{{model}}/{{scheme}}/{task}/seed{seed}/{file}",
                task=TOGETHER,
                seed=SEEDS,
                file=["run.json", "samples.jsonl"],
            )
        ),
    log:
        "<logs>/evaluate/{model}/{scheme}.log",
    wildcard_constraints:
        scheme=SCHEMES if STUDY.evaluation.tasks_per_job == "all" else "none",  # a key of `schemes`
    benchmark:
        "<logs>/benchmarks/evaluate/{model}/{scheme}.jsonl"
    threads: threads_of("evaluate")
    priority: lambda wildcards: -place_in_line(STUDY, **wildcards)
    resources:
        **resources_of("evaluate"),
    params:
        study=STUDY_FILE,
        digests=all_eval_digests,
        tasks=list(STUDY.tasks),
        seeds=SEEDS,
        device=DEVICE_KIND,
        out=lambda wildcards, output: list(dict.fromkeys(Path(o).parents[1] for o in output)),
        resume=STUDY_FILE.parent / "resume",
        prompts=options("--prompts", "prompts"),
        data=options("--data-manifest", "data"),
        quantizer=option("--quantizer", "quantizer"),
    message:
        "Evaluating {wildcards.scheme} on all tasks ({wildcards.model})"
    shell:
        "OMP_NUM_THREADS={threads} python -m kvquant evaluate --study {params.study:q}"
        " --model {wildcards.model:q} --scheme {wildcards.scheme:q} --task {params.tasks:q}"
        " --seeds {params.seeds:q} --model-manifest {input.model:q} {params.prompts:q} {params.data:q}"
        " {params.quantizer:q} --device {params.device:q} --out-dir {params.out:q} --resume-dir {params.resume:q}"
        " > {log:q} 2>&1"


rule all_accuracy:
    """All evaluations of the study."""
    input:
        records("eval"),
    message:
        "All evaluations are complete"
