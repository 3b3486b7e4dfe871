"""`kvquant init`: a study that fits model, text and prompts, or one line that says why not.

Also covers: diagnosis.study_draft, diagnosis.study_sizes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.cli import main
from kvquant.diagnosis.init import kebab
from kvquant.diagnosis.study_draft import quoted
from kvquant.diagnosis.study_sizes import LEAST_TOKENS, SEEDS, choose_sizes, core_speed, cost_of
from kvquant.errors import UserError
from kvquant.study.config import load_study
from kvquant.study.paths import NAME
from kvquant.study.presets import PRESETS
from kvquant.study.tasks import OwnPromptsTask, PerplexityTask
from tests.support.models import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model."""
    return save_tiny(tmp_path_factory.mktemp("init") / "My Tiny_Model")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a text and prompts."""
    monkeypatch.chdir(tmp_path)
    lines = (f"Line {n} says that {n} squared is {n * n}.\n" for n in range(400))
    (tmp_path / "Essays.txt").write_text("".join(lines))
    prompts = [{"prompt": f"What is {n} plus {n}?", "answers": str(2 * n)} for n in range(7)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return tmp_path


def test_the_study_is_of_ones_own_files(
    here: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["init", "--model", str(model), "--text", "Essays.txt", "--prompts", "asked.jsonl"]
    assert main(words) == 0
    told = capsys.readouterr().out
    study = load_study("essays.yaml")
    assert study.study == "essays" and list(study.models) == ["my-tiny-model"]
    assert study.calibration.dataset == "my-essays"  # the name of the known one is taken
    assert study.datasets["my-essays"].files == [str(here / "Essays.txt")]  # no workflow here
    ppl, asked = study.tasks.values()
    assert isinstance(ppl, PerplexityTask) and ppl.protocol == "B" and ppl.dataset == "my-essays"
    assert isinstance(asked, OwnPromptsTask) and asked.scoring == "contains"
    assert len(study.seeds) * asked.samples >= 7 and asked.max_new_tokens >= 16
    assert list(study.schemes) == ["fp16", "allocated-4", "allocated-3", "nuq3-1pct", "kivi-4"]
    for name, scheme in study.schemes.items():
        small = {"block_size", "residual", "group"} & type(scheme).model_fields.keys()
        assert scheme.meaning(*small) == PRESETS[name].scheme.meaning(*small)
    command = f"snakemake -n --configfile {here / 'essays.yaml'} --profile workflow/profiles/cpu"
    assert command in told and command in Path("essays.yaml").read_text()
    assert "run these in a clone of kvquant" in told
    assert main(words) == 2  # nothing is overwritten
    assert "essays.yaml exists and is not overwritten" in capsys.readouterr().err


def test_without_texts_and_with_prompts_alone(here: Path, model: Path) -> None:
    assert main(["init", "a", "--model", str(model), "--name", "plain"]) == 0
    plain = load_study("a/plain.yaml")
    assert plain.calibration.dataset == "essays" and not plain.datasets
    (here / "asked.jsonl").write_text('{"prompt": "Why?"}\n')
    words = ["--model", str(model), "--prompts", "asked.jsonl"]
    assert main(["init", "b/Mine.yaml", *words]) == 0
    mine = load_study("b/Mine.yaml")
    assert mine.study == "mine" and list(mine.datasets) == ["asked"]
    assert isinstance(task := mine.tasks["asked"], OwnPromptsTask)
    assert task.scoring == "agreement" and task.samples == 1


def test_paths_stay_relative_where_the_workflow_is(
    here: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("workflow/Snakefile", "config/schema.json"):
        (here / file).parent.mkdir()
        (here / file).touch()
    (here / "m").symlink_to(model)
    taken = here / "resources/models/my-tiny-model/manifest.json"
    taken.parent.mkdir(parents=True)
    taken.write_text('{"spec_digest": "of another model"}')
    assert main(["init", "s/x.yaml", "--model", "m", "--text", "Essays.txt"]) == 0
    study = load_study("s/x.yaml")
    assert study.models["my-tiny-model-local"].path == "m"
    assert study.datasets["my-essays"].files == ["Essays.txt"]
    first = Path("s/x.yaml").read_text().partition("\n")[0]
    assert first == "# yaml-language-server: $schema=../config/schema.json"
    assert "clone" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "none.txt"], "--text: no such file: none.txt"),
        (["--text", "short.txt"], "--text: 6 tokens; at least 1,024 are needed"),
        (["--text", "Essays.txt", "Essays.txt"], "--text: a file is given twice"),
        (["--prompts", "bad.jsonl"], "bad.jsonl, line 2: unknown field 'answer'; known: prompt"),
        (["--prompts", "long.jsonl"], "--prompts: one has"),
        (["--name", "My Study"], "--name: 'My Study' must be kebab case, such as 'my-study'"),
        (["--name", "done"], "--name: results/done holds the results of a study already"),
        (["asked.jsonl"], "asked.jsonl: a study file ends in .yaml"),
        (["--model", "nothing"], "--model: nothing is no folder"),
        (["--model", "gpt2"], "--model: gpt2: model: 'GPT2LMHeadModel' is"),
        (["--model", "bare"], "--model: bare holds no *.safetensors"),
    ],
)
def test_refusals_take_one_line(
    here: Path, model: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "short.txt").write_text("a b c d")
    (here / "bad.jsonl").write_text(
        '{"prompt": "a", "answers": "b"}\n{"prompt": "c", "answer": ""}'
    )
    (here / "long.jsonl").write_text(json.dumps({"prompt": "word " * 5000}) + "\n")
    (here / "results/done/eval").mkdir(parents=True)
    for name, config in (("gpt2", {"model_type": "gpt2"}), ("bare", None)):
        (here / name).mkdir()
        text = json.dumps(config) if config else (model / "config.json").read_text()
        (here / name / "config.json").write_text(text)
    if words[:2] == ["--model", "nothing"]:
        words = ["--model", "./nothing"]
        message = "--model: ./nothing is no folder"
    given_model = [] if "--model" in words else ["--model", str(model)]
    assert main(["init", *words, *given_model]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(here.glob("*.yaml"))


@given(
    st.integers(64, 200_000),
    st.integers(LEAST_TOKENS, 10**7),
    st.lists(st.integers(1, 100), max_size=60),
    st.booleans(),
    st.booleans(),
)
def test_sizes_fit(
    positions: int, tokens: int, prompts: list[int], scored: bool, gpu: bool
) -> None:
    answers = [3] * len(prompts) if scored else []
    try:
        sizes = choose_sizes(positions, tokens, prompts, answers, gpu=gpu)
    except UserError as error:
        assert prompts and max(prompts) > positions // 2, str(error)
        return
    assert max(sizes.window, sizes.calibration_window, sizes.length) <= positions
    assert sizes.window * max(1, sizes.windows) <= tokens * 0.25 * 0.9
    assert sizes.calibration_window <= tokens * 0.75 * 0.9
    assert SEEDS * sizes.samples >= min(len(prompts), SEEDS * 8)
    assert not prompts or max(prompts) + sizes.answer <= sizes.length
    cost = cost_of(sizes, prompts, tokens, 10**8, agreement=True, speed=1e10, cores=2)
    assert cost.minutes is not None and cost.minutes > 0 and cost.tokens > 0


def test_the_speed_of_a_core_is_plausible() -> None:
    assert 1e8 < core_speed(0.02) < 1e13


@given(st.text(max_size=30))
def test_names_are_kebab(text: str) -> None:
    assert kebab(text) == "" or NAME.fullmatch(kebab(text))


@pytest.mark.parametrize(
    "value", ["a b.txt", "o'clock: 5.txt", "- x", "#x", "12", "y\u00e9s", "~/a"]
)
def test_values_are_read_as_written(value: str) -> None:
    import yaml

    found = yaml.safe_load(f"key: {quoted(value)}\n")["key"]
    assert str(found) == value
