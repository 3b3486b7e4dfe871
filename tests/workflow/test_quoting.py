"""No configured string means anything to a shell: paths with spaces work, others are refused.

Also covers: study.paths.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvquant.analysis.report import whole
from kvquant.errors import UserError
from kvquant.study.config import parse_study
from kvquant.study.measured_again import measured_again
from tests.support.snakemakes import run_snakemake
from tests.workflow.stubbed import stubbed

PLACEHOLDER = re.compile(r"\{((?:params|wildcards|input|output|log|resources|threads)[^}]*)\}")
EVIL = ["$(touch hacked)", "`touch hacked`", "a;touch hacked", "a|b", "a>b", "a'b", 'a"b', "a\nb"]
EVIL += ["a*b", "a&b", "{wildcards.x}", "a\\b", "~/a", "-x", " a", "", "a\u2028b", "a\x1b[0mb"]


@pytest.fixture()
def raw(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "config/smoke.yaml").read_text())


@pytest.mark.fault(
    "security",
    "any configured string in a shell command",
    "quoted in every rule",
)
def test_every_path_in_every_rule_is_quoted(root: Path) -> None:
    count = 0
    for file in sorted((root / "workflow/rules").glob("*.smk")):
        for block in re.findall(r"shell:\n((?: +\"[^\n]*\n)+)", file.read_text()):
            for name in PLACEHOLDER.findall(block):
                count += 1
                assert name.endswith(":q") or name == "threads", f"{file.name}: {{{name}}}"
    assert count > 60


@pytest.mark.fault(
    "security",
    "$( ), backticks, quotes, globs, control characters in device and pathvars",
    "refused by field and character",
)
@pytest.mark.parametrize("value", EVIL)
def test_characters_that_shells_act_on_are_refused_by_name(raw: dict[str, Any], value: str) -> None:
    for change, field in (
        ({"device": value}, "device"),
        ({"pathvars": {"results": value}}, "pathvars.results"),
    ):
        with pytest.raises(UserError) as caught:
            parse_study(raw | change)
        assert f"{field}: " in str(caught.value)


def test_unknown_folders_are_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="pathvars: unknown folder 'result'"):
        parse_study(raw | {"pathvars": {"result": "a"}})


def test_paths_of_any_language_and_with_spaces_are_taken(raw: dict[str, Any]) -> None:
    paths = {"results": "My Results/größe_1", "cache": "/tmp/a-b, c=d@e:f+g"}
    assert parse_study(raw | {"pathvars": paths}).pathvars == paths


@pytest.mark.fault(
    "workflow",
    "a folder of the study with a slash at its end, `//` or `./`",
    "has one spelling, also in what is measured again",
)
def test_a_folder_has_one_spelling(raw: dict[str, Any], root: Path, tmp_path: Path) -> None:
    """Snakemake compares paths as texts, and tab completion ends a folder with a slash."""
    for given in ("./results/smoke", "results//smoke", "results/smoke/"):
        asked = {"pathvars": {"results": given}, "published": "p", "reproduce": {}}
        study = parse_study(raw | asked)
        assert study.pathvars == {"results": "results/smoke"}
        assert measured_again(study).pathvars["results"] == "results/smoke-again"
    change = ("  results: results/smoke\n", "  results: ./results//smoke/\n")
    done = stubbed(root, tmp_path)("-n", "-p", changes=[change])
    told = done.stdout + done.stderr
    assert done.returncode == 0 and "--out results/smoke/report.html" in told, told[-2000:]
    assert "smoke//" not in told and "inconsistent results" not in told


@pytest.mark.parametrize(
    ("taken", "told"),
    [
        ("results", "pathvars.results: results/smoke: a file stands where a folder should be"),
        ("results/smoke/study.json/x", "results/smoke/study.json: cannot be written"),
    ],
)
def test_what_stands_in_the_way_is_one_line(
    root: Path, tmp_path: Path, taken: str, told: str
) -> None:
    run = stubbed(root, tmp_path)
    (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken).write_text("")
    done = run("accuracy")
    output = done.stdout + done.stderr
    assert done.returncode != 0 and told in output and "Traceback" not in output, output[-2000:]


@pytest.mark.fault(
    "security",
    "commands in the configuration while jobs are planned",
    "one error, nothing is executed",
)
@pytest.mark.parametrize(
    "setting", ["device=$(touch hacked)", "pathvars={cache: '$(touch hacked)'}"]
)
def test_nothing_is_executed_while_planning(root: Path, tmp_path: Path, setting: str) -> None:
    command = ["--snakefile", str(root / "Snakefile"), "-n"]
    command += ["--directory", str(tmp_path), "--configfile", str(root / "config/smoke.yaml")]
    done = run_snakemake([*command, "--replace-workflow-config", "--config", setting], tmp_path)
    assert done.returncode != 0
    assert setting.partition("=")[0].split(":")[0] in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "hacked").exists()


@pytest.mark.fault(
    "workflow",
    "spaces in all folders of a study",
    "every job runs, logs lie where they belong",
)
@pytest.mark.slow
def test_a_study_runs_in_folders_with_spaces(root: Path, tmp_path: Path) -> None:
    work = tmp_path / "the work"
    work.mkdir()
    names = ("results", "paper", "logs", "cache")
    folders = "pathvars:\n" + "".join(f"  {name}: out put/{name} of mine\n" for name in names)
    text = (root / "config/smoke.yaml").read_text()
    old = text[text.index("pathvars:") : text.index("models:")]
    done = stubbed(root, work)("--quiet", changes=[(old, folders)])
    assert done.returncode == 0, done.stderr[-3000:]
    made = {path.name for path in work.iterdir()} - {"bin", "study.yaml", ".snakemake"}
    assert made == {"out put"}
    assert {path.name for path in (work / "out put").iterdir()} == {f"{n} of mine" for n in names}
    assert whole(work / "out put/results of mine/report.html")
    logs = [path.name for path in (work / "out put/logs of mine").rglob("*.log")]
    assert "aggregate.log" in logs and len(logs) > 15
