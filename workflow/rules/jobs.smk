# Whole jobs (prompts and answers) of models with random weights, each cache at its best batch.


rule job_case:
    """A case of the study, alone on the device."""
    output:
        MEASURED("<results>/jobs/{device}/{job}.json"),
    log:
        "<logs>/jobs/{device}/{job}.log",
    threads: threads_of("job_case")
    resources:
        **resources_of("job_case"),
    params:
        study=STUDY_FILE,
        digest=lambda wildcards: digests.jobs_digest(STUDY, wildcards.job),
        device=DEVICE_KIND,
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Whole jobs, {wildcards.job}, on {wildcards.device}"
    shell:
        "python -m kvquant bench jobs --study {params.study:q} --cases {wildcards.job:q}"
        " --device-name {wildcards.device:q} --device {params.device:q} --out-dir {params.out:q}"
        " > {log:q} 2>&1"


rule all_jobs:
    """All cases of whole jobs of the study."""
    input:
        records("jobs"),
    message:
        "All whole jobs are complete"
