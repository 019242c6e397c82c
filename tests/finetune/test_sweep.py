import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import kill_at, run_forked

from finetune import recipe as recipes
from finetune import sweep
from finetune.__main__ import main
from finetune.checkpoint import CheckpointError
from finetune.evaluate import compare
from finetune.recipe import Recipe, RecipeError
from finetune.run_directory import InUseError, directory_lock

COLUMNS = [
    *("recipe", "seed", "tokens", "seconds", "gap", "jsd_ln_free", "jsd_control"),
    *(f"loss_{model}_{text}" for text in ("choose", "report") for model in ("original", "control", "ln_free")),
]


@pytest.fixture(scope="module")
def file(recipe: Recipe, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep file of two ways to remove LN at two learning rates and two seeds."""
    directory = tmp_path_factory.mktemp("sweep")
    (directory / "report.jsonl").write_text("".join(text.read_text().splitlines(keepends=True)[:4]))
    base = directory / "base.yaml"
    base.write_text(recipes.dump(replace(recipe, steps=12, save_every=99)))
    content = {
        "recipe": str(base),
        "seeds": [0, 3],
        "set": {"text.held_out_blocks": 3},
        "runs": [{"kl_weight": 0.0}, {"kl_weight": 1.0, "schedule.fade": 2}],
        "grid": {"lr": [3e-3, 2e-3]},
        "texts": {"report": str(directory / "report.jsonl")},
    }
    (directory / "sweep.yaml").write_text(yaml.safe_dump(content))
    return directory / "sweep.yaml"


@pytest.fixture(scope="module")
def done(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    sweep.run(file, out)
    return out


def test_every_override_at_every_point_of_the_grid_and_every_seed(file: Path, recipe: Recipe):
    jobs = sweep.load(file, "out")
    assert len(jobs) == len({job.name for job in jobs}) == 8
    assert [job.recipe.seed for job in jobs] == [0, 3] * 4
    assert {(job.recipe.kl_weight, job.recipe.schedule.fade) for job in jobs} == {(0.0, 1), (1.0, 2)}
    assert {job.recipe.lr for job in jobs} == {3e-3, 2e-3}
    assert {job.recipe.text.held_out_blocks for job in jobs} == {3}
    assert {job.recipe.text.source for job in jobs} == {recipe.text.source}
    assert len({job.control_settings for job in jobs}) == 4  # learning rates and seeds


def test_a_row_a_run_with_what_its_directory_holds(file: Path, done: Path):
    table = pd.read_csv(done / "results.csv")
    assert table["run"].tolist() == [job.name for job in sweep.load(file, done)]
    assert list(table.columns[: len(COLUMNS)]) == COLUMNS
    assert {"override.kl_weight", "override.schedule.fade", "override.lr", "override.text.held_out_blocks"} == {
        column for column in table if column.startswith("override.")
    }
    assert len(table) == 8
    for row in table.to_dict("records"):
        directory = done / "runs" / row["run"]
        results = pd.read_csv(directory / "results.csv").query("text == 'held-out'").set_index("model")
        assert row["gap"] == pytest.approx(results["gap"]["ln_free"])
        assert row["jsd_ln_free"] == pytest.approx(results["jsd"]["ln_free"])
        assert row["jsd_control"] == pytest.approx(results["jsd"]["control"])
        assert row["loss_control_choose"] == pytest.approx(results["loss"]["control"])
        assert row["tokens"] == 12 * 4 * 16
        assert row["seed"] == recipes.load(directory / "recipe.yaml").seed
        assert (row["teacher_seconds"] > 0) == (row["override.kl_weight"] == 1.0)


def test_every_document_of_every_text_is_kept(done: Path):
    table = pd.read_csv(done / "results.csv").set_index("run")
    documents = pd.read_csv(done / "documents.csv")
    assert set(documents["text"]) == {"choose", "report"}
    for (run, text), frame in documents.groupby(["run", "text"]):
        means = compare(frame).set_index("model")["loss"]
        for model in ("original", "control", "ln_free"):
            assert table[f"loss_{model}_{text}"][run] == pytest.approx(means[model])


def test_a_control_is_trained_once(done: Path):
    logs = [(path / "log.jsonl").read_text().splitlines() for path in (done / "runs").iterdir()]
    trained = [{json.loads(line)["model"] for line in log} for log in logs]
    assert trained.count({"control", "ln_free"}) == 4
    assert trained.count({"ln_free"}) == 4


def test_what_is_done_is_not_done_again(file: Path, done: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweep, "do", None)
    before = (done / "results.csv").read_text()
    table = sweep.run(file, done)
    assert (done / "results.csv").read_text() == before
    assert sweep.settings(table)[::2] == [
        f"kl_weight {kl}, lr {lr}{fade}"
        for kl, fade in (("0.0", ""), ("1.0", ", schedule.fade 2"))
        for lr in ("0.003", "0.002")
    ]


def test_another_process_is_kept_out(file: Path, done: Path):
    with directory_lock(done), pytest.raises(InUseError, match="Another process"):
        sweep.run(file, done)


def test_a_run_is_another_where_its_recipe_is(file: Path, tmp_path: Path):
    """Whatever the file is called, and whether it spells out what is so by default."""
    content = yaml.safe_load(file.read_text())
    names = []
    for base, change in (("base.yaml", {}), ("renamed.yaml", {}), ("base.yaml", {"clip": 0.5})):
        recipe = yaml.safe_load(Path(content["recipe"]).read_text())
        if base == "renamed.yaml":
            assert recipe.pop("report_to") == []
        (tmp_path / base).write_text(yaml.safe_dump(recipe | change))
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content | {"recipe": str(tmp_path / base)}))
        names.append([job.name for job in sweep.load(tmp_path / "sweep.yaml", "out")])
    assert names[0] == names[1]
    assert not {*names[0]} & {*names[2]}


def test_a_run_is_another_where_this_machine_takes_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a recipe leaves to the machine is in its name, and float32 is called as ever."""

    def name(bf16: bool | None, capable: bool) -> str:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable}, raising=False)
        content = {"recipe": "micro", "set": {"bf16": bf16, "device": "cpu"}}
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
        return sweep.load(tmp_path / "sweep.yaml", "out")[0].name

    assert name(None, False) == name(False, True) == name(False, False)
    assert name(None, True) == name(True, False) != name(None, False)


