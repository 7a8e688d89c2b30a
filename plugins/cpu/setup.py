"""Compiles the kernels, once for each instruction set: all that the target knows go into one wheel, and a processor's
are chosen when a platform is opened. They need a C++17 compiler and Python's headers, nothing of torch. Where one
cannot be compiled, the package is installed without it, and `anychip doctor` says so."""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/anychip_cpu/kernels")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"]
BF16 = [*AVX512, "-mavx512bf16"]
X86 = {
    "avx512_amx": [*BF16, "-mamx-tile", "-mamx-bf16"],
    "avx512_bf16": BF16,
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
VARIANTS = {"generic": [], **(X86 if platform.machine().lower() in ("x86_64", "amd64") else {})}
# tools/check_kernels.py builds one variant alone: AMX's with its registers as arrays, or any with sanitizers, which end
# the process with a report of faults of address and undefined behaviour.
CHOSEN = os.environ.get("ANYCHIP_VARIANT")
if CHOSEN:
    VARIANTS = {CHOSEN: {**VARIANTS, "avx512_amx_emulated": [*BF16, "-DANYCHIP_EMULATE_AMX"]}[CHOSEN]}
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if os.environ.get("ANYCHIP_SANITIZE") else []


def extension(name, flags):
    return Extension(
        f"anychip_cpu._kernels_{name}",
        sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
        depends=sorted(str(path) for path in SOURCES.rglob("*.h")),
        define_macros=[("ANYCHIP_MODULE", f"_kernels_{name}")],
        # GCC 12 takes the undefined parts of its own intrinsics for mistakes.
        extra_compile_args=[
            "-std=c++17",
            "-O1" if SANITIZERS else "-O3",
            "-g0",
            "-fvisibility=hidden",
            "-Wno-uninitialized",
            *flags,
            *SANITIZERS,
        ],
        extra_link_args=SANITIZERS,
        py_limited_api=True,
        optional=True,
    )


class BuildVariants(build_ext):
    """Side by side, each variant's objects in a folder of their own: their sources are the same."""

    def build_extension(self, ext):
        objects = self.compiler.compile(
            ext.sources,
            output_dir=str(Path(self.build_temp, ext.name)),
            macros=ext.define_macros,
            extra_postargs=ext.extra_compile_args,
            depends=ext.depends,
        )
        path = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, path, target_lang="c++", extra_postargs=ext.extra_link_args)


setup(
    cmdclass={"build_ext": BuildVariants},
    ext_modules=[extension(name, flags) for name, flags in VARIANTS.items()],
    options={"bdist_wheel": {"py_limited_api": "cp311"}, "build_ext": {"parallel": True}},
)
