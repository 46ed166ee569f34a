"""Peak memory, and the methods that are compared by it."""

import json

import pytest
import torch

from examples.studies import personalization_memory as pm
from examples.studies.memory import peak_memory

from .. import components as c

MB = 2**20


def test_peak_of_known_allocations():
    held = torch.zeros(7 * MB, dtype=torch.uint8)

    def work():
        first = torch.zeros(MB, dtype=torch.uint8)
        del first
        second = torch.zeros(2 * MB, dtype=torch.uint8)
        return len(second) + len(torch.zeros(3 * MB, dtype=torch.uint8)) + len(held)

    peak = peak_memory(work)
    assert peak.allocated == 5 * MB
    assert peak.resident is None or peak.resident >= 4 * MB
    assert peak.seconds > 0
    with pytest.raises(ValueError, match="cpu or cuda, got meta"):
        peak_memory(work, "meta")


def networks():
    torch.manual_seed(0)
    text, _ = c.clip()
    return c.unet().requires_grad_(False).bfloat16(), text.requires_grad_(False).bfloat16()


def peak(method, side=32):
    return pm.measure(method, *networks(), "cpu", side)["peak_mb_over_weights"]


def test_methods_in_their_order():
    inference, forward, double = peak("inference"), peak("forward_1"), peak("forward_2")
    backprop, checkpoint = peak("backprop"), peak("backprop_checkpoint")
    assert inference <= forward <= 1.1 * inference
    assert 1.5 * forward <= double <= 2.1 * forward
    assert forward < checkpoint < backprop
    assert peak("int8_backprop_checkpoint") < peak("int8_backprop")


def test_a_process_of_its_own_and_the_file(tmp_path):
    parts = networks()
    results = {
        name: pm.in_a_process(1, name, *parts, "cpu", 16)
        for name in ("inference", "int8_inference")
    }
    results["forward_2"] = results["inference"] | {"peak_mb_over_weights": 3.0}
    results["inference"]["peak_mb_over_weights"] = 2.0
    assert results["int8_inference"]["weights_mb"] < results["inference"]["weights_mb"]
    ratios = pm.figures(results, 16, "cpu")["memory_ratio_to_inference"]
    assert ratios == {"inference": 1.0, "int8_inference": 1.0, "forward_2": 1.5}
    json.dumps(pm.figures(results, 16, "cpu"), allow_nan=False)
    with pytest.raises(RuntimeError, match="forward_0"):
        pm.in_a_process(1, "forward_0", *parts, "cpu", 16)
    for arguments, message in [
        ({"methods": "inference,magic"}, "unknown method magic; there are inference"),
        ({"device": "tpu"}, "cpu or cuda, got 'tpu'"),
    ]:
        with pytest.raises(ValueError, match=message):
            pm.main(**({"output": tmp_path / "f", "device": "cpu", "methods": ""} | arguments))


def test_what_is_in_the_file_can_be_kept(tmp_path):
    path = tmp_path / "f.json"
    methods = {name: {"peak_mb_over_weights": 1.0} for name in pm.METHODS}
    path.write_text(json.dumps(pm.figures(methods, 16, "cpu")))
    assert pm.earlier(path, 16, "cpu") == methods
    with pytest.raises(ValueError, match="is of latents"):
        pm.earlier(path, 32, "cpu")
