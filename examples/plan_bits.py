"""Let moec choose formats under a budget of bits, change the choice by hand, and compile with it.

python examples/plan_bits.py FOLDER
"""

import json
import sys
from pathlib import Path

import moec

SOURCE = Path(__file__).parent / "tiny-moe"


def main(folder: Path) -> None:
    moec.compile(SOURCE, out=folder / "chosen", quantize="auto", budget="4.5bpw")
    plan = json.loads((folder / "chosen" / "quantization.json").read_text("utf-8"))
    print(f"{plan['bits_per_weight']:.2f} bits a weight, expected KL {plan['kl']:.3f}")
    for entry in plan["weights"]:
        if entry["role"] == "attention":
            entry["format"] = "int8_g64"  # more than the budget has room for
    own = folder / "own.json"
    own.write_text(json.dumps(plan, indent=1), "utf-8")
    artifact = moec.compile(SOURCE, out=folder / "own", quantize=str(own))
    print(artifact.manifest["precision"])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "planned"))
