# Online, upload nanovllm-*.whl, which `make wheel` builds into dist/, to this notebook's folder.
# Where nanovllm is installed, this cell does nothing.
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("nanovllm") is None:
    name = "nanovllm-*.whl"
    wheels = [*sorted(Path.cwd().glob(name)), *sorted(Path("/kaggle/input").rglob(name))]
    if not wheels:
        raise ModuleNotFoundError(
            f"nanovllm is not installed, and there is no {name} in {Path.cwd()}. Run `make wheel` "
            "in the repository, upload the wheel from dist/ to that folder, and run this cell "
            "again."
        )
    install = [sys.executable, "-m", "pip", "install", "--quiet", str(wheels[-1]), "matplotlib"]
    subprocess.run(install, check=True)
    importlib.invalidate_caches()
