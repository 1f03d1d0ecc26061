"""What a T4 (compute capability 7.5) would run: each kernel compiled for it, without a GPU, and its PTX read.

Triton 3.6 (with torch 2.11), 3.7 (2.13) and 3.9 (2.15) take the same `ASTSource`; CI compiles with all three.
"""

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import lowlevel.kernels
from lowlevel.kernels import vocabulary as ops

T4 = 75
SHARED_MEMORY = 64 * 1024  # bytes a block may have on compute capability 7.5
FILES = sorted(Path(lowlevel.kernels.__file__).parent.glob("*.py"))


OPTIONAL = ("mean_logp", "log_square_sum", "of_p", "uniform")  # vectors that are None without statistics


def compile_for(capability: int, name: str, dtype: str, vocabulary: int, statistics: bool = False) -> Any:
    """One of the kernels, for logits of a dtype at 16-byte addresses, as torch allocates them."""
    triton = pytest.importorskip("triton", reason="compiles the kernels ahead of time")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(ops.kernels(), name)
    constants: dict[str, Any] = {"vocabulary": vocabulary, "block": ops.LAUNCH["block"]}
    constants |= {} if statistics else {argument: None for argument in OPTIONAL if argument in function.arg_names}
    types = {"logits": f"*{dtype}", "targets": "*i64", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=function,
        signature={argument: types.get(argument, "*fp32") for argument in function.arg_names},
        constexprs=constants,
        attrs={(function.arg_names.index("logits"),): [["tt.divisibility", 16]]},
    )
    options = {key: value for key, value in ops.LAUNCH.items() if key != "block"}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_plainly(function: Any, types: dict[str, str], constants: dict[str, Any], launch: dict[str, Any]) -> Any:
    """A kernel whose pointers lie at 16-byte addresses and whose sizes are multiples of 16, as of every real model."""
    triton = pytest.importorskip("triton", reason="compiles the kernels ahead of time")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "fp32") != "fp32"},
    )
    options = {key: value for key, value in launch.items() if key != "size"}
    return triton.compile(source, target=GPUTarget("cuda", T4, 32), options=options)


def dequantize_kernel(nested: bool, dtype: str) -> Any:
    from lowlevel.kernels import dequantize as module

    types = {"words": "*i32", "code": "*fp32", "absmax": "*u8" if nested else "*fp32", "code2": "*fp32"}
    types |= {"absmax2": "*fp32", "offset": "*fp32", "out": f"*{dtype}", "count": "i32"}
    constants = {"blocksize": 64, "blocksize2": 256, "nested": nested, "size": module.WORDS}
    return compile_plainly(module.kernel(), types, constants, module.LAUNCH)


def host_rows_kernel(dtype: str) -> Any:
    from lowlevel.kernels import host_rows as module

    types = {"table": f"*{dtype}", "index": "*i64", "out": f"*{dtype}", "width": "i32"}
    return compile_plainly(module.kernel(), types, {"size": module.COLUMNS}, module.LAUNCH)


def decode_kernel(dtype: str) -> Any:
    from lowlevel.kernels import decoding as module

    vectors = {name: f"*{dtype}" for name in ("query", "key", "value", "cache")}
    types = {**vectors, "positions": "*i64", "parts": "*fp32", "lse": "*fp32", "scale": "fp32", "half": "i64"}
    sizes = module.launch_sizes(8, 64, 2048)
    warps = {"num_warps": sizes.pop("num_warps")}
    constants = {"kv_heads": 4, "group": 8, "features": 64, **sizes}
    return compile_plainly(module.kernel(), types | {"slot": "i32", "head": "i32"}, constants, warps)


MOVERS = {
    "4-bit, double quantisation": lambda dtype: dequantize_kernel(True, dtype),
    "4-bit": lambda dtype: dequantize_kernel(False, dtype),
    "host rows": host_rows_kernel,
    "decode attention": decode_kernel,
}


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("name", MOVERS)
def test_kernels_that_move_bytes_compile_for_a_t4(name: str, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="compiles the kernels ahead of time")
    compiled = MOVERS[name](dtype)
    ptx = compiled.asm["ptx"]
    assert re.findall(r"^\.target (\w+)", ptx, re.MULTILINE) == ["sm_75"]
    assert "bf16" not in ptx and not re.findall(r"\bmma\.|wgmma|cp\.async", ptx)  # ldmatrix moves bytes, 7.5 has it
    assert compiled.metadata.shared <= SHARED_MEMORY
    registers, spilled = ptxas(ptx, tmp_path)
    assert registers * 32 * 4 * 2 <= 65536 and spilled == 0  # at least two programs of 4 warps a multiprocessor
    if name.startswith("4-bit"):
        assert "ld.global.v4" in ptx and "st.global.v4" in ptx  # 16 bytes at a time
        assert "fma.rn" not in ptx  # a fused multiply-add would round once where bitsandbytes rounds twice


def ptxas(ptx: str, folder: Path) -> tuple[int, int]:
    """Registers a thread, and bytes that did not fit into registers, by the assembler that comes with Triton."""
    from triton import knobs

    (folder / "kernel.ptx").write_text(ptx)
    command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_75", "kernel.ptx", "-o", "kernel.cubin"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    registers, spilled = (re.findall(p, result.stderr) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    return int(registers[0]), int(spilled[0])


@pytest.mark.parametrize(("vocabulary", "statistics"), [(1, False), (32000, False), (32000, True), (32003, True)])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("name", ops.Kernels._fields)
def test_compiles_for_a_t4_without_what_a_t4_lacks(
    name: str, dtype: str, vocabulary: int, statistics: bool, tmp_path: Path
) -> None:
    compiled = compile_for(T4, name, dtype, vocabulary, statistics)
    ptx = compiled.asm["ptx"]
    assert re.findall(r"^\.target (\w+)", ptx, re.MULTILINE) == ["sm_75"]
    assert "bf16" not in ptx
    assert not re.findall(r"\bmma\.|wgmma|ldmatrix|cp\.async", ptx)  # no product, and no copy that 7.5 has to emulate
    assert compiled.metadata.shared <= SHARED_MEMORY
    registers, spilled = ptxas(ptx, tmp_path)
    programs = 2 if statistics else 4  # 4 fill a multiprocessor's 1,024 threads; no loss asks for all statistics
    assert registers * 32 * ops.WARPS * programs <= 65536 and spilled == 0
    # the vocabulary is moved 16 bytes at a time where alignment allows
    aligned = vocabulary % 16 == 0
    assert ("ld.global.v4" in ptx) == aligned
    assert ("st.global.v4" in ptx) == (aligned and name == "grad_logits")
    assert len(set(re.findall(r"ex2\.approx\S*", ptx))) == 1  # exponentials are one instruction, not a call


def test_the_check_sees_bf16() -> None:
    """bf16 logits compile for a T4 as well, through integer shifts: no bf16 instruction; an H100 has and uses them."""
    assert "bf16" not in compile_for(T4, "grad_logits", "bf16", vocabulary=32000).asm["ptx"]
    assert "bf16" in compile_for(90, "grad_logits", "bf16", vocabulary=32000).asm["ptx"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_matrix_product_in_triton(file: Path) -> None:
    """`tl.dot` leaves a T4's tensor cores idle: products belong to cuBLAS. Docstrings may name it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Attribute, ast.alias)):
            name = node.attr if isinstance(node, ast.Attribute) else node.name
            assert name not in ("dot", "dot_scaled"), f"{file.name}:{node.lineno}"
