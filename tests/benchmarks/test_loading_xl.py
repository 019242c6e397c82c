"""Seconds and peak memory of loading; `python tests/benchmarks/test_loading_xl.py` does it at GPT-2 XL's size.

The peak counts from after the imports, in units of the weights' size: 1 is the plain model, 2 one extra copy. The
untied unembedding, the map being folded and pages of the file come on top.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

TOOLS = ["load_bridge", "load_transformers"]
if version("transformer-lens") < "4":
    TOOLS.append("load_hooked")
XL = {"n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257}
SMALL = {"n_embd": 1024, "n_layer": 12, "n_head": 16, "vocab_size": 4096}
LOAD = r"""
import json, re, sys, time
from analysis import loading
# not ru_maxrss, which a process inherits from the one that started it
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
before, start = peak(), time.perf_counter()
getattr(loading, sys.argv[1])(sys.argv[2])
print(json.dumps([time.perf_counter() - start, peak() - before]))
"""


def measure(shape: dict[str, int], tools: list[str]) -> dict[str, tuple[float, float]]:
    """Seconds, and the peak in units of the weights' size, for each tool."""
    with tempfile.TemporaryDirectory() as directory:
        with torch.device("meta"):
            model = GPT2LMHeadModel(GPT2Config(**shape, layer_norm_epsilon=1e12, bos_token_id=0, eos_token_id=0))
        model = model.to_empty(device="cpu")
        model.tie_weights()
        for name, parameter in model.named_parameters():
            parameter.data.fill_(1e6) if "ln_" in name and name.endswith("weight") else parameter.data.normal_(0, 0.005)
        size = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(directory)
        del model
        found = {}
        for tool in tools:
            run = [sys.executable, "-c", LOAD, tool, directory]
            output = subprocess.run(run, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
            seconds, peak = json.loads(output.stdout.splitlines()[-1])
            found[tool] = (seconds, peak / size)
            print(f"{tool}: {seconds:.1f} s, peak {peak / size:.2f} × {size / 2**30:.2f} GiB of weights", flush=True)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_at_most_one_extra_copy_of_the_weights():
    for tool, (_, peak) in measure(SMALL, TOOLS[:1]).items():
        assert peak < 2.5, f"{tool} held {peak:.2f} times the weights"


if __name__ == "__main__":
    measure(XL, TOOLS)
