"""The inner loops of ARM's forms, which LLVM compiles on any processor, and the estimate of their speed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from loadtest.bench import arm_estimate
from loadtest.bench.arm_estimate import N_TOKENS, PROCESSORS, X86, compile_loop, inner_loop, products

INSTRUCTIONS = {"neon-i8mm": "usmmla", "neon-dotprod": "sdot", "neon": "smull"}
ARM_PROCESSORS = [name for name, (_, triple, *_) in PROCESSORS.items() if triple != X86]


@pytest.mark.parametrize("n_tokens", N_TOKENS)
@pytest.mark.parametrize("name", ARM_PROCESSORS)
def test_the_loop_uses_the_instruction_and_keeps_all_sums_in_registers(name: str, n_tokens: int) -> None:
    """A loop that stores sums to the stack is several times slower."""
    cpu, triple, features, form = PROCESSORS[name]
    loop = inner_loop(compile_loop(cpu, triple, features, form, n_tokens))
    instruction = "usdot" if form == "neon-i8mm" and n_tokens == 1 else INSTRUCTIONS[form]
    assert any(line.split()[0] == instruction for line in loop)
    assert not [line for line in loop if re.match(r"st|.*\bsp\b", line)]
    assert products(loop) >= 128


def test_products_counts_each_width_once() -> None:
    lines = ["smull v8.8h, v25.8b, v29.8b", "smull2\tv31.8h, v25.16b, v28.16b", "sadalp v21.4s, v31.8h", "usmmla v1.4s"]
    assert products(lines) == 8 + 8 + 32


def an_llvm_mca(directory: Path, name: str, version: str) -> None:
    program = directory / name
    program.write_text(f"#!/bin/sh\necho '  LLVM version {version}'\n", encoding="utf-8")
    program.chmod(0o755)


def test_only_a_new_llvm_mca_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    an_llvm_mca(tmp_path, "llvm-mca", "14.0.6")
    with pytest.raises(RuntimeError, match="no llvm-mca of LLVM 17 or later"):
        arm_estimate.find_program()
    an_llvm_mca(tmp_path, "llvm-mca", "17.0.1")
    assert arm_estimate.find_program() == "llvm-mca"
    an_llvm_mca(tmp_path, "llvm-mca-22", "22.1.8")
    assert arm_estimate.find_program() == "llvm-mca-22"


def test_the_command_estimates_every_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without llvm-mca, the command says what to install."""
    out = tmp_path / "estimate.json"
    try:
        arm_estimate.find_program()
    except RuntimeError:
        with pytest.raises(SystemExit):
            arm_estimate.main(out)
        assert "apt-get install llvm-22" in capsys.readouterr().err.replace("\n", " ")
        return
    arm_estimate.main(out)
    rows = json.loads(out.read_text())["processors"]
    assert list(rows) == list(PROCESSORS)
    for row in rows.values():
        assert all(0 < rate < 200 for rate in row["products_per_cycle"].values())
