# Figures, LaTeX tables, numbers and claims; all read tables only. Which there are, with captions and
# sections, is registered in kvquant/analysis: figure_list.py, table_list.py, page_list.py, and the
# explorer's views in explorer/view_list.py.
from kvquant.analysis import figure_list, page_list, table_list
from kvquant.analysis.explorer import view_list
from kvquant.analysis.report import remove_if_cut
from kvquant.study.companions import companion_files, published_sums
from kvquant.runtime.run_end import claim_lines, product_lines, reproduction_lines, result_lines

FIGURES = {name: figure_list.FIGURES[name] for name in figure_list.shown(STUDY)}
PAGES = {name: page_list.PAGES[name] for name in page_list.shown(STUDY)}


localrules:
    plot,
    tables,
    claims,


rule plot:
    """One figure of the paper, as a vector PDF and as SVG for the report."""
    input:
        "<results>/tables/pareto.parquet",
        "<results>/tables/tests.parquet",
    output:
        "<paper>/figures/{figure}.pdf",
        report(
            "<paper>/figures/{figure}.svg",
            caption="../report/figure.rst",
            category=lambda wildcards: str(FIGURES[wildcards.figure].section),
            labels=lambda wildcards: {"figure": FIGURES[wildcards.figure].label},
        ),
    log:
        "<logs>/paper/{figure}.log",
    wildcard_constraints:
        figure="|".join(FIGURES) or "none",
    params:
        study=STUDY_FILE,
        tables=lambda wildcards, input: Path(input[0]).parent,
        caption=lambda wildcards: FIGURES[wildcards.figure].caption,  # read by figure.rst
    message:
        "Drawing {wildcards.figure}"
    shell:
        "python -m kvquant plot --study {params.study:q} --tables {params.tables:q}"
        " --figure {wildcards.figure:q} --out {output:q} > {log:q} 2>&1"


rule figures:
    """All figures."""
    input:
        expand("<paper>/figures/{figure}.pdf", figure=FIGURES),


rule tables:
    """The LaTeX tables, and every number of the text as a macro."""
    input:
        "<results>/tables/pareto.parquet",
        "<results>/tables/tests.parquet",
        "<results>/tables/claims.csv",
        # published records of other studies, on which claims rest as well
        others=lambda wildcards: companion_files(STUDY),
    output:
        tables=expand("<paper>/tables/{table}.tex", table=table_list.of_study(STUDY)),
        numbers="<paper>/numbers.tex",
        csv="<paper>/numbers.csv",
        floats="<paper>/floats.tex",
    log:
        "<logs>/paper/tables.log",
    params:
        study=STUDY_FILE,
        tables=lambda wildcards, input: Path(input[0]).parent,
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Writing LaTeX tables"
    shell:
        "python -m kvquant tables --study {params.study:q} --tables {params.tables:q}"
        " --out-dir {params.out:q} --numbers {output.numbers:q} > {log:q} 2>&1"


rule claims:
    """The claims of the paper: definition, measured value, verdict."""
    input:
        "<results>/tables/pareto.parquet",
        "<results>/tables/tests.parquet",
        others=lambda wildcards: companion_files(STUDY),
    output:
        csv="<results>/tables/claims.csv",
        tex="<paper>/tables/claims.tex",
    log:
        "<logs>/paper/claims.log",
    params:
        study=STUDY_FILE,
        tables=lambda wildcards, input: Path(input[0]).parent,
    message:
        "Judging the claims"
    shell:
        "python -m kvquant claims --study {params.study:q} --tables {params.tables:q}"
        " --out {output.csv:q} --tex {output.tex:q} > {log:q} 2>&1"


localrules:
    companion,
    manuscript,


rule companion:
    """Numbers, tables and figures of another published study, of which the paper speaks as well."""
    input:
        study=lambda wildcards: STUDY.companions[wildcards.companion],
        records=lambda wildcards: published_sums(STUDY.companions[wildcards.companion]),
    output:
        numbers="<paper>/{companion}/numbers.tex",
        csv="<paper>/{companion}/numbers.csv",
        tables=directory("<paper>/{companion}/tables"),
        figures=directory("<paper>/{companion}/figures"),
    log:
        "<logs>/paper/companion-{companion}.log",
    wildcard_constraints:
        companion="|".join(map(re.escape, STUDY.companions)) or "none",  # a key of `companions`
    params:
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Making what the paper shows of {wildcards.companion}"
    shell:
        "python -m kvquant companion --study {input.study:q} --out-dir {params.out:q} > {log:q} 2>&1"


rule manuscript:
    """A document of the paper as PDF: `main`, the article, or `study`, all tables and figures."""
    input:
        rules.figures.input,
        rules.tables.output,
        rules.claims.output,
        expand("<paper>/{companion}/numbers.tex", companion=STUDY.companions),
        multiext("paper/", "kvquant.sty", "twocolumns.sty", "store-drawing.tex", "references.bib"),
        tex="paper/{document}.tex",
    output:
        "<paper>/{document}.pdf",
    log:
        "<logs>/paper/{document}.log",
    wildcard_constraints:
        document="main|study",
    params:
        paper=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Compiling {wildcards.document}.tex"
    shell:
        "python -m kvquant manuscript --tex {input.tex:q} --paper {params.paper:q} --out {output:q}"
        " > {log:q} 2>&1"


