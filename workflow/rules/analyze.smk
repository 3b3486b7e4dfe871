# From records to tables.
COLLECTED = {
    "eval": ("2 Accuracy by task", "every seed"),
    "perf": ("3 Throughput", "every job"),
    "energy": ("4 Energy", "every job"),
}
if STUDY.append:
    COLLECTED["append"] = ("3 Throughput", "append: every size")
if STUDY.kernels:
    COLLECTED["kernels"] = ("3 Throughput", "kernels: every side")


localrules:
    aggregate,
    statistics,
    pareto,


rule aggregate:
    """Every record, verified against the study, in tidy tables."""
    input:
        rules.accuracy.input,
        rules.performance.input,
        rules.joules.input,
        rules.appends.input,
        rules.kernels.input,
    output:
        expand("<results>/tables/{table}.parquet", table=[*COLLECTED, "samples"]),
        "<results>/tables/samples.csv",
        [
            report(
                f"<results>/tables/{table}.csv",
                caption="../report/collected.rst",
                category=category,
                labels={"table": label},
            )
            for table, (category, label) in COLLECTED.items()
        ],
    log:
        "<logs>/analyze/aggregate.log",
    params:
        study=STUDY_FILE,
        digest=specs.digest(STUDY),
        results=STUDY_FILE.parent,
        device=DEVICE,
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Collecting all records"
    shell:
        "python -m kvquant aggregate --study {params.study:q} --results {params.results:q}"
        " --device-name {params.device:q} --out-dir {params.out:q} > {log:q} 2>&1"


rule statistics:
    """Paired tests of every scheme and task against the baseline."""
    input:
        "<results>/tables/eval.parquet",
        "<results>/tables/samples.parquet",
    output:
        "<results>/tables/tests.parquet",
        report(
            "<results>/tables/tests.csv",
            caption="../report/tests.rst",
            category="5 Statistics",
            labels={"table": "paired tests"},
        ),
    log:
        "<logs>/analyze/statistics.log",
    params:
        study=STUDY_FILE,
        spec=specs.digest(STUDY.statistics),
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
        report(
            "<results>/tables/pareto.csv",
            caption="../report/pareto_table.rst",
            category="1 Accuracy against cost",
            labels={"table": "all axes"},
        ),
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
