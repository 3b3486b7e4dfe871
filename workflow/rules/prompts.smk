# What tasks of generated answers ask; once for all schemes, on a CPU. A file's name tells all that it
# depends on, so that it is never out of date.


rule prompts:
    """The prompts of one task in a model's tokens, for every seed of the study."""
    input:
        model=ancient("<cache>/models/{model}/manifest.json"),
        data=text,
    output:
        "<cache>/prompts/{model}/{task}/{digest}.jsonl.gz",
    log:
        "<logs>/prompts/{model}/{task}-{digest}.log",
    threads: threads_of("prompts")
    priority: lambda w: 1 - place_in_line(STUDY, w.model, STUDY.baseline, w.task)
    resources:
        **resources_of("prompts"),
    params:
        study=STUDY_FILE,
        seeds=STUDY.seeds,
        data=option("--data-manifest", "data"),
    message:
        "Preparing the prompts of {wildcards.task} ({wildcards.model})"
    shell:
        "OMP_NUM_THREADS={threads} python -m kvquant prompts --study {params.study:q}"
        " --model {wildcards.model:q} --task {wildcards.task:q} --seeds {params.seeds:q}"
        " --model-manifest {input.model:q} {params.data:q} --out {output:q} > {log:q} 2>&1"


rule all_prompts:
    """All prompts of the study."""
    input:
        [
            f"<cache>/prompts/{model}/{task}/{digests.prompts_name(STUDY, model, task)}.jsonl.gz"
            for model in STUDY.models
            for task, spec in STUDY.tasks.items()
            if digests.asks_prompts(spec)
        ],
    message:
        "All prompts are prepared"