def few(file: Path, directory: Path) -> Path:
    """The first run of the sweep, at both seeds."""
    content = yaml.safe_load(file.read_text())
    content |= {"runs": content["runs"][:1], "grid": {"lr": [3e-3]}, "texts": {}}
    (directory / "few.yaml").write_text(yaml.safe_dump(content))
    return directory / "few.yaml"


def do_few() -> None:
    sweep.run("few.yaml", "out")


def cut_off() -> None:
    kill_at("finetune.removal._conclude", 2)
    do_few()


def test_a_sweep_that_was_cut_off_goes_on(file: Path, done: Path, tmp_path: Path):
    few(file, tmp_path)
    assert run_forked(cut_off, tmp_path).code == -9
    assert len(pd.read_csv(tmp_path / "out" / "results.csv")) == 1
    again = run_forked(do_few, tmp_path)
    assert again.code == 0, again.output
    assert_same_numbers(tmp_path / "out", done)


def test_several_processes_come_to_the_same(file: Path, done: Path, tmp_path: Path):
    sweep.run(few(file, tmp_path), tmp_path / "out", processes=2)
    assert_same_numbers(tmp_path / "out", done)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Path | None]]:
    """Learning rates and controls of the runs that have begun, in threads; with a learning rate of 2e-3 they fail."""
    begun = []

    def do(job: sweep.Job, control: Path | None) -> tuple[dict, pd.DataFrame]:
        begun.append((job.recipe.lr, control))
        if job.recipe.lr == 2e-3:
            raise OSError("The disk is full.")
        if job.recipe.schedule.fade > 1 and control is None:  # without a fade it diverges, and leaves none
            (job.directory / "control").mkdir(parents=True)
        return {"run": job.name, "error": "DivergedError: "}, pd.DataFrame()

    monkeypatch.setattr(sweep, "do", do)
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", lambda processes, *_, **__: ThreadPoolExecutor(processes))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return begun


def changed(file: Path, directory: Path, **content) -> Path:
    (directory / "changed.yaml").write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | content))
    return directory / "changed.yaml"


