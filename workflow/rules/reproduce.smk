# Published results, measured again and compared; only with the section `reproduce` of the study.
localrules:
    reproduce,


rule reproduce:
    """What was measured again against what is published: reproduced, differs, not enough evidence."""
    input:
        again,
    output:
        page="<results>/reproduce.html",
        table="<results>/tables/reproduce.parquet",
        twin="<results>/tables/reproduce.csv",
    log:
        "<logs>/analyze/reproduce.log",
    params:
        study=STUDY_FILE,
        digest=digests.digest(STUDY),
        results=STUDY_FILE.parent,
        tables=lambda wildcards, output: Path(output.table).parent,
    message:
        "Comparing with the published results"
    shell:
        "python -m kvquant reproduce --study {params.study:q} --results {params.results:q}"
        " --out {output.page:q} --tables {params.tables:q} > {log:q} 2>&1"
