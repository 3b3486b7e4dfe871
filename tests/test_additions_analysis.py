"""A suite, task family, data set, figure, table and claim, each added by its documented steps.

The additions are made in a temporary copy of the repository: a file or a function each, and one
registration. Nothing else of the copy is edited. The copy then passes what every suite, data set,
figure, table and claim of this repository has to pass. CONTRIBUTING.md describes the same steps.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvquant.analysis.figure_list import FIGURES
from tests.support.additions import RepositoryCopy

SUITE = """
    from kvquant.evaluation.base import Source, encode
    from kvquant.evaluation.generated import Answered, Prompt, Rules, SeedPrompts


    def prepare_echo(source, spec, seed):
        text = source.text("all")[seed : seed + spec.length]
        prompts = [Prompt(encode(source.tokenizer, text, special=True), {})] * spec.samples
        return SeedPrompts(prompts, max_new_tokens=4)


    def echo_rules(spec, tokenizer):
        return Rules(lambda prompt, answer: float(bool(answer)), metric="echo_rate")


    ECHO = Answered(prepare_echo, echo_rules)
"""
SUITE_REGISTRATION = """
    @suite(
        label="Echo",
        implementation="kvquant.evaluation.echo:ECHO",
        metric="echo_rate",
        margin=Margin(relative=0.1),
        caption="Echoes by prompt.",
    )
    class EchoTask(AnsweredTask):
        \"\"\"Answers that repeat the prompt.\"\"\"

        suite: Literal["echo"] = Field(description="suite of the task")
        length: int = Field(64, ge=8, description="characters of the prompt")
        samples: int = Field(4, ge=1, description="prompts per seed")

        def dataset_name(self) -> str:
            return "proverbs"


"""
FAMILY_REGISTRATION = """
    TaskFamily("longbench", "chinese", "Chinese", _rows("dureader", "vcsum")),
"""
DATASET = """
    from kvquant.fetch.datasets import Text


    def proverbs(folder, data_dir):
        return Text("A stitch in time saves nine. " * 40, "pypi", "written by hand")
"""
DATASET_REGISTRATION = """
    DataSet("proverbs", "kvquant.fetch.proverbs:proverbs", "written by hand", test_only=True),
"""
FIGURE = """
    from kvquant.analysis.figures.style import plt
    from kvquant.analysis.tables import read_table


    def draw(study, tables):
        table = read_table(tables, "pareto")
        figure, axis = plt.subplots()
        axis.barh(table.scheme, table.bits_per_element)
        return figure
"""
CAPTION = "Bits per element of every scheme; a * marks nothing, and 100 % of A_B is A|B."
FIGURE_REGISTRATION = f"""
    Figure(
        name="bits",
        section=Section.ACCURACY_AGAINST_COST,
        label="bits of every scheme",
        caption="{CAPTION}",
        condition=lambda study: len(study.schemes) > 1,
        reason="has one scheme",
        draw="kvquant.analysis.figures.bits:draw",
    ),
"""
TABLE = """
    from kvquant.analysis.booktabs import booktabs


    def seeds(tables):
        counts = tables.evaluations.groupby("task", sort=False)["seed"].nunique()
        return booktabs(counts.reset_index(), "lr")
"""
TABLE_REGISTRATION = """
    LatexTable(
        name="seeds",
        section=Section.ACCURACY_BY_TASK,
        caption="Seeds of each task.",
        build="kvquant.analysis.seed_table:seeds",
        condition=lambda tables: len(tables.study.seeds) > 1,
        reason="This study has one seed.",
    ),
"""
CLAIM = """
    from kvquant.analysis.evidence import Outcome, not_measured


    def echoes(tables):
        rows = tables.headline_tests("echo")
        if not len(rows):
            return not_measured("no echo task")
        mean = float(rows["mean"].mean())
        return Outcome(f"{mean:.1f} %", mean >= 0, len(rows), "tasks", value=mean)
