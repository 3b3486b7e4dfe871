# From records to tables.
COLLECTED = ["eval", "perf", "energy"]
if STUDY.append:
    COLLECTED.append("append")
if STUDY.kernels:
    COLLECTED.append("kernels")
if STUDY.jobs:
    COLLECTED.append("jobs")
# Published records count; their hashes tell whether any has changed.
SUMS = [file for file in [Path(STUDY.published or "") / "SHA256SUMS"] if file.is_file()]


localrules:
    aggregate,
    statistics,
    pareto,


rule aggregate:
    """Every record, verified against the study, in tidy tables."""
    input:
        records("eval", "throughput", "energy", "append", "kernels", "jobs"),
        SUMS,
    output:
        expand("<results>/tables/{table}.parquet", table=[*COLLECTED, "samples"]),
        expand("<results>/tables/{table}.csv", table=[*COLLECTED, "samples"]),
    log:
        "<logs>/analyze/aggregate.log",
    params:
        study=STUDY_FILE,
        digest=digests.digest(STUDY),
        results=STUDY_FILE.parent,
        device=DEVICE,
        present=lambda wildcards: ["--present"] if in_part() else [],
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Collecting all records"
    shell:
        "python -m kvquant aggregate --study {params.study:q} --results {params.results:q}"
        " --device-name {params.device:q} {params.present:q} --out-dir {params.out:q} > {log:q} 2>&1"


rule statistics:
    """Paired tests of every scheme and task against the baseline."""
    input:
        "<results>/tables/eval.parquet",
        "<results>/tables/samples.parquet",
    output:
        "<results>/tables/tests.parquet",
        "<results>/tables/tests.csv",
    log:
        "<logs>/analyze/statistics.log",
    params:
        study=STUDY_FILE,
        spec=digests.digest(STUDY.statistics),
        tables=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Paired tests"
    shell:
        "python -m kvquant statistics --study {params.study:q} --tables {params.tables:q}"
        " --out-dir {params.tables:q} > {log:q} 2>&1"


rule pareto:
    """Accuracy, bits, speed and energy of every scheme side by side."""
    input:
        "<results>/tables/eval.parquet",
        "<results>/tables/perf.parquet",
        "<results>/tables/energy.parquet",
    output:
        "<results>/tables/pareto.parquet",
        "<results>/tables/pareto.csv",
    log:
        "<logs>/analyze/pareto.log",
    params:
        study=STUDY_FILE,
        tables=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Pareto front"
    shell:
        "python -m kvquant pareto --study {params.study:q} --tables {params.tables:q}"
        " --out-dir {params.tables:q} > {log:q} 2>&1"
