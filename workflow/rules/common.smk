# The validated study, and the few functions that say what a rule's wildcards need.
import functools
import json
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from kvquant.analysis.landing.command import study_command
from kvquant.fetch.datasets import refuse_other_texts
from kvquant.study import datasets, digests
from kvquant.study.config import parse_study
from kvquant.errors import UserError
from kvquant.formats.files import replace, sweep_tree
from kvquant.study.grid import grid_lines, place_in_line, request, threads
from kvquant.runtime.own_python import find_own_python
from kvquant.runtime.provenance import device_name
from kvquant.runtime.run_lock import hold, refuse_files
from kvquant.runtime.slurm import prepare
from kvquant.study.overlay import read_studies
from kvquant.study.own_texts import edited_since, is_read, refuse_edited
from kvquant.study.places import calibration_place
from kvquant.study.plan import make_plan, obstacle
from kvquant.study.published_quantizers import published_quantizer
from kvquant.study.measured_again import NEEDED, measured_again, measured_seeds, quantizers_from

find_own_python()


def config_files():
    """The files that make the study, the workflow's own first.

    They are read here once more: Snakemake knows no `base`, and of a key that occurs twice it takes
    the last.
    """
    settings = workflow.config_settings
    if settings.replace_workflow_config and settings.overwrite_config:
        return settings.configfiles
    own = [file for file in workflow.configfiles if file not in settings.configfiles]
    return [*own, *settings.configfiles]


def made_by():
    """The command of this study, as the report shows it."""
    settings = workflow.config_settings
    files = list(settings.configfiles or [])
    return study_command(files, settings.replace_workflow_config, settings.config or {})


try:
    STUDY = measured_again(
        parse_study(read_studies(config_files(), workflow.config_settings.config))
    )
    if STUDY.data_dir is not None and not Path(STUDY.data_dir).is_dir():
        raise UserError(f"data_dir: no such folder: {STUDY.data_dir}")
    # A study on the processor has its name also where there is a GPU.
    PLANNED = device_name() if STUDY.gpus else "cpu"
    DEVICE = PLANNED if STUDY.device == "auto" else STUDY.device
    STUDY_FILE = Path(STUDY.pathvars.get("results", "results/h100")) / "study.json"
    refuse_files({"results": STUDY_FILE.parent, **STUDY.pathvars})
    refuse_edited(STUDY.datasets)
    for line in edited_since(STUDY.datasets, STUDY_FILE) if workflow.is_main_process else []:
        print(line, file=sys.stderr)
    if workflow.is_main_process:
        refuse_other_texts(STUDY, Path(STUDY.pathvars.get("cache", "resources")))
    PLAN = make_plan(STUDY, DEVICE, STUDY_FILE.parent)
except UserError as error:
    raise WorkflowError(str(error))

DEVICE_KIND = "cuda" if STUDY.gpus else "cpu"
SEEDS = measured_seeds(STUDY)
WORKLOADS = {*STUDY.throughput.workloads, *STUDY.energy.workloads}
SCHEMES = "|".join(map(re.escape, STUDY.schemes))
TASKS = "|".join(map(re.escape, STUDY.tasks))
MEASURED = protected if STUDY.protect else (lambda files: files)


pathvars:  # also those that the study has from its base
    **STUDY.pathvars,


# Those of the config files would come first, as they are spelled there.
workflow.pathvars.items.update(STUDY.pathvars)


wildcard_constraints:
    model="|".join(map(re.escape, STUDY.models)),  # a key of `models`
    scheme=SCHEMES,  # a key of `schemes`
    task=TASKS,  # a key of `tasks`
    workload="|".join(WORKLOADS) or "none",  # a key of `workloads`
    case="|".join(map(re.escape, STUDY.kernel_cases())) or "none",  # a key of `kernels.cases`
    job="|".join(map(re.escape, STUDY.job_cases())) or "none",  # a key of `jobs.cases`
    calibration="|".join(map(re.escape, STUDY.calibrations)) or "none",  # a key of `calibrations`
    dataset=datasets.wildcard_pattern(),  # a text that can be fetched
    own="|".join(map(re.escape, STUDY.datasets)) or "none",  # a key of `datasets`
    device=re.escape(DEVICE),  # the key `device`, or the GPU's own name
    digest=r"[0-9a-f]{16}",  # a digest of model, task and seeds, which names the prompts
    seed=r"\d+",  # an entry of `seeds`
    rep=r"\d+",  # the repetition of an independent job, from 0


