"""Compile kernels ahead of time for chips that this machine lacks, and read their machine code.

The launches of networks are recorded on tensors without data (see `record`) and compiled. Nothing
is run: registers, spills, shared memory and instructions come from the machine code; bytes and
operations are counted; times are rooflines.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fvae_deploy.errors import EngineError
from fvae_deploy.kernels.chips import CHIPS, Chip
from fvae_deploy.kernels.optional import INTERPRETED, triton
from fvae_deploy.kernels.record import Recorded, Spec, choices, record

TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}

MATRIX_INSTRUCTIONS = {
    "HGMMA": r"\bHGMMA\.",
    "UTCHMMA": r"\bUTCHMMA",
    "HMMA": r"\bHMMA\.",
    "mfma": r"\bv_mfma_",
}


@dataclass(frozen=True)
class Compiled:
    """Facts about the machine code of one kernel for one chip."""

    kernel: str
    spec: str
    target: str
    choice: int  # number of the blocks among those offered, 0 is the default
    registers: int  # per thread
    spills: int  # bytes of stack and local memory per thread
    shared: int  # bytes of shared memory
    limit: int  # bytes of shared memory that the chip has
    matrix: Mapping[str, int]  # number of matrix instructions, by name
    vector_loads: int  # number of loads of 128 bits
    moved: int  # bytes, counted
    plain: float  # bytes that the plain graph moves, counted
    flops: float  # counted
    roofline: float  # seconds on the chip's card
    wrong: tuple[str, ...] = ()  # defects


def compile_for(name: str, spec: Spec, kernel: Any, chip: Chip, choice: int = 0) -> Compiled:
    """Compile a specification for a chip, with blocks number `choice`."""
    launches = record(spec, kernel, chip.target, choice)
    recorded, moved = launches[-1], sum(launch.moved for launch in launches)
    compiled = _compile_recorded(recorded, chip)
    shared, tensor = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    if chip.nvidia:
        registers, spills, code = _read_cubin(compiled.asm["cubin"])
        loads = len(re.findall(r"\b(?:LDG|LDGSTS)\S*\.128|\bUTMALDG", code))
    else:
        code = compiled.asm["amdgcn"]
        registers = _amd_metadata(code, "vgpr_count")
        spills = _amd_metadata(code, "private_segment_fixed_size")
        loads = len(re.findall(r"(?:global|buffer)_load_dwordx4", code))
    counts = {k: len(re.findall(pattern, code)) for k, pattern in MATRIX_INSTRUCTIONS.items()}
    matrix = {k: count for k, count in counts.items() if count}
    wrong = []
    if spills:
        wrong.append(f"spills {spills} bytes")
    if shared > chip.shared:
        wrong.append(f"takes {shared} of {chip.shared} bytes of shared memory")
    if tensor > chip.tensor:
        wrong.append(f"takes {tensor} of {chip.tensor} columns of tensor memory")
    if spec.dot and recorded.half and not any(k in matrix for k in chip.matrix):
        wrong.append(f"has no {' or '.join(chip.matrix)}")
    if not loads:
        wrong.append("has no load of 128 bits")
    return Compiled(
        kernel=name,
        spec=spec.name,
        target=chip.target,
        choice=choice,
        registers=registers,
        spills=spills,
        shared=shared,
        limit=chip.shared,
        matrix=matrix,
        vector_loads=loads,
        moved=moved,
        plain=spec.plain,
        flops=spec.flops,
        roofline=chip.seconds(spec.flops, moved, recorded.half),
        wrong=tuple(wrong),
    )


def _compile_recorded(recorded: Recorded, chip: Chip) -> Any:
    """Compile a recorded launch, with the same specialisation as Triton's own launcher."""
    require_triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = triton.JITFunction(recorded.kernel)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for parameter in function.params:
        value, at = recorded.arguments[parameter.name], (parameter.num,)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[at] = "constexpr", value
        elif torch.is_tensor(value):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[at] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[at] = [["tt.divisibility", 16]]
    target = (
        GPUTarget("cuda", int(chip.target.removeprefix("sm_")), 32)
        if chip.nvidia
        else GPUTarget("hip", chip.target, 64)
    )
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options=dict(recorded.options))


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """Return registers, spilled bytes and code of a CUDA binary."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def output_of(*command: str) -> str:
            done = subprocess.run(
                [str(tools / command[0]), *command[1:], file.name],
                capture_output=True,
                text=True,
                check=True,
            )
            return done.stdout

        usage = output_of("cuobjdump", "--dump-resource-usage")
        code = output_of("nvdisasm", "-c")
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], code


def _amd_metadata(code: str, name: str) -> int:
    match = re.search(rf"\.{name}:\s+(\d+)", code)
    return int(match.group(1)) if match else 0


Work = tuple[str, int, str, int]  # kernel, number of its specification, target, blocks' number


def planned(kernels: Sequence[str], targets: Sequence[str], every: bool) -> list[Work]:
    """List what to compile: the default blocks, or with `every` all offered blocks.

    Raises EngineError for unknown names, and without Triton.
    """
    from fvae_deploy.kernels.dispatch import named

    modules = named(kernels)
    for target in targets:
        if target not in CHIPS:
            raise EngineError(f"expected one of {', '.join(CHIPS)}, found {target!r}")
    require_triton()
    return [
        (name, number, target, choice)
        for name, module in modules.items()
        for number, (spec, kernel) in enumerate(module.specs())
        for target in targets
        for choice in range(len(choices(spec, kernel, target)) if every else 1)
    ]


def check(work: Sequence[Work], jobs: int) -> Iterator[Compiled]:
    """Compile the planned work in `jobs` processes; yield the results in order."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile_work, work)


def require_triton() -> None:
    """Raise EngineError if Triton is missing or runs as an interpreter."""
    if triton is None:
        raise EngineError("expected triton, found none: pip install 'fvae-deploy[kernels]'")
    if INTERPRETED:
        raise EngineError("expected Triton's compiler, found TRITON_INTERPRET=1: unset it")


def _compile_work(work: Work) -> Compiled:
    """Compile one item of work; runs in a process of its own."""
    from fvae_deploy.kernels.dispatch import KERNELS

    name, number, target, choice = work
    spec, kernel = list(KERNELS[name].specs())[number]
    return compile_for(name, spec, kernel, CHIPS[target], choice)