@pytest.mark.parametrize("processes", [1, 2])
def test_what_fails_unexpectedly_ends_the_sweep(file: Path, begun: list, processes: int, tmp_path: Path):
    file = changed(file, tmp_path, grid={"lr": [2e-3, 1e-3, 3e-3, 4e-3]}, runs=[{}], seeds=[0])
    with pytest.raises(OSError, match="disk is full"):
        sweep.run(file, tmp_path / "out", processes)
    assert len(begun) <= processes


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_others_wait_for_a_control_that_is_being_trained(file: Path, begun: list, processes: int, tmp_path: Path):
    file = changed(file, tmp_path, grid={"schedule.fade": [1, 2, 3, 4], "lr": [1e-3, 3e-3]}, runs=[{}], seeds=[0])
    sweep.run(file, tmp_path / "out", processes)
    for lr in (1e-3, 3e-3):
        controls = [control for its_lr, control in begun if its_lr == lr]
        assert controls[:2] == [None, None]  # the first diverged
        assert controls[2] is not None
        assert controls[2] == controls[3]


@pytest.mark.parametrize("control", [{"control": False}, {"control_from": "elsewhere"}])
def test_where_no_control_is_trained_nothing_waits(
    file: Path, begun: list, control: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    all_at_once, do = threading.Barrier(4), sweep.do

    def together(*arguments):
        all_at_once.wait(timeout=20)
        return do(*arguments)

    monkeypatch.setattr(sweep, "do", together)
    file = changed(file, tmp_path, set=control, seeds=[0], runs=[{}], grid={"aux_weight": [0.1, 0.2, 0.3, 0.4]})
    assert len({job.control_settings for job in sweep.load(file, tmp_path)}) == 1
    sweep.run(file, tmp_path / "out", processes=4)
    assert len(begun) == 4


def test_a_text_that_cannot_be_read_is_said_before_training(file: Path, tmp_path: Path):
    file = changed(few(file, tmp_path), tmp_path, texts={"report": "nope.jsonl"}, seeds=[0])
    table = sweep.run(file, tmp_path / "out")
    assert "nope.jsonl" in table["error"][0]
    assert not (tmp_path / "out/runs").exists()


def assert_same_numbers(out: Path, done: Path) -> None:
    found = pd.read_csv(out / "results.csv").sort_values("seed")
    whole = pd.read_csv(done / "results.csv")
    expected = whole[(whole["override.kl_weight"] == 0) & (whole["override.lr"] == 3e-3)].sort_values("seed")
    for column in ("seed", "tokens", "gap", "jsd_ln_free", "loss_control_choose"):
        np.testing.assert_allclose(found[column], expected[column], rtol=1e-4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"recipe": "micro", "runs": [{"lrate": 1}]}, "lrate is not a field"),
        ({"recipe": "micro", "runs": [{"schedule.gap.w": 1}]}, "schedule.gap.w is not a field"),
        ({"recipe": "micro", "grid": {"lr": [-1]}}, "'lr': -1"),
        ({"recipe": "micro", "seed": [1]}, "seed"),
        ({"seeds": [1]}, "recipe"),
        ({"recipe": "macro"}, "macro"),
        ({"recipe": "micro", "runs": []}, "contains no run"),
        ({"recipe": "micro", "runs": [{}, {"kl_weight": 1.0}]}, r"runs \{\} and \{'kl_weight': 1.0\} are the same"),
        ({"recipe": "micro", "runs": [{"seed": 3}]}, "sets a seed"),
        ({"recipe": "micro", "texts": {"choose": "books-report"}}, "held-out text"),
        ({"recipe": "micro", "runs": [{"steps": "many"}]}, "steps is 'many'"),
        ({"recipe": "micro", "runs": [{"steps": 61.5}]}, "steps is 61.5"),
        ({"recipe": "micro", "runs": [{"model.a.b": 1}]}, "model.a.b is not a field"),
        ({"recipe": "micro", "runs": [{"recipe": 3}]}, "no recipe 3"),
    ],
)
def test_a_sweep_that_does_not_hold_is_refused_before_anything_is_run(content, said, tmp_path: Path):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=said):
        sweep.run(tmp_path / "sweep.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_fails_is_a_row_too(file: Path, tmp_path: Path):
    content = yaml.safe_load(few(file, tmp_path).read_text())
    content |= {"runs": [{"max_rise": 0.0, "lr": 1.0}, {}], "grid": {}, "seeds": [0]}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(content))
    table = sweep.run(tmp_path / "few.yaml", tmp_path / "out")
    assert table["error"][0].startswith("DivergedError: ")
    assert "max_rise" in table["error"][0]
    assert table["gap"].isna().tolist() == [True, False]
    assert sweep.settings(table) == ["lr 1.0, max_rise 0.0", ""]