def submits():
    """Whether jobs run on other machines. A dry run hides its executor, but not its number of jobs."""
    if workflow.dryrun:
        return workflow.resource_settings.nodes is not None
    return workflow.non_local_exec


@functools.cache
def left_out():
    """Why missing results are left out; empty where they are measured. Asked for while jobs are
    planned, as the executor is not known before."""
    reason = obstacle(STUDY, PLANNED, submits())
    compared = STUDY.published is not None or STUDY.reproduce is not None
    if compared and workflow.is_main_process:
        print(PLAN.line(reason), file=sys.stderr)
    return reason


def in_part():
    """Whether tables show a part of the study: what can be measured here, or is asked for again."""
    return STUDY.reproduce is not None or bool(PLAN.absent and left_out())


def records(*stages):
    """An input: the records of these stages that are in this results folder, or will be."""

    def files(wildcards):
        places = [place for stage in stages for place in PLAN.files(stage, left_out())]
        return [f"<results>/{place}" for place in places]

    return files


def again(wildcards):
    """An input: the records of what the section `reproduce` asks for, measured here."""
    if STUDY.reproduce is None:
        raise WorkflowError(NEEDED)
    if PLAN.absent and left_out():
        raise WorkflowError(f"reproduce: {len(PLAN.absent)} results are missing: {left_out()}")
    return [f"<results>/{cell.place}" for cell in [*PLAN.finished, *PLAN.absent]]


def eval_digests(wildcards):
    """What the results of all seeds depend on: a change reruns this job and no other."""
    return [
        digests.eval_digest(STUDY, wildcards.model, wildcards.scheme, wildcards.task, seed)
        for seed in SEEDS
    ]


def all_eval_digests(wildcards):
    """What the results of all tasks and seeds depend on."""
    model, scheme = wildcards.model, wildcards.scheme
    return [
        digests.eval_digest(STUDY, model, scheme, task, seed)
        for task in STUDY.tasks
        for seed in SEEDS
    ]


def option(flag, name):
    """A parameter: an option with the input `name` as words, or none where a job lacks that input."""

    def words(wildcards, input):
        file = getattr(input, name)
        return [flag, str(file)] if file else []

    return words


def options(flag, name):
    """A parameter: an option with all files of the input `name`, or none where a job lacks them."""

    def words(wildcards, input):
        files = [str(file) for file in getattr(input, name)]
        return [flag, *files] if files else []

    return words


def resources_of(rule):
    """The resources of a rule: what one of its jobs asks of a scheduler, by attempt."""

    def ask(field):
        def resource(wildcards, attempt):
            task, case = wildcards.get("task"), wildcards.get("job")
            asked = request(STUDY, rule, wildcards.get("model"), task, attempt, case)
            return getattr(asked, field)

        return resource

    return {"gpu": ask("gpus"), "nodes": 1, "mem_mb": ask("mem_mb"), "runtime": ask("minutes")}


def threads_of(rule):
    """The CPU threads of a rule's jobs. `workflow.cores` fails where jobs run on a cluster."""
    return threads(STUDY, rule, workflow.resource_settings.cores or 2)


onstart:
    # Jobs read the study from this file, so that a printed command can be pasted.
    try:
        hold(STUDY_FILE.parent)
        if workflow.executor_plugin.name == "slurm":
            prepare(Path.cwd())
        for folder in (STUDY_FILE.parent, STUDY.pathvars.get("cache", "resources")):
            sweep_tree(folder)  # what killed jobs left
        # At once, as jobs of a killed run may still start on a cluster.
        replace(STUDY_FILE, STUDY.model_dump_json(indent=2) + "\n")
    except UserError as error:
        raise WorkflowError(str(error))
    if (
        PLAN.absent and STUDY.reproduce is None and not left_out()
    ):  # there is something to measure
        print(*grid_lines(STUDY), sep="\n", file=sys.stderr)
