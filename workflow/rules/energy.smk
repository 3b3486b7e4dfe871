# Energy: trials of seconds, interleaved with the baseline, alone on the device.


rule energy:
    """Energy of one workload under one scheme and under the unquantized cache."""
    input:
        model=weights,
        data=timed_text,
        quantizer=quantizer,
    output:
        MEASURED("<results>/energy/{device}/{model}/{scheme}/{workload}/rep{rep}.json"),
    log:
        "<logs>/energy/{device}/{model}/{scheme}/{workload}/rep{rep}.log",
    threads: threads_of("energy")
    resources:
        **resources_of("energy"),
    params:
        study=STUDY_FILE,
        digest=lambda wildcards: digests.energy_digest(
            STUDY, wildcards.model, wildcards.scheme, wildcards.workload
        ),
        device=DEVICE_KIND,
        quantizer=option("--quantizer", "quantizer"),
    message:
        "Energy of {wildcards.scheme} against the baseline: {wildcards.workload} on {wildcards.device}"
    shell:
        "python -m kvquant energy --study {params.study:q} --model {wildcards.model:q}"
        " --scheme {wildcards.scheme:q} --workload {wildcards.workload:q} --rep {wildcards.rep:q}"
        " --device-name {wildcards.device:q} --device {params.device:q}"
        " --model-manifest {input.model:q} --data-manifest {input.data:q} {params.quantizer:q}"
        " --out {output:q} > {log:q} 2>&1"


rule all_energy:
    """All energy measurements of the study."""
    input:
        records("energy"),
    message:
        "All energy measurements are complete"
