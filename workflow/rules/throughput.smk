# Latency and memory: each job interleaves its scheme with the baseline, alone on its device.


rule throughput:
    """One workload under one scheme and under the unquantized cache."""
    input:
        model=weights,
        data=timed_text,
        quantizer=quantizer,
    output:
        MEASURED("<results>/perf/{device}/{model}/{scheme}/{workload}/rep{rep}.json"),
    log:
        "<logs>/throughput/{device}/{model}/{scheme}/{workload}/rep{rep}.log",
    threads: threads_of("throughput")
    resources:
        **resources_of("throughput"),
    params:
        study=STUDY_FILE,
        digest=lambda wildcards: digests.perf_digest(
            STUDY, wildcards.model, wildcards.scheme, wildcards.workload
        ),
        device=DEVICE_KIND,
        quantizer=option("--quantizer", "quantizer"),
    message:
        "Timing {wildcards.scheme} against the baseline: {wildcards.workload} on {wildcards.device}"
    shell:
        "python -m kvquant throughput --study {params.study:q} --model {wildcards.model:q}"
        " --scheme {wildcards.scheme:q} --workload {wildcards.workload:q} --rep {wildcards.rep:q}"
        " --device-name {wildcards.device:q} --device {params.device:q}"
        " --model-manifest {input.model:q} --data-manifest {input.data:q} {params.quantizer:q}"
        " --out {output:q} > {log:q} 2>&1"


rule all_throughput:
    """All throughput measurements of the study."""
    input:
        records("throughput"),
    message:
        "All throughput measurements are complete"
