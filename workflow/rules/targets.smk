# Aggregate targets: `all_STAGE` for every stage, and the short names that were documented first.


use rule all_prompts as questions


use rule all_accuracy as accuracy


use rule all_throughput as performance


use rule all_energy as joules


use rule all_append as appends


use rule all_kernels as kernels


use rule all_jobs as jobs


use rule figures as all_figures


rule all_tables:
    """The LaTeX tables, and every number of the text as a macro."""
    input:
        rules.tables.output,


rule all_claims:
    """The claims of the paper, as a table and in LaTeX."""
    input:
        rules.claims.output,


rule all_pages:
    """The claims and tables as pages of the report."""
    input:
        rules.html.output,


rule all_explorer:
    """The explorer of all results."""
    input:
        rules.explorer.output,


rule all_paper:
    """The article as PDF; needs LaTeX."""
    input:
        "<paper>/main.pdf",


rule all_report:
    """The HTML report of the study."""
    input:
        rules.report_page.output,
