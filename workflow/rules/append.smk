# What an appended token costs as the cache grows; one layer, random data, no model.


rule append_cost:
    """Every series at every size, in turns, alone on the device."""
    output:
        MEASURED("<results>/append/{device}/rep{rep}.json"),
    log:
        "<logs>/append/{device}/rep{rep}.log",
    threads: threads_of("append_cost")
    resources:
        **resources_of("append_cost"),
    params:
        study=STUDY_FILE,
        digest=lambda wildcards: digests.append_digest(STUDY),
        device=DEVICE_KIND,
    message:
        "Appending to a growing cache on {wildcards.device}"
    shell:
        "python -m kvquant bench append --study {params.study:q} --rep {wildcards.rep:q}"
        " --device-name {wildcards.device:q} --device {params.device:q} --out {output:q} > {log:q} 2>&1"


rule all_append:
    """All append measurements of the study."""
    input:
        records("append"),
    message:
        "All append measurements are complete"
