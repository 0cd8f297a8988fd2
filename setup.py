"""The optional CPU kernels: without a C++ compiler the package installs, and torch computes."""

from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("runtime/csrc/cpu")

setup(
    ext_modules=[
        Extension(
            "qexport.runtime.kernels._cpu",
            sources=sorted(map(str, FOLDER.glob("*.cpp"))),
            depends=sorted(map(str, FOLDER.glob("*.h"))),
            language="c++",
            # Contraction would make a sum depend on how it was compiled; fma is written out.
            extra_compile_args=[
                *("-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno"),
                *("-fvisibility=hidden", "-pthread", "-g0"),
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
