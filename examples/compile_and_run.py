"""Compile the small model of this folder to 4-bit weights, and generate with it.

python examples/compile_and_run.py FOLDER
"""

import sys
from pathlib import Path

import moec

SOURCE = Path(__file__).parent / "tiny-moe"


def main(folder: Path) -> None:
    artifact = moec.compile(SOURCE, out=folder, quantize="int4")
    found = artifact.run("class Stack:", max_new_tokens=24, temperature=0.0)
    for text in found.text or ():
        print("class Stack:" + text)
    print(f"{artifact.report['bytes']:,} bytes, {found.decode_rate:.0f} tokens/s; {found.stopped[0]}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "tiny-moe-cpu"))
