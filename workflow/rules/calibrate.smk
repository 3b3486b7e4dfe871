# One pass of activations and Fisher gradients a model.


rule calibrate:
    """Histograms of a model's keys and values, shared by all calibrated schemes."""
    input:
        model=weights,
        data=ancient(f"<cache>/data/{STUDY.calibration.dataset}/manifest.json"),
    output:
        stats="<results>/calib/{model}/stats.safetensors",
        info="<results>/calib/{model}/stats.json",
    log:
        "<logs>/calibrate/{model}.log",
    benchmark:
        "<logs>/benchmarks/calibrate/{model}.jsonl"
    threads: 2 if CPU_STUDY else 8
    resources:
        gpu=ask("calibrate", "gpus"),
        nodes=1,
        mem_mb=ask("calibrate", "mem_mb"),
        runtime=ask("calibrate", "minutes"),
    params:
        study=STUDY_FILE,
        digest=lambda wildcards: digests.calibration_digest(STUDY, wildcards.model),
        version=digests.VERSIONS["statistics-file"],
        device=DEVICE_KIND,
    message:
        "Calibrating {wildcards.model}"
    shell:
        "OMP_NUM_THREADS={threads} python -m kvquant calibrate --study {params.study:q}"
        " --model {wildcards.model:q} --model-manifest {input.model:q} --data-manifest {input.data:q}"
        " --device {params.device:q} --out {output.stats:q} > {log:q} 2>&1"
