"""The command line as a user meets it: sentences, exit codes, stdout for answers only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import tiny_llama, tiny_vl
from edgevl.cli import VERBS, main

ROOT = Path(__file__).parent.parent


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    out, err = capfd.readouterr()
    code = done.value.code
    return (code if isinstance(code, int) else 1), out, err


def sentence(err: str) -> str:
    lines = [line for line in err.strip().splitlines() if line.startswith("edgevl: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_help_lists_every_verb_and_each_has_help(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "--help")
    assert code == 0
    for verb in VERBS:
        assert verb in out
        code, text, _ = run(capfd, verb, "--help")
        assert code == 0
        assert "Usage: edgevl " + verb in text


def test_it_runs_as_a_module_too() -> None:
    command = [sys.executable, "-m", "edgevl", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("edgevl")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("build", "NOWHERE", "-o", "OUT"), ("NOWHERE",)),
        (("build", "MODEL", "-o", "OUT", "--target", "toaster"), ("toaster", "targets")),
        (("build", "MODEL", "-o", "OUT", "--target", "nano"), ("nano", "host")),
        (("build", "MODEL", "-o", "OUT", "--target", "h200", "--head", "f32"), ("--head f32", "h200", "int4")),
        (("build", "MODEL", "-o", "OUT", "--context", "1000000"), ("1000000",)),
        (("build", "MODEL", "-o", "OUT", "--context", "3"), ("3", "64")),
        (("build", "MODEL", "-o", "TAKEN"), ("TAKEN",)),
        (("chat", "NOWHERE", "-p", "hi"), ("NOWHERE", "build")),
        (("chat", "MODEL", "-p", "hi"), ("manifest.json",)),
        (("inspect", "NOWHERE"), ("NOWHERE",)),
        (("inspect", "TAKEN"), ("TAKEN",)),
        (("bench", "NOWHERE"), ("NOWHERE",)),
        (("quantize", "MODEL", "-o", "OUT", "--group-size", "48"), ("48",)),
        (("quantize", "NOWHERE", "-o", "OUT"), ("NOWHERE",)),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(
    arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(tmp_path / "MODEL")
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "file").write_text("mine")
    places = {name: str(tmp_path / name) for name in ("NOWHERE", "MODEL", "OUT", "TAKEN")}
    code, out, err = run(capfd, *(places.get(a, a) for a in arguments))
    assert code == 2, err
    assert out == ""
    for word in words:
        assert word in sentence(err)
    assert not (tmp_path / "OUT").exists()
    assert (tmp_path / "TAKEN" / "file").read_text() == "mine"


def test_click_usage_errors_exit_with_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd, "chat")[0] == 2
    assert run(capfd, "nonsense")[0] == 2
    assert run(capfd, "build", "x")[0] == 2


def test_build_inspect_and_bench(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny_vl(tmp_path / "m")
    code, out, _ = run(capfd, "build", str(tmp_path / "m"), "-o", str(tmp_path / "b"), "--context", "128", "--json")
    assert code == 0
    built = json.loads(out)
    code, out, _ = run(capfd, "inspect", str(tmp_path / "b"), "--verify", "--json")
    assert code == 0
    assert json.loads(out)["digest"] == built["digest"]
    code, out, _ = run(capfd, "inspect", str(tmp_path / "m"), "--json")
    assert json.loads(out)["kind"] == "checkpoint"
    assert run(capfd, "inspect", str(tmp_path / "b"))[0] == 0
    code, out, err = run(capfd, "bench", str(tmp_path / "b"), "--prompt", "20", "--generate", "4", "--depth", "8")
    assert code == 0
    document = json.loads(out.splitlines()[-1])
    assert document["prefill"]["tokens"] == 20
    assert document["bandwidth"]["bytes_per_step"] > 0
    code, _, err = run(capfd, "bench", str(tmp_path / "b"), "--depth", "500")
    assert code == 2
    assert "128" in sentence(err)


def test_targets_and_doctor(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "targets", "--json")
    found = {t["name"]: t["architecture"] for t in json.loads(out)}
    assert code == 0
    assert (found["host"], found["orin-nano-8gb"], found["h200"]) == ("cpu", "sm_87", "sm_90")
    code, out, _ = run(capfd, "doctor", "--json")
    assert code == 0
    assert json.loads(out)["healthy"] is True
    assert run(capfd, "targets")[0] == 0
    assert run(capfd, "doctor")[0] == 0


def test_a_bug_is_a_sentence_and_a_traceback_only_on_request(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import edgevl.commands.targets as verb

    def broken() -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(verb.command, "callback", lambda as_json: broken())
    code, _, err = run(capfd, "targets")
    assert code == 1
    assert "boom" in sentence(err)
    with pytest.raises(RuntimeError):
        main(["--debug", "targets"])


def test_ctrl_c_exits_with_130(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import edgevl.commands.targets as verb

    def interrupted(as_json: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verb.command, "callback", interrupted)
    assert run(capfd, "targets")[0] == 130