def diverge(file: Path, directory: Path) -> Path:
    content = yaml.safe_load(few(file, directory).read_text()) | {"runs": [{"max_rise": 0.0, "lr": 1.0}], "grid": {}}
    (directory / "few.yaml").write_text(yaml.safe_dump(content))
    return directory / "few.yaml"


@pytest.mark.slow
def test_where_all_diverge_there_is_a_table_that_is_not_made_again(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    sweep.run(diverge(file, tmp_path), tmp_path / "out")
    monkeypatch.setattr(sweep, "do", None)
    main(["sweep", str(tmp_path / "few.yaml"), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.count("DivergedError") == 2
    assert not (tmp_path / "out/figure.html").exists()


def test_what_failed_otherwise_is_done_again(file: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_hub(*_):
        raise CheckpointError("The Hub does not answer.")

    with monkeypatch.context() as patched:
        patched.setattr("finetune.removal._conclude", no_hub)
        table = sweep.run(few(file, tmp_path), tmp_path / "out")
    assert table["error"].tolist() == ["CheckpointError: The Hub does not answer."] * 2
    table = sweep.run(tmp_path / "few.yaml", tmp_path / "out")
    assert len(table) == 2
    assert "error" not in table or table["error"].isna().all()
    assert_same_numbers(tmp_path / "out", done)


def test_the_figure_has_means_and_errors_over_seeds(done: Path):
    table = pd.read_csv(done / "results.csv")
    traces = {(trace.name, trace.showlegend): trace for trace in sweep.plot(table).data}
    assert len(traces) == 8
    group = table[(table["override.kl_weight"] == 0) & (table["override.lr"] == 2e-3)]
    (gap,) = [
        trace for (name, legend), trace in traces.items() if "kl_weight 0.0" in name and "lr 0.002" in name and legend
    ]
    assert gap.y[0] == pytest.approx(group["gap"].mean())
    assert gap.error_y.array[0] == pytest.approx(group["gap"].std() / np.sqrt(2))


def test_the_summary_is_of_seeds_and_pairs_them():
    loss = {"a": [3.0, 3.5], "b": [3.2, 3.6], "c": [3.1, 3.1]}
    table = pd.DataFrame(
        {"recipe": "micro", "override.fixed": 1, "override.lr": lr, "override.how": how, "seed": seed, "tokens": 8}
        | {"seconds": 2.0, "loss_original_choose": 2.0, "loss_ln_free_choose": loss[name][seed]}
        | {"gap": loss[name][seed] - 1, "jsd_ln_free": 0.1}
        for seed in (0, 1)
        for name, lr, how in (("a", 1e-3, None), ("b", 2e-3, None), ("c", 2e-3, "x"))
    )
    summary = sweep.summarise(table)
    assert summary["setting"].tolist() == ["lr 0.001", "lr 0.002", "lr 0.002, how x"]
    assert summary["runs"].tolist() == [2, 2, 2]
    assert summary["loss"].tolist() == pytest.approx([1.25, 1.4, 1.1])
    assert summary["loss_error"].tolist() == pytest.approx([0.25, 0.2, 0.0])
    assert summary["loss_change"].tolist() == pytest.approx([0.0, 0.15, -0.15])
    assert summary["loss_change_error"].tolist() == pytest.approx([0.0, 0.05, 0.25])
    assert summary["gap_change"].tolist() == pytest.approx(summary["loss_change"].tolist())
    named = sweep.summarise(table, ["slow", "fast", "other"])
    left, right = sweep.plot_settings(named).data
    assert list(left.y) == ["slow", "fast", "other"]
    assert list(left.x) == pytest.approx([1.25, 1.4, 1.1])
    assert list(right.x) == pytest.approx([0.1] * 3)
    assert list(left.error_x.array) == pytest.approx([0.25, 0.2, 0.0])
