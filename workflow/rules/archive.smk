# The published records of the study with all that explains them, for a long-term repository.
localrules:
    archive,


rule archive:
    """Records, quantizers, study, environments and metadata in one file, the same bytes each time."""
    input:
        SUMS,
    output:
        f"<results>/kvquant-{STUDY.study}.zip",
    log:
        "<logs>/analyze/archive.log",
    params:
        study=STUDY_FILE,
        digest=digests.digest(STUDY),
        repository=Path(workflow.main_snakefile).parent,
    message:
        "Packing the published records"
    shell:
        "python -m kvquant archive --study {params.study:q} --repository {params.repository:q}"
        " --out {output:q} > {log:q} 2>&1"
