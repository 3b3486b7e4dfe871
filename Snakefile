# Entry point for `snakemake` in the repository's root; the workflow is in workflow/Snakefile.
include: "workflow/Snakefile"


workflow.default_target = "all"  # an included file cannot set the default target
