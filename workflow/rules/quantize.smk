# From statistics to codebooks.


rule quantize:
    """The quantizer of one calibrated scheme."""
    input:
        stats=lambda wildcards: calibrated("stats.safetensors", wildcards),
        info=lambda wildcards: calibrated("stats.json", wildcards),
    output:
        manifest="<results>/models/{model}/{scheme}/quantizer.json",
        tensors="<results>/models/{model}/{scheme}/quantizer.safetensors",
    log:
        "<logs>/quantize/{model}/{scheme}.log",
    threads: threads_of("quantize")
    resources:
        **resources_of("quantize"),
    params:
        study=STUDY_FILE,
        digest=lambda wildcards: digests.quantizer_digest(STUDY, wildcards.model, wildcards.scheme),
        version=digests.VERSIONS["quantizer-file"],
    message:
        "Building quantizer {wildcards.scheme} of {wildcards.model}"
    shell:
        "OMP_NUM_THREADS={threads} python -m kvquant quantize --study {params.study:q}"
        " --model {wildcards.model:q} --scheme {wildcards.scheme:q} --stats {input.stats:q}"
        " --out {output.manifest:q} > {log:q} 2>&1"
