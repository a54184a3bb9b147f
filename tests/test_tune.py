"""Tuning end to end: true slopes, only for the better, interruptible, zeros untouched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import quantize.tune as tuning
from checkpoints import tiny_llama, tiny_vl
from edgevl.checkpoint import open_checkpoint
from quantize.embed import embed_samples
from quantize.groups import block_table
from quantize.job import _samples, quantize, settle
from quantize.measure import last_hidden
from quantize.partial import Partial
from quantize.settings import EFFORTS, QuantizeSettings
from test_quantize import StoppedError, contents

FEW = {"samples": 8, "length": 96, "group_size": 32, "calibration": "text", "effort": "best"}
TUNED = QuantizeSettings(**FEW, recipe=replace(EFFORTS["best"], reconstruct=0))
UNTUNED = QuantizeSettings(**FEW, recipe=replace(EFFORTS["best"], reconstruct=0, tune=0))


def unfinished(path: Path) -> tuple[str, QuantizeSettings]:
    """A checkpoint and the run that has quantized it and not yet tuned it, in `path`/out.partial."""
    model, settings = str(tiny_llama(path / "m", qkv_bias=True)), QuantizeSettings(**FEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.job.tune", lambda *_: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            quantize(model, path / "out", settings)
    return model, settings


def test_slopes_are_those_of_the_whole_model(tmp_path: Path) -> None:
    model, settings = unfinished(tmp_path)
    checkpoint = open_checkpoint(model)
    tables = [block_table(checkpoint.config, layer) for layer in range(2)]
    network = tuning._Network(checkpoint, tables, Partial(tmp_path / "out"), "cpu")
    settled = settle(checkpoint, tmp_path / "new", settings)
    samples = _samples(checkpoint, settled, Partial(tmp_path / "new"), lambda *_: None)[:3]
    wanted, entered = last_hidden(checkpoint, samples, "cpu", lambda *_: None), embed_samples(checkpoint, samples)
    known = torch.tensor([sample.token_ids for sample in samples])

    network._coarse = False
    assert network.load() == 0
    linears = [network._linears(table) for table in tables]
    values = [network._values(table, own) for table, own in zip(tables, linears, strict=True)]
    names = [[*table.linears, *table.norms] for table in tables]
    leaves = {n: values[i][f"{n}.weight"].requires_grad_() for i in range(2) for n in names[i]}
    x = entered
    for table, own in zip(tables, values, strict=True):
        x = network._run(table, own, x)
    goal, ours = (network._logs(h[:, :-1].reshape(-1, h.shape[2])) for h in (wanted, x))
    loss = functional.kl_div(ours, goal, log_target=True, reduction="batchmean")
    slopes = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    expected, signs = {}, {}
    for name, slope in slopes.items():
        linear = next((own[name] for own in linears if name in own), None)
        expected[name] = slope if linear is None else linear.slopes(slope)[1]
        if linear is not None:
            signs[name] = linear.slopes(slope)[0].flatten(1)
    assert network.distance(entered, wanted, known) == pytest.approx(float(loss.detach()), rel=1e-4)

    found: dict[str, torch.Tensor] = {}
    before = {name: array.copy() for name, array in network.moved.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "_update", lambda name, slope, *_: found.__setitem__(name, slope))
        network.learn(entered, wanted, known, 0, 1)
    assert found.keys() == expected.keys()
    for name, slope in expected.items():
        assert slope.abs().max() > 0 and torch.allclose(found[name], slope, rtol=1e-3, atol=1e-7), name
    for name, slope in signs.items():
        way = torch.from_numpy(before[name].astype(np.float32) - network.moved[name])
        sure = slope.abs() > 1e-3 * slope.abs().max()
        assert torch.equal(way.sign()[sure], slope.sign()[sure]), name
        assert way.abs().max() == pytest.approx(tuning._REACH, rel=1e-2)


def test_it_is_nearer_and_zeros_stay(tmp_path: Path) -> None:
    model = str(tiny_llama(tmp_path / "m"))
    report = quantize(model, tmp_path / "best", TUNED)
    quantize(model, tmp_path / "untuned", UNTUNED)
    assert report["tuning"]["kept"] and report["tuning"]["kl_after"] < 0.97 * report["tuning"]["kl_before"]
    best, untuned = open_checkpoint(tmp_path / "best"), open_checkpoint(tmp_path / "untuned")
    changed = {name for name in best.names() if not np.array_equal(best.raw(name)[1], untuned.raw(name)[1])}
    assert {name.rsplit(".", 1)[1] for name in changed} == {"qweight", "scales", "weight"}
    assert all(name.endswith("layernorm.weight") for name in changed if name.endswith(".weight"))
    positive = [name for name in changed if not name.endswith(".qweight")]
    assert all(np.isfinite(best.array(name)).all() and (best.array(name) > 0).all() for name in positive)


def test_what_does_not_gain_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(tiny_llama(tmp_path / "m"))
    quantize(model, tmp_path / "untuned", UNTUNED)
    monkeypatch.setattr(tuning, "_REACH", 300.0)
    report = quantize(model, tmp_path / "best", TUNED)
    assert not report["tuning"]["kept"]
    before, after = contents(tmp_path / "untuned"), contents(tmp_path / "best")
    assert before["model.safetensors"] == after["model.safetensors"]


def test_stopped_while_tuning_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = str(tiny_vl(tmp_path / "m"))
    few = {**FEW, "length": 256, "calibration": "mixed"}
    quantize(model, tmp_path / "whole", QuantizeSettings(**few))
    for stage, done in (("tune: the original", 1), ("tune", 5), ("tune", 6), ("writing", 0)):

        def stop(now: str, count: int, total: int, stage: str = stage, done: int = done) -> None:
            if (now, count) == (stage, done):
                raise StoppedError

        with pytest.raises(StoppedError):
            quantize(model, tmp_path / "out", QuantizeSettings(**few, resume=stage != "tune: the original"), stop)
    quantize(model, tmp_path / "out", QuantizeSettings(**few, resume=True))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
