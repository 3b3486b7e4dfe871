# Every record as a run of a tracker; nothing depends on it.
localrules:
    track,


rule track:
    """Every record as a run of Weights & Biases, offline, if the study has a section `tracking`."""
    input:
        rules.aggregate.input,
    output:
        "<logs>/tracking/runs.csv",
    log:
        "<logs>/tracking/track.log",
    params:
        study=STUDY_FILE,
        digest=digests.digest(STUDY),
        results=STUDY_FILE.parent,
        device=DEVICE,
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Logging all records to the tracker"
    shell:
        "python -m kvquant track --study {params.study:q} --results {params.results:q}"
        " --device-name {params.device:q} --out-dir {params.out:q} > {log:q} 2>&1"
