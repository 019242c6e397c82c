"""Kills runs at random moments, resumes them, and compares what they leave with the uninterrupted run, bit by bit.

`make kill-test`, or python tests/force/kill.py [ROUNDS] [SEED]. A GPT-2 and a Llama in turn, with cover and a stream.
"""

import json
import lzma
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "finetune"), str(TESTS.parent)]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

import torch  # noqa: E402
from helpers import _call, _context, finetune, read_log  # noqa: E402
from models import random_model, tiny_gpt2  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from finetune import recipe as recipes  # noqa: E402
from finetune.bundled import MODELS, TEXTS  # noqa: E402
from finetune.recipe import Gaps, Recipe, Schedule, Text  # noqa: E402

MODELS_OF = {
    "gpt2": tiny_gpt2,
    "llama": partial(random_model, "llama", std=0.2, vocab_size=4096, max_position_embeddings=16),
}


def write_inputs(directory: Path) -> dict[str, Path]:
    """Write models, text and recipes; return the recipes' files."""
    with lzma.open(TEXTS["books-validation"], "rt") as books:
        book = json.loads(books.readline())["text"]
    text = directory / "text.jsonl"
    text.write_text("".join(json.dumps({"text": book[i : i + 200]}) + "\n" for i in range(0, 12_000, 200)))
    files = {}
    for family, make in MODELS_OF.items():
        make().save_pretrained(directory / family)
        AutoTokenizer.from_pretrained(MODELS["micro"]).save_pretrained(directory / family)
        recipe = Recipe(
            name=family,
            model=str(directory / family),
            text=Text(str(text), held_out_fraction=0.1),
            steps=24,
            batch=4,
            micro_batch=2,
            lr=1e-3,
            max_rise=1000.0,  # random models may diverge, which is not what is tried here
            min_lr=3e-4,
            warmup=2,
            schedule=Schedule(start=2, gap=Gaps(mlp=1, qk=1, v=1, final=1, eot=1)),
            save_every=3,
            log_every=2,
            device="cpu",
            bf16=False,
        )
        kinds = {
            "cover": replace(recipe, cover=0.5, kl_weight=0.5),
            "stream": replace(recipe, text=replace(recipe.text, streaming=True, held_out_blocks=8), control=False),
        }
        for kind, made in kinds.items():
            files[f"{family}-{kind}"] = directory / f"{family}-{kind}.yaml"
            files[f"{family}-{kind}"].write_text(recipes.dump(made))
    return files


def begin(directory: Path, *arguments: Any) -> Any:
    environment = {"HF_DATASETS_CACHE": str(directory / "cache")}
    process = _context.Process(
        target=_call, args=(partial(finetune, *arguments), environment, directory, directory / "said")
    )
    process.start()
    return process


def differences(run: Path, whole: Path) -> list[str]:
    """Return in what two runs differ, but for times."""
    found = []
    for name in ("ln_free", "control"):
        if not (whole / name).exists():
            continue
        ours, theirs = (load_file(each / name / "model.safetensors") for each in (run, whole))
        found += [f"{name}/{key}" for key in theirs if not torch.equal(ours[key], theirs[key])]
    logs = [[line | {"seconds": 0, "teacher_seconds": 0} for line in read_log(each)] for each in (run, whole)]
    return [*found, *(["log.jsonl"] if logs[0] != logs[1] else [])]


def main(rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    good = 0
    with tempfile.TemporaryDirectory(prefix="noln-kill-") as temporary:
        directory = Path(temporary)
        files, lasted = write_inputs(directory), {}
        for name, file in files.items():
            process = begin(directory, file, "--out", f"whole-{name}")
            while not (directory / f"whole-{name}/recipe.yaml").exists() and process.is_alive():
                time.sleep(0.005)
            began = time.monotonic()
            process.join()
            lasted[name] = time.monotonic() - began
            if process.exitcode:
                sys.exit((directory / "said").read_text())
        for i in range(rounds):
            name = list(files)[i % len(files)]
            run, moment = directory / "run", rng.uniform(0, lasted[name])
            process = begin(directory, files[name], "--out", run)
            while not (run / "recipe.yaml").exists() and process.is_alive():
                time.sleep(0.005)
            process.join(timeout=moment)
            killed = process.is_alive()
            if killed:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            steps = (run / "log.jsonl").read_bytes().count(b"\n") if (run / "log.jsonl").exists() else 0
            process = begin(directory, "resume", run)
            process.join()
            problems = [f"exit code {process.exitcode}: {(directory / 'said').read_text()[-500:]}"]
            if process.exitcode == 0:
                problems = differences(run, directory / f"whole-{name}")
            good += not problems
            what = f"killed after {moment:.2f} s, {steps} lines of log" if killed else "was done before it was killed"
            print(f"{i + 1:3} {name:12} {what}: {'; '.join(problems) or 'equal'}", flush=True)
            shutil.rmtree(run)
    print(f"{good} of {rounds} equal to the uninterrupted run")
    sys.exit(good != rounds)


if __name__ == "__main__":
    main(*map(int, [*sys.argv[1:], *("30", "0")[len(sys.argv) - 1 :]]))