"""
CLAIM_REGISTRATION = """
    Claim(
        name="echoes-heard",
        text="Echoes are heard",
        quantity="share of echoes heard",
        baseline="silence",
        protocol="every echo task",
        bar=Bar(0.0, at_most=False),
        least="1 task",
        judge="kvquant.analysis.echo_claim:echoes",
    ),
"""
# What is added: its new file with text; then the file of registrations, the line behind the new
# registration, and the registration.
ADDITIONS = {
    "suite": (
        ("kvquant/evaluation/echo.py", SUITE),
        ("kvquant/study/tasks.py", "# The tasks that a study may list are", SUITE_REGISTRATION),
    ),
    "task family": (
        None,
        (
            "kvquant/study/task_families.py",
            "# A new family goes above",
            FAMILY_REGISTRATION,
        ),
    ),
    "data set": (
        ("kvquant/fetch/proverbs.py", DATASET),
        ("kvquant/study/datasets.py", "# One data set per task of", DATASET_REGISTRATION),
    ),
    "figure": (
        ("kvquant/analysis/figures/bits.py", FIGURE),
        ("kvquant/analysis/figure_list.py", ")  # end of the list", FIGURE_REGISTRATION),
    ),
    "table": (
        ("kvquant/analysis/seed_table.py", TABLE),
        ("kvquant/analysis/table_list.py", ")  # end of the list", TABLE_REGISTRATION),
    ),
    "claim": (
        ("kvquant/analysis/echo_claim.py", CLAIM),
        ("kvquant/analysis/claim_list.py", ")  # end of the list", CLAIM_REGISTRATION),
    ),
}
# A study of all that was added, its plausible records and tables, in the copy's folder `added`.
STUDY = """
import json
from pathlib import Path
from tests.support.studies import study_of, write_study

tasks = {
    "ppl": {"suite": "perplexity", "dataset": "proverbs", "window": 64, "windows": 3},
    "echo-short": {"suite": "echo", "length": 200, "samples": 4},
    "echo-long": {"suite": "echo", "length": 300, "samples": 4},
    "dureader": {"suite": "longbench", "task": "dureader", "length": 400, "samples": 3},
}
folders = {name: f"added/{name}" for name in ("results", "paper", "logs", "cache")}
study = study_of(tasks=tasks, statistics={"margins": {"echo": 5.0, "perplexity": 1.0,
                 "longbench": 5.0}}, pathvars=folders, device="gpu")
write_study(study, Path("added/results"))
"""

# The verbs of analysis, run over the study in the copy, all in one process.
VERBS = """
from kvquant.cli import main

study, tables = ["--study", "added/results/study.json"], "added/results/tables"
read = [*study, "--tables", tables]
for words in (
    ["aggregate", *study, "--results", "added/results", "--device-name", "gpu",
     "--out-dir", tables],
    ["statistics", *read, "--out-dir", tables],
    ["pareto", *read, "--out-dir", tables],
    ["claims", *read, "--out", f"{tables}/claims.csv", "--tex", "added/paper/tables/claims.tex"],
    ["tables", *read, "--out-dir", "added/paper/tables", "--numbers", "added/paper/numbers.tex"],
    ["fetch-data", *study, "--dataset", "proverbs", "--out", "added/fetched/manifest.json"],
    ["schema", "--out", "added/schema.json"],
):
    assert main(words) == 0, words
"""
PROMPTS = """
from types import SimpleNamespace
from kvquant.evaluation.base import Source
from kvquant.evaluation.registry import answered
from kvquant.study.tasks import EchoTask

