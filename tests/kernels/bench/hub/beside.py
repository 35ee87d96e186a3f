"""A program of the tests: a variant that was written and our own package in one process; says what differs.

python beside.py VARIANT torch|triton
"""

import doctest
import json
import sys
from importlib import import_module
from pathlib import Path

import torch
from hub_calls import FUNCTIONS, load, namespace, registered, results, unequal

import kernels

variant, backend = Path(sys.argv[1]), sys.argv[2]
interpreted = backend == "triton"
if interpreted:
    from interpreter import quicken

    quicken()
# Older versions of Hugging Face's package load the inner folder alone, others never look into it.
older = load(variant, "dyhead") if interpreted else None
copy = sys.modules[json.loads((variant / "metadata.json").read_text())["id"]] if interpreted else load(variant)
said = {"namespaces": [namespace(copy), namespace(kernels)], "unequal": [], "examples": [], "imported": {}}
# In the interpreter a convolution takes seconds, and bfloat16 it cannot do.
functions, dtypes = (FUNCTIONS[1:3], ["float32"]) if interpreted else (FUNCTIONS, ["float32", "bfloat16"])
for dtype in (getattr(torch, name) for name in dtypes):
    with copy.use_backend(backend), kernels.use_backend(backend):
        said["unequal"] += unequal(results(copy, dtype, functions), results(kernels, dtype, functions))
said["registered"] = [registered(name) for name in said["namespaces"]]
for name in () if interpreted else FUNCTIONS:
    for test in doctest.DocTestFinder(recurse=False).find(getattr(copy, name), name):
        said["examples"].append(list(doctest.DocTestRunner(verbose=False).run(test)))
try:
    copy.dyhead_block([torch.zeros(1, 16, 2, 2)], None)
except TypeError as error:
    said["message"] = str(error)
for path in sorted(variant.rglob("*.py")):
    parts = path.relative_to(variant).with_suffix("").parts
    module = ".".join((copy.__name__, *(parts[:-1] if parts[-1] == "__init__" else parts)))
    try:
        import_module(module)
    except ImportError as error:
        said["imported"][module.partition(".")[2]] = str(error)
module = older or load(variant, "dyhead")
said["older"] = [name for name in copy.__all__ if getattr(module, name, None) is not getattr(copy, name)]
if interpreted:
    said["tuned"] = str(sys.modules[f"{copy.__name__}.runtime.tiles"].tuned_file("Some GPU"))
print(json.dumps(said))