localrules:
    html,


rule html:
    """The claims and tables as pages of the report, each with its caption."""
    input:
        "<results>/tables/pareto.parquet",
        "<results>/tables/tests.parquet",
        others=lambda wildcards: companion_files(STUDY),
    output:
        [
            report(
                f"<results>/report/{name}.html",
                # the job's other output, which Snakemake opens when it makes the report
                caption=str(Path.cwd() / STUDY_FILE.parent / f"report/{name}.rst"),
                category=str(page.section),
                labels={"table": page.label},
            )
            for name, page in PAGES.items()
        ],
        [f"<results>/report/{name}.rst" for name in PAGES],
    log:
        "<logs>/paper/html.log",
    params:
        study=STUDY_FILE,
        tables=lambda wildcards, input: Path(input[0]).parent,
    message:
        "Writing the tables of the report"
    shell:
        "python -m kvquant html --study {params.study:q} --tables {params.tables:q}"
        " --out {output:q} > {log:q} 2>&1"


localrules:
    explorer,


rule explorer:
    """All results in one page that sorts, filters and draws them, and needs no network."""
    input:
        "<results>/tables/pareto.parquet",
        "<results>/tables/tests.parquet",
        others=lambda wildcards: companion_files(STUDY),
    output:
        report(
            "<results>/explorer.html",
            caption="../report/figure.rst",
            category=str(view_list.SECTION),
            labels={"table": view_list.LABEL},
        ),
    log:
        "<logs>/paper/explorer.log",
    params:
        study=STUDY_FILE,
        tables=lambda wildcards, input: Path(input[0]).parent,
        caption=view_list.CAPTION,  # read by figure.rst
    message:
        "Writing the explorer"
    shell:
        "python -m kvquant explorer --study {params.study:q} --tables {params.tables:q}"
        " --out {output:q} > {log:q} 2>&1"


localrules:
    landing,


rule landing:
    """What a reader of the report sees first: claims, main figures, how to read them, where data is."""
    input:
        rules.aggregate.input,
        tables=[
            "<results>/tables/pareto.parquet",
            "<results>/tables/tests.parquet",
            "<results>/tables/claims.csv",
        ],
        figures=expand("<paper>/figures/{figure}.svg", figure=FIGURES),
        pages=expand("<results>/report/{page}.html", page=PAGES),
        explorer=rules.explorer.output,
    output:
        "<results>/report/landing.html",  # workflow.rst takes it from here
    log:
        "<logs>/paper/landing.log",
    params:
        study=STUDY_FILE,
        tables=lambda wildcards, input: Path(input.tables[0]).parent,
        results=STUDY_FILE.parent,
        device=DEVICE,
        command=made_by(),
    message:
        "Writing the report's landing page"
    shell:
        "python -m kvquant landing --study {params.study:q} --tables {params.tables:q}"
        " --results {params.results:q} --device-name {params.device:q} --figures {input.figures:q}"
        " --pages {input.pages:q} --explorer {input.explorer:q} --command {params.command:q}"
        " --out {output:q} > {log:q} 2>&1"


localrules:
    report_page,


remove_if_cut(STUDY_FILE.with_name("report.html"))


rule report_page:
    """The HTML report: figures, claims and tables, and how each was made."""
    input:
        rules.figures.input,
        rules.html.output,
        rules.explorer.output,
        rules.landing.output,
    output:
        "<results>/report.html",
    log:
        "<logs>/paper/report.log",
    params:
        study=STUDY_FILE,
        snakefile=workflow.main_snakefile,
    message:
        "Making the HTML report"
    shell:
        "python -m kvquant report --snakefile {params.snakefile:q} --study {params.study:q}"
        " --out {output:q} > {log:q} 2>&1"


onsuccess:
    compared = STUDY_FILE.parent / "tables" / "reproduce.csv"
    if STUDY.reproduce is not None and compared.exists():
        page = STUDY_FILE.with_name("reproduce.html")
        print(*reproduction_lines(compared, page), sep="\n", file=sys.stderr)
    claims_file = STUDY_FILE.parent / "tables" / "claims.csv"
    if claims_file.exists():
        figure = next(iter(rules.figures.input), None)
        products = {
            "report": STUDY_FILE.with_name("report.html"),
            "explorer": STUDY_FILE.with_name("explorer.html"),
            "figures": Path(str(figure)).parent if figure else STUDY_FILE.parent / "none",
            "tables": STUDY_FILE.parent / "tables",
        }
        lines = []
        if results := result_lines(claims_file.parent, STUDY.baseline):
            told = f"with the change from {STUDY.baseline} and the verdict of paired tests"
            lines += [f"Results of the study '{STUDY.study}', {told}:", *results]
        lines += [f"Claims of the study '{STUDY.study}':", *claim_lines(claims_file)]
        print("\n".join([*lines, "Products:", *product_lines(products)]), file=sys.stderr)