tokenizer = lambda text, **more: SimpleNamespace(input_ids=[*range(len(text))])
source = Source(tokenizer, 512, "echo", lambda part: "abcdefgh" * 20)
made = answered("echo").prepare(source, EchoTask(suite="echo", length=9), 0)
Path("added/prompts.txt").write_text(str([len(prompt.tokens) for prompt in made.prompts]))
"""
CONFIG = ("--configfile", "added/results/study.json", "--replace-workflow-config")


@pytest.fixture(scope="module")
def copy(root: Path, tmp_path_factory: pytest.TempPathFactory) -> RepositoryCopy:
    """A copy with all additions, and the verbs of analysis run over a study of them."""
    made = RepositoryCopy(root, tmp_path_factory.mktemp("additions") / "copy")
    for file, registration in ADDITIONS.values():
        if file is not None:
            made.add_file(*file)
        path, marker, text = registration
        if marker.startswith(")"):
            text = "\n".join(f"    {line}" for line in text.strip("\n").splitlines())
        made.insert_before(path, marker, text)
    made.python("-c", STUDY + VERBS + PROMPTS)
    return made


def text(copy: RepositoryCopy, path: str) -> str:
    """The text of a file in the folder `added`."""
    return (copy.root / "added" / path).read_text(encoding="utf-8")


def test_each_is_a_file_and_one_registration(copy: RepositoryCopy) -> None:
    """No other file is edited: the registrations' files are those of the documented steps."""
    files = {file[0] for file, _ in ADDITIONS.values() if file is not None}
    registrations = {registration[0] for _, registration in ADDITIONS.values()}
    assert set(copy.edits) == files | registrations
    assert all(copy.edits[path] <= 20 for path in registrations)


def test_the_suite_and_the_family_are_summarised(copy: RepositoryCopy) -> None:
    assert "short" in text(copy, "paper/tables/echo.tex")
    assert "mean" in text(copy, "paper/tables/echo.tex")
    assert "Echo" in text(copy, "paper/tables/summary.tex")
    assert "LongBench Chinese" in text(copy, "paper/tables/families.tex")
    tests = text(copy, "results/tables/tests.csv")
    assert "tiny / suite / echo" in tests and "echo_rate" in tests
    assert ".echo-change}" in text(copy, "paper/numbers.tex")
    assert '"echo": "#/$defs/EchoTask"' in text(copy, "schema.json")


def test_the_suite_prepares_its_prompts(copy: RepositoryCopy) -> None:
    assert text(copy, "prompts.txt") == "[9, 9, 9, 9]"


def test_the_data_set_is_fetched(copy: RepositoryCopy) -> None:
    assert text(copy, "fetched/text.txt").startswith("A stitch")


def test_the_table_and_the_claim_are_written(copy: RepositoryCopy) -> None:
    assert "echo-short & 2" in text(copy, "paper/tables/seeds.tex")
    assert r"\generated{Seeds of each task.}{seeds}" in text(copy, "paper/floats.tex")
    claims = text(copy, "results/tables/claims.csv")
    assert "Echoes are heard" in claims and "2,tasks,at least 0,supported" in claims
    assert "Echoes are heard" in text(copy, "paper/tables/claims.tex")


def test_the_workflow_plans_all_of_it(copy: RepositoryCopy) -> None:
    plan = copy.snakemake("--dry-run", "--quiet", "host", "--summary", *CONFIG)
    planned = {
        line.split("\t")[0]: line.split("\t")[2] for line in plan.splitlines() if "\t" in line
    }
    for path, rule in {
        "paper/figures/bits.pdf": "plot",
        "paper/tables/seeds.tex": "tables",
        "paper/tables/echo.tex": "tables",
        "cache/data/proverbs/manifest.json": "fetch_data",
        "cache/data/longbench-dureader/manifest.json": "fetch_data",
        "results/eval/tiny/nuq3/echo-short/seed0/run.json": "evaluate",
    }.items():
        assert planned[f"added/{path}"] == rule


@pytest.mark.slow
def test_the_report_shows_each_figure_with_its_own_caption(copy: RepositoryCopy) -> None:
    """A figure that no other file knows of has its own caption, and not another figure's."""
    figures = ("added/paper/figures/bits.pdf", "added/paper/figures/throughput.pdf")
    run = ("--cores", "1", "--quiet", *CONFIG)
    copy.snakemake(*run, "--allowed-rules", "plot", "--force", "--", *figures)
    copy.snakemake(*run, "--report", "added/report.html", "--", *figures)
    page = text(copy, "report.html")
    for caption in (CAPTION, FIGURES["throughput"].caption):
        assert page.count(f"<p>{caption}</p>") == 1
