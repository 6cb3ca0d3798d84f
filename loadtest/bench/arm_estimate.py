"""Estimate the speed of the inner loop of a matmul on ARM processors, and with AVX2, from its machine code alone.

    python -m loadtest.bench.arm_estimate --out docs/results/arm-estimate.json

LLVM compiles the loop of `tinylm.kernels.numba.simd` for each processor, and llvm-mca simulates it. This needs none of
the processors, but it needs llvm-mca of LLVM 17 or later, for example from Debian's package llvm-22. llvm-mca assumes
that every load hits the first cache. For the Apple M1 it has only the model of an older core, Apple's Cyclone (2013).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Any, Optional

import llvmlite.binding as llvm
import typer
from llvmlite import ir
from rich.table import Table

from tinylm.kernels.numba import simd
from tinylm.kernels.numba.emitter import I8, I32, I64, LANES, Emitter
from tinylm.system.files import check_file, write_file
from tinylm.system.machine import describe
from tinylm.terminal.output import PlainConsole, one_line_errors

ARM, X86 = "aarch64-unknown-linux-gnu", "x86_64-unknown-linux-gnu"
# Name -> LLVM's processor, system and features, and the form of the dot product.
PROCESSORS = {
    "Neoverse N1": ("neoverse-n1", ARM, "+dotprod", "neon-dotprod"),
    "Neoverse V1": ("neoverse-v1", ARM, "+dotprod,+i8mm", "neon-i8mm"),
    "Neoverse V1, without i8mm": ("neoverse-v1", ARM, "+dotprod", "neon-dotprod"),
    "Apple M1": ("apple-m1", ARM, "+dotprod", "neon-dotprod"),
    "Neoverse N1, without dotprod": ("neoverse-n1", ARM, "", "neon"),
    "Haswell": ("haswell", X86, "", "avx2"),
}
N_TOKENS = (1, 2, 4)
# Instruction -> products of bytes that it computes, with registers of 256 bits on x86.
PRODUCTS = {"sdot": 16, "usdot": 16, "usmmla": 32, "smull": 8, "smull2": 8, "vpmaddwd": 16}
ROUNDS = 1000  # of the loop that llvm-mca simulates
OLDEST = 17  # the first LLVM with these processors


def compile_loop(cpu: str, triple: str, features: str, form: str, n_tokens: int) -> str:
    """Return the assembly of a function that multiplies tokens by blocks of a tile of weights.

    It computes the sums that `simd.matmul_1`, `matmul_2` or `matmul_4` keep in registers at once.
    """
    module = ir.Module()
    module.triple = triple
    pointer = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I64, pointer, I32.as_pointer()])
    function = ir.Function(module, kind, "multiply")
    e = Emitter(None, ir.IRBuilder(function.append_basic_block()), form)
    packed, n_steps, x, out = function.args
    n_at_once, n_blocks = simd.sums_at_once(e, n_tokens, exact=False)
    x = e.shaped(x, (I64(n_tokens), I64(1024)))
    totals = simd.multiply(e, packed, I64(0), n_steps, x, [I64(t) for t in range(n_at_once)], range(n_blocks), False)
    for i, total in enumerate(total for sums in totals for total in sums):
        e.store(e.folded(e.b.load(total)), out, I64(i * LANES))
    e.b.ret_void()
    return _assembly(str(module), cpu, triple, features)


def _assembly(code: str, cpu: str, triple: str, features: str) -> str:
    """Compile LLVM IR with the optimizations that Numba uses."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)
    module = llvm.parse_assembly(code)
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    return str(machine.emit_assembly(module))


def inner_loop(assembly: str) -> list[str]:
    """Return the instructions of the longest loop without jumps in it, from its label to the jump to it."""
    loops: list[list[str]] = []
    loop: list[str] = []
    for line in assembly.splitlines():
        text = re.sub(r"\s+(//|#\s).*", "", line).strip()  # without a comment
        if re.fullmatch(r"\.L\w+:", text):
            loop = [text]
        elif loop and not text.startswith("."):
            loop.append(text)
            if text.endswith(loop[0].removesuffix(":")):
                loops.append(loop)
                loop = []
    return max(loops, key=len)


def products(loop: list[str]) -> int:
    """Return how many products of bytes one round of a loop computes."""
    return sum(PRODUCTS.get(line.split()[0], 0) for line in loop)


def simulate(program: str, loop: list[str], cpu: str, triple: str, features: str) -> float:
    """Return the cycles of a round of a loop. Raise RuntimeError if llvm-mca fails."""
    options = [f"-mtriple={triple}", f"-mcpu={cpu}", f"-mattr={features}", f"-iterations={ROUNDS}", "-json"]
    ended = subprocess.run([program, *options], input="\n".join(loop), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{program} failed for {cpu}: {ended.stderr.strip()}")
    return float(json.loads(ended.stdout)["CodeRegions"][0]["SummaryView"]["TotalCycles"]) / ROUNDS


def find_program() -> str:
    """Return the name of an llvm-mca of at least OLDEST. Raise RuntimeError if there is none."""
    for name in [*(f"llvm-mca-{version}" for version in range(30, OLDEST - 1, -1)), "llvm-mca"]:
        if shutil.which(name) and _version(name) >= OLDEST:
            return name
    raise RuntimeError(
        f"there is no llvm-mca of LLVM {OLDEST} or later: install it, on Debian with `apt-get install llvm-22`"
    )


def _version(program: str) -> int:
    """Return the major version of LLVM that a program names, or 0."""
    ended = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"LLVM version (\d+)", ended.stdout)
    return int(found[1]) if found else 0


def estimate(program: str) -> dict[str, dict[str, Any]]:
    """Return for each processor its form, and the products of bytes per cycle for each number of tokens."""
    rows: dict[str, dict[str, Any]] = {}
    for name, (cpu, triple, features, form) in PROCESSORS.items():
        rates = {}
        for n_tokens in N_TOKENS:
            loop = inner_loop(compile_loop(cpu, triple, features, form, n_tokens))
            cycles = simulate(program, loop, cpu, triple, features)
            rates[str(n_tokens)] = round(products(loop) / cycles, 1)
        rows[name] = {"cpu": cpu, "form": form, "products_per_cycle": rates}
    return rows


def main(
    out: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="Write the figures.")] = None,
) -> None:
    """Estimate the speed of a matmul's inner loop on ARM processors and with AVX2."""
    with one_line_errors(ValueError, RuntimeError):
        if out:
            check_file(out)
        program = find_program()
        rows = estimate(program)
    table = Table("processor", "form", *(f"{n} tokens" for n in N_TOKENS), title="products of bytes per cycle")
    for name, row in rows.items():
        table.add_row(name, row["form"], *map(str, row["products_per_cycle"].values()))
    PlainConsole().print(table)
    if out:
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
        facts = {**describe(), "command": "python -m loadtest.bench.arm_estimate --out docs/results/arm-estimate.json"}
        facts |= {"llvm_mca": re.findall(r"LLVM version (\S+)", version)[0], "llvm_of_llvmlite": llvm.llvm_version_info}
        write_file(out, json.dumps({**facts, "processors": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
