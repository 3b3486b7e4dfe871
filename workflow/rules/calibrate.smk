# One pass of activations and Fisher gradients per model.


rule calibrate:
    """Histograms of a model's keys and values, shared by all calibrated schemes."""
    input:
        model=weights,
        data=manifest_of(STUDY.calibration.dataset),
    output:
        stats="<results>/calib/{model}/stats.safetensors",
        info="<results>/calib/{model}/stats.json",
    log:
        "<logs>/calibrate/{model}.log",
    benchmark:
        "<logs>/benchmarks/calibrate/{model}.jsonl"
    threads: threads_of("calibrate")
    resources:
        **resources_of("calibrate"),
    params:
        study=STUDY_FILE,
        digest=lambda wildcards: digests.collection_digest(STUDY, wildcards.model),
        version=digests.VERSIONS["statistics-file"],
        device=DEVICE_KIND,
        calibration=[],
    message:
        "Calibrating {wildcards.model}"
    shell:
        "OMP_NUM_THREADS={threads} python -m kvquant calibrate --study {params.study:q}"
        " --model {wildcards.model:q} --model-manifest {input.model:q} --data-manifest {input.data:q}"
        " {params.calibration:q} --device {params.device:q} --out {output.stats:q} > {log:q} 2>&1"


use rule calibrate as calibrate_otherwise with:
    input:
        model=weights,
        data=lambda wildcards: manifest_of(STUDY.calibrations[wildcards.calibration].dataset),
    output:
        stats="<results>/calib/{model}/{calibration}/stats.safetensors",
        info="<results>/calib/{model}/{calibration}/stats.json",
    log:
        "<logs>/calibrate/{model}/{calibration}.log",
    benchmark:
        "<logs>/benchmarks/calibrate/{model}/{calibration}.jsonl"
    params:
        study=STUDY_FILE,
        digest=lambda wildcards: digests.collection_digest(
            STUDY, wildcards.model, wildcards.calibration
        ),
        version=digests.VERSIONS["statistics-file"],
        device=DEVICE_KIND,
        calibration=lambda wildcards: ["--calibration", wildcards.calibration],
    message:
        "Calibrating {wildcards.model}: {wildcards.calibration}"
