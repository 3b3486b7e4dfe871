# Kernels against copies, fp16 and peers; random data and weights.


rule kernel_case:
    """A case of the study, alone on the device."""
    output:
        MEASURED("<results>/kernels/{device}/{case}.json"),
    log:
        "<logs>/kernels/{device}/{case}.log",
    threads: threads_of("kernel_case")
    resources:
        **resources_of("kernel_case"),
    params:
        study=STUDY_FILE,
        digest=lambda wildcards: digests.kernels_digest(STUDY, wildcards.case),
        device=DEVICE_KIND,
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Kernels, {wildcards.case}, on {wildcards.device}"
    shell:
        "python -m kvquant bench kernels --study {params.study:q} --cases {wildcards.case:q}"
        " --device-name {wildcards.device:q} --device {params.device:q} --out-dir {params.out:q}"
        " > {log:q} 2>&1"


rule all_kernels:
    """All kernel measurements of the study."""
    input:
        records("kernels"),
    message:
        "All kernel measurements are complete"
