# Kernels against copies, fp16 and peers; random data and weights. One job, so that the cases of a
# shape share its model. Its outputs are not write-protected, which would refuse a further case; a
# copy of every record stays in <results>/resume/kernels, so that no finished case is measured twice.
KERNEL_RECORDS = [f"<results>/kernels/{DEVICE}/{case}.json" for case in STUDY.kernel_cases()]


rule kernel_cases:
    """Every case of the study, alone on the device."""
    output:
        KERNEL_RECORDS,
    log:
        f"<logs>/kernels/{DEVICE}.log",
    threads: ALONE
    resources:
        gpu=ask("kernel_cases", "gpus"),
        nodes=1,
        mem_mb=ask("kernel_cases", "mem_mb"),
        runtime=ask("kernel_cases", "minutes"),
    params:
        study=STUDY_FILE,
        digests=[specs.kernels_digest(STUDY, case) for case in STUDY.kernel_cases()],
        name=DEVICE,
        device=DEVICE_KIND,
        out=lambda wildcards, output: Path(output[0]).parent,
        resume=STUDY_FILE.parent / "resume/kernels",
    message:
        "Kernels on {params.name}"
    shell:
        "python -m kvquant bench kernels --study {params.study} --device-name {params.name}"
        " --device {params.device} --out-dir {params.out} --resume-dir {params.resume}"
        " > {log} 2>&1"


rule kernels:
    """All kernel measurements of the study."""
    input:
        KERNEL_RECORDS,
    message:
        "All kernel measurements are complete"
