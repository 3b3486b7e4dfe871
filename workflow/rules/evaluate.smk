# Accuracy. A job takes one (model, scheme, task) through all seeds with the model loaded once;
# finished seeds survive a kill in <results>/resume.


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
                seed=STUDY.seeds,
                file=["run.json", "samples.jsonl"],
            )
        ),
    log:
        "<logs>/evaluate/{model}/{scheme}/{task}.log",
    benchmark:
        "<logs>/benchmarks/evaluate/{model}/{scheme}/{task}.jsonl"
    threads: 1 if CPU_STUDY else 4
    priority: lambda wildcards: -place_in_line(STUDY, **wildcards)
    resources:
        gpu=ask("evaluate", "gpus"),
        nodes=1,
        mem_mb=ask("evaluate", "mem_mb"),
        runtime=ask("evaluate", "minutes"),
    params:
        study=STUDY_FILE,
        digests=eval_digests,
        seeds=STUDY.seeds,
        device=DEVICE_KIND,
        out=lambda wildcards, output: Path(output[0]).parents[1],
        resume=STUDY_FILE.parent / "resume",
        prompts=lambda wildcards, input: option("--prompts", input.prompts),
        data=lambda wildcards, input: option("--data-manifest", input.data),
        quantizer=lambda wildcards, input: option("--quantizer", input.quantizer),
    message:
        "Evaluating {wildcards.scheme} on {wildcards.task} ({wildcards.model})"
    shell:
        "OMP_NUM_THREADS={threads} python -m kvquant evaluate --study {params.study:q}"
        " --model {wildcards.model:q} --scheme {wildcards.scheme:q} --task {wildcards.task:q}"
        " --seeds {params.seeds:q} --model-manifest {input.model:q} {params.prompts:q} {params.data:q}"
        " {params.quantizer:q} --device {params.device:q} --out-dir {params.out:q} --resume-dir {params.resume:q}"
        " > {log:q} 2>&1"


rule accuracy:
    """All evaluations of the study."""
    input:
        [
            f"<results>/eval/{model}/{scheme}/{task}/seed{seed}/run.json"
            for model in STUDY.models
            for scheme, task in STUDY.eval_cells()
            for seed in STUDY.seeds
        ],
    message:
        "All evaluations are complete"
